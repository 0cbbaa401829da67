"""Laws of trials on a replica: shares are met and stable, a bad release takes nothing, shadows hurt nobody, ends lose nothing."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from aifactory.engine.protocol import Delta
from aifactory.errors import BadRequestError, CapacityError
from aifactory.report import Report
from aifactory.serve.memory import free_bytes, needed_bytes, require_memory
from aifactory.serve.releases import Releases
from aifactory.text.tokenizer import load_tokenizer

COMPLETE = {"model": "alpha", "prompt": "hello"}
PROMPTS = ["the quick ", "a bird in ", "naïve 🙂 "]
WHY = {"reason": "test"}


@pytest.fixture
def quick_engine(fake_engine):
    """An engine that answers at once, or as the test has it."""

    class QuickEngine(fake_engine):
        def __init__(self):
            super().__init__()
            self.hangs = False
            self.fails_by = None
            self.ends_with_error = False

        def submit(self, request, on_delta):
            if self.fails_by is not None:
                raise self.fails_by
            super().submit(request, on_delta)
            if self.ends_with_error:
                self._deliver(request.id, Delta(text="", token_ids=(), finish_reason="error", error="broken"))
            elif not self.hangs:
                for index in range(request.sampling.n):
                    self._deliver(request.id, Delta(text="hm", token_ids=(1,), finish_reason="stop", index=index))

    return QuickEngine


@pytest.fixture
def two(factory, quick_engine):
    """The release 1 in production, 2 beside it; the engines in the order in which they were loaded."""
    engines = []

    def load(folder):
        engines.append(quick_engine())
        return engines[-1], load_tokenizer(folder)

    factory.promote(factory.publish(1))
    factory.promote(factory.publish(2))
    factory.books.registry.rollback(reason="test")
    releases = Releases(factory.books, load)
    releases.load_first()
    return releases, engines


def canary(factory, share, **options):
    return factory.books.registry.try_out(2, "canary", share=share, reason=WHY, **options)


def shadow(factory, share=1.0):
    return factory.books.registry.try_out(2, "shadow", share=share, reason=WHY)


def look(endpoint):
    endpoint.run(endpoint.releases.look(20.0))


def outcomes(factory, endpoint):
    """How often each release was asked: in vain or not."""
    endpoint.gateway.outcomes.tell()
    found = factory.books.registry.trial_log.outcomes(since=1)
    return Counter((outcome.release, outcome.failed) for outcome in found)


def shadows(factory):
    return factory.books.registry.trial_log.shadows(release=2)


# ── shares ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_share_of_requests_is_met_within_binomial_bounds(factory, answer_on, two):
    releases, _ = two
    with answer_on(factory, releases) as endpoint:
        canary(factory, 0.3, by="request")
        look(endpoint)
        number = 300
        asked = Counter(endpoint.client.completions.create(**COMPLETE, user="one").model for _ in range(number))

        assert abs(asked["alpha-r2"] - 0.3 * number) <= 5 * math.sqrt(number * 0.3 * 0.7)
        assert asked["alpha-r1"] == number - asked["alpha-r2"]
        assert factory.books.feedback.completions_by_release() == {1: asked["alpha-r1"], 2: asked["alpha-r2"]}
        assert outcomes(factory, endpoint) == {(1, False): asked["alpha-r1"], (2, False): asked["alpha-r2"]}


def test_a_key_stays_on_its_side_while_the_share_rises(factory, answer_on, two):
    releases, _ = two
    clients = {}

    def side(endpoint, key, user):
        client = clients.setdefault(key, endpoint.client.with_options(api_key=key))
        answers = [client.completions.create(**COMPLETE, user=user) for _ in range(2)]
        chat = client.chat.completions.create(model="alpha", messages=[{"role": "user", "content": "hello"}], user=user)
        (model,) = {answer.model for answer in [*answers, chat]}
        return model == "alpha-r2"

    with answer_on(factory, releases) as endpoint:
        sides = []
        for share in (0.0, 0.2, 0.5, 1.0):
            trial = canary(factory, share)
            look(endpoint)
            askers = [(f"key-{i % 5}", f"user-{i}") for i in range(40)]
            sides.append({asker for asker in askers if side(endpoint, *asker)})

        assert trial.by == "key"
        assert all(before < after for before, after in itertools.pairwise(sides))
        assert (len(sides[0]), len(sides[-1])) == (0, 40)
        assert len(two[1]) == 2, "it was loaded once"


def test_who_names_a_release_gets_it_and_work_in_the_background_stays_in_production(factory, answer_on, two):
    releases, _ = two
    with answer_on(factory, releases) as endpoint:
        canary(factory, 1.0)
        look(endpoint)

        def answered_by(model):
            return endpoint.client.completions.create(model=model, prompt="hello").model

        assert [answered_by(model) for model in ("alpha", "alpha-r1", "alpha-r2")] == [
            "alpha-r2",
            "alpha-r1",
            "alpha-r2",
        ]
        assert [model.id for model in endpoint.client.models.list()] == ["alpha", "alpha-r1", "alpha-r2"]
        body = json.dumps(COMPLETE).encode()
        ask = endpoint.gateway.ask_behind("/v1/completions", body, "0123456789abcdef")
        status, answer = asyncio.run_coroutine_threadsafe(ask, endpoint.loop).result(20)
        assert (status, answer["model"]) == (200, "alpha-r1")
        # Only what asks for whatever is in production tells something of the trial.
        assert outcomes(factory, endpoint) == {(2, False): 1}

        shadow(factory)
        look(endpoint)
        with pytest.raises(openai.NotFoundError, match="alpha-r2"):
            answered_by("alpha-r2")


# ── what does not load ────────────────────────────────────────────────────────────────────────────────────────────────


def scramble_weights(folder):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-4000:] = bytes(4000)
    file.write_bytes(data)


@pytest.mark.parametrize("kind", ["canary", "shadow"])
def test_a_bad_release_on_trial_takes_no_request_and_the_registry_says_why(factory, answer_on, load, says, kind):
    factory.promote(factory.publish(1))
    factory.promote(factory.publish(2, scramble_weights))
    factory.books.registry.rollback(reason="test")
    releases = Releases(factory.books, load)
    releases.load_first()
    with answer_on(factory, releases) as endpoint:
        factory.books.registry.try_out(2, kind, share=1.0, reason=WHY)
        for _ in range(3):
            look(endpoint)

        answer = endpoint.client.completions.create(**COMPLETE, max_tokens=4, temperature=0)

        assert (answer.model, answer.choices[0].text) == ("alpha-r1", says(1, "hello", 4))
        assert releases.tried is None
        report = Report.of(factory.books)
        assert report.trial.loaded_by == []
        (reason,) = report.trial.refused
        assert "ParityError" in reason
        assert any("not loaded" in line and "ParityError" in line for line in report.lines())
        assert shadows(factory) == []


def test_a_trial_for_which_there_is_no_memory_is_refused_and_its_promotion_is_not(factory, answer_on, quick_engine):
    engines = []

    def load(folder):
        engines.append(quick_engine())
        return engines[-1], load_tokenizer(folder)

    def no_room(folder):
        raise CapacityError("expected 2 GB of memory to load the release beside the one in production, found 1")

    factory.promote(factory.publish(1))
    factory.promote(factory.publish(2))
    factory.books.registry.rollback(reason="test")
    releases = Releases(factory.books, load, require_room=no_room)
    releases.load_first()
    with answer_on(factory, releases) as endpoint:
        canary(factory, 1.0)
        look(endpoint)
        assert endpoint.client.completions.create(**COMPLETE).model == "alpha-r1"
        assert "CapacityError: expected 2 GB of memory" in Report.of(factory.books).trial.refused[0]

        factory.books.registry.promote_trial(reason=WHY)
        look(endpoint)
        assert endpoint.client.completions.create(**COMPLETE).model == "alpha-r2"


def test_memory_is_asked_for_by_what_the_weights_come_to(exported, monkeypatch):
    folder = exported(1)
    floats = (folder / "model.safetensors").stat().st_size // 4
    assert floats * 0.9 * 8 < needed_bytes(folder) <= floats * 8
    assert free_bytes("cpu") > 0
    require_memory(folder)
    monkeypatch.setattr("aifactory.serve.memory.free_bytes", lambda device: needed_bytes(folder) - 1)
    with pytest.raises(CapacityError, match="beside the one in production, found"):
        require_memory(folder)


# ── ends ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_promoted_from_a_canary_it_is_not_loaded_again_and_what_was_begun_ends_where_it_began(
    factory, answer_on, two, pool, wait_until
):
    releases, engines = two
    with answer_on(factory, releases) as endpoint:
        canary(factory, 1.0)
        look(endpoint)
        for engine in engines:
            engine.hangs = True
        old = pool.submit(endpoint.client.completions.create, model="alpha-r1", prompt="hello")
        tried = pool.submit(endpoint.client.completions.create, **COMPLETE)
        wait_until(lambda: len(engines[0].asked) == len(engines[1].asked) == 1)

        factory.books.registry.promote_trial(reason=WHY)
        look(endpoint)

        later = pool.submit(endpoint.client.completions.create, **COMPLETE)
        engines[1].say("later", "stop", to=1)
        assert later.result().model == "alpha-r2"
        engines[1].say("tried", "stop", to=0)
        engines[0].say("old", "stop", to=0)
        assert (tried.result().model, tried.result().choices[0].text) == ("alpha-r2", "tried")
        assert (old.result().model, old.result().choices[0].text) == ("alpha-r1", "old")
        wait_until(lambda: engines[0].closed)
        assert len(engines) == 2
        assert not engines[1].closed
        assert releases.tried is None
    (swap,) = factory.books.journal.events(event="swapped")
    assert swap.subject == "alpha-r2"


def test_what_is_promoted_while_it_is_loaded_for_its_trial_is_loaded_once(factory, answer_on, quick_engine, wait_until):
    engines, let = [], threading.Event()

    def load(folder):
        engine = quick_engine()
        engines.append(engine)
        if len(engines) == 2:
            assert let.wait(20)
        return engine, load_tokenizer(folder)

    factory.promote(factory.publish(1))
    factory.promote(factory.publish(2))
    factory.books.registry.rollback(reason="test")
    releases = Releases(factory.books, load)
    releases.load_first()
    with answer_on(factory, releases, poll_s=0.01) as endpoint:
        canary(factory, 1.0)
        wait_until(lambda: len(engines) == 2)
        factory.books.registry.promote_trial(reason=WHY)
        time.sleep(0.1)
        assert endpoint.client.completions.create(**COMPLETE).model == "alpha-r1"
        let.set()
        wait_until(lambda: releases.current.release.number == 2)
        time.sleep(0.1)

        assert endpoint.client.completions.create(**COMPLETE).model == "alpha-r2"
        assert len(engines) == 2
        assert not engines[1].closed


def test_a_rollback_waits_for_no_trial_that_is_being_loaded(factory, answer_on, quick_engine, wait_until):
    engines, let = [], threading.Event()

    def load(folder):
        engine = quick_engine()
        engines.append(engine)
        if len(engines) == 2:
            assert let.wait(20)
        return engine, load_tokenizer(folder)

    for seed in (1, 2, 3):
        factory.promote(factory.publish(seed))
    factory.books.registry.rollback(reason="test")
    releases = Releases(factory.books, load)
    releases.load_first()
    with answer_on(factory, releases, poll_s=0.01):
        factory.books.registry.try_out(3, "canary", share=0.5, reason=WHY)
        wait_until(lambda: len(engines) == 2)
        factory.books.registry.rollback(reason="test")
        wait_until(lambda: releases.current.release.number == 1)
        let.set()
        wait_until(lambda: engines[1].closed)  # its trial is over
        assert releases.tried is None


def test_withdrawn_it_ends_what_it_has_begun_and_takes_nothing_more(factory, answer_on, two, pool, wait_until):
    releases, engines = two
    with answer_on(factory, releases) as endpoint:
        canary(factory, 1.0)
        look(endpoint)
        engines[1].hangs = True
        begun = pool.submit(endpoint.client.completions.create, **COMPLETE)
        wait_until(lambda: len(engines[1].asked) == 1)

        factory.books.registry.withdraw(reason=WHY)
        look(endpoint)

        assert endpoint.client.completions.create(**COMPLETE).model == "alpha-r1"
        with pytest.raises(openai.NotFoundError):
            endpoint.client.completions.create(model="alpha-r2", prompt="hello")
        time.sleep(0.1)
        assert not engines[1].closed
        engines[1].say("begun", "stop")
        assert begun.result().model == "alpha-r2"
        wait_until(lambda: engines[1].closed)
        assert engines[1].cancelled == []


def test_what_fails_on_trial_is_counted_and_said(factory, answer_on, two):
    releases, engines = two
    with answer_on(factory, releases) as endpoint:
        canary(factory, 1.0)
        look(endpoint)
        engines[1].ends_with_error = True
        for _ in range(3):
            with pytest.raises(openai.InternalServerError):
                endpoint.client.completions.create(**COMPLETE)
        with pytest.raises(openai.BadRequestError):
            endpoint.client.completions.create(**COMPLETE, max_tokens=-1)

        assert outcomes(factory, endpoint) == {(2, True): 3}
        assert Report.of(factory.books).trial.outcomes == {"alpha-r2": {"answered": 0, "failed": 3}}


def test_an_engine_that_fails_on_trial_speaks_against_its_release(factory, answer_on, two, pool, wait_until):
    releases, engines = two
    with answer_on(factory, releases) as endpoint:
        canary(factory, 1.0)
        look(endpoint)
        engines[1].hangs = True
        begun = pool.submit(endpoint.client.completions.create, **COMPLETE)
        wait_until(lambda: engines[1].asked)
        engines[1].failure = "its process has ended"
        engines[1].say("", "error", error="EngineDeadError")

        with pytest.raises(openai.InternalServerError) as told:
            begun.result()
        assert told.value.status_code == 503
        assert outcomes(factory, endpoint) == {(2, True): 1}


# ── shadows ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [False, True])
def test_a_shadow_answers_what_was_answered_and_nobody_sees_it(factory, answer_on, two, wait_until, stream):
    releases, engines = two
    with answer_on(factory, releases) as endpoint:
        shadow(factory)
        look(endpoint)
        answer = endpoint.client.completions.create(model="alpha", prompt=["one", "two"], n=2, stream=stream)
        chunks = list(answer) if stream else [answer]
        wait_until(lambda: len(shadows(factory)) == 4)

        assert {chunk.model for chunk in chunks} == {"alpha-r1"}
        assert [each.completion for each in shadows(factory)] == [f"{chunks[0].id}-{i}" for i in range(4)]
        assert {each.answer for each in shadows(factory)} == {"hm"}
        assert [request.prompt_ids for request in engines[0].requests] == [
            request.prompt_ids for request in engines[1].requests
        ]
        assert factory.books.feedback.completions_by_release() == {1: 4}
        said = endpoint.client.post(
            "/feedback", body={"completion": chunks[0].id, "index": 1, "correction": "better"}, cast_to=object
        )
        assert said["counted"] is True
        (correction,) = factory.books.feedback.corrections()
        assert correction.release == 1
        assert outcomes(factory, endpoint) == {(1, False): 1, (2, False): 1}


def test_a_shadow_copies_its_share_of_requests(factory, answer_on, two, wait_until):
    releases, engines = two
    with answer_on(factory, releases) as endpoint:
        shadow(factory, 0.4)
        look(endpoint)
        for _ in range(200):
            endpoint.client.completions.create(**COMPLETE)
            wait_until(lambda: not endpoint.gateway.shadows.num_running)

        assert abs(len(engines[1].asked) - 80) <= 5 * math.sqrt(200 * 0.4 * 0.6)
        wait_until(lambda: len(shadows(factory)) == len(engines[1].asked))


def test_a_shadow_that_hangs_hurts_nobody_and_no_more_than_a_few_are_under_way(
    make_small, tmp_path, answer_on, quick_engine, wait_until
):
    factory = make_small(tmp_path, shadow_slots=3, request_timeout_s=0.5)
    engines = []

    def load(folder):
        engines.append(quick_engine())
        return engines[-1], load_tokenizer(folder)

    factory.promote(factory.publish(1))
    factory.promote(factory.publish(2))
    factory.books.registry.rollback(reason="test")
    releases = Releases(factory.books, load)
    releases.load_first()
    with answer_on(factory, releases) as endpoint:
        shadow(factory)
        look(endpoint)
        engines[1].hangs = True
        most = 0
        for _ in range(12):
            assert endpoint.client.completions.create(**COMPLETE).model == "alpha-r1"
            most = max(most, endpoint.gateway.shadows.num_running)

        assert most == 3
        wait_until(lambda: not endpoint.gateway.shadows.num_running)
        assert engines[1].num_unfinished == 0, "what was given up is no work any more"
        found = outcomes(factory, endpoint)
        assert (found[1, False], found[2, False]) == (12, 0)
        assert found[2, True] >= 3
        assert shadows(factory) == []


@pytest.mark.parametrize("how", ["submit", "capacity", "error", "read"])
def test_a_shadow_that_fails_hurts_nobody(factory, answer_on, two, wait_until, how, monkeypatch):
    releases, engines = two
    with answer_on(factory, releases) as endpoint:
        shadow(factory)
        look(endpoint)
        if how == "submit":
            engines[1].fails_by = BadRequestError("no", field="prompt_ids")
        elif how == "capacity":
            engines[1].fails_by = CapacityError("full")
        elif how == "error":
            engines[1].ends_with_error = True
        else:
            tokenizer = releases.tried[1].tokenizer
            monkeypatch.setattr(tokenizer, "encode", lambda text: 1 / 0)
        for _ in range(4):
            assert endpoint.client.completions.create(**COMPLETE).model == "alpha-r1"
            wait_until(lambda: not endpoint.gateway.shadows.num_running)

        assert outcomes(factory, endpoint) == {(1, False): 4, (2, True): 4}
        assert shadows(factory) == []


def test_shadows_make_way_as_soon_as_somebody_waits(make_small, tmp_path, answer_on, quick_engine, pool, wait_until):
    factory = make_small(tmp_path, slots=1)  # two answers run, the third waits
    engines = []

    def load(folder):
        engines.append(quick_engine())
        return engines[-1], load_tokenizer(folder)

    factory.promote(factory.publish(1))
    factory.promote(factory.publish(2))
    factory.books.registry.rollback(reason="test")
    releases = Releases(factory.books, load)
    releases.load_first()
    with answer_on(factory, releases) as endpoint:
        shadow(factory)
        look(endpoint)
        engines[1].hangs = True
        endpoint.client.completions.create(**COMPLETE)
        wait_until(lambda: len(engines[1].asked) == 1)

        engines[0].hangs = True
        asked = [pool.submit(endpoint.client.completions.create, **COMPLETE) for _ in range(3)]
        wait_until(lambda: endpoint.waiting == 1)
        wait_until(lambda: not endpoint.gateway.shadows.num_running)
        assert len(engines[1].cancelled) == 1
        engines[0].say("one", "stop", to=1)
        wait_until(lambda: len(engines[0].asked) == 4)  # the third is let in: nobody waits
        for number in (2, 3):
            engines[0].say("more", "stop", to=number)
        assert {one.result().model for one in asked} == {"alpha-r1"}

        # What made way tells nothing of the release.
        assert (2, True) not in outcomes(factory, endpoint)


def test_a_shadow_that_becomes_a_canary_is_not_loaded_again(factory, answer_on, two):
    releases, engines = two
    with answer_on(factory, releases) as endpoint:
        shadow(factory)
        look(endpoint)
        assert endpoint.client.completions.create(**COMPLETE).model == "alpha-r1"
        canary(factory, 1.0)
        look(endpoint)
        assert endpoint.client.completions.create(**COMPLETE).model == "alpha-r2"
        assert len(engines) == 2


# ── under load ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_request_fails_while_a_share_is_moved_up_down_and_away(factory, answer_on, load, says, wait_until):
    expected = {(release, prompt): says(release, prompt, 12) for release in (1, 2) for prompt in PROMPTS}
    assert len(set(expected.values())) == len(expected), "models that can be told apart"
    loads, ended, seen, wrong = [], threading.Event(), Counter(), []

    def load_and_note(folder):
        loads.append(folder)
        return load(folder)

    factory.promote(factory.publish(1))
    factory.promote(factory.publish(2))
    factory.books.registry.rollback(reason="test")
    releases = Releases(factory.books, load_and_note)
    releases.load_first()

    def ask(endpoint, index):
        for number in itertools.count(index):
            if ended.is_set():
                return
            prompt, stream = PROMPTS[number % 3], bool(number // 3 % 2)
            try:
                answer = endpoint.client.completions.create(
                    model="alpha", prompt=prompt, max_tokens=12, temperature=0, stream=stream, user=f"user-{number}"
                )
                chunks = list(answer) if stream else [answer]
            except openai.APIError as error:
                wrong.append(error)
                continue
            (name,) = {chunk.model for chunk in chunks}
            release = int(name.removeprefix("alpha-r"))
            text = "".join(chunk.choices[0].text for chunk in chunks)
            seen[release] += 1
            if text != expected[release, prompt]:
                wrong.append((name, prompt, text))

    def some_by(release):
        count = seen[release]
        wait_until(lambda: seen[release] >= count + 5, timeout_s=60)

    registry = factory.books.registry
    with answer_on(factory, releases, poll_s=0.02) as endpoint, ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask, endpoint, 1000 * index) for index in range(4)]
        try:
            some_by(1)
            shadow(factory)
            wait_until(lambda: len(shadows(factory)) >= 3, timeout_s=60)
            for share in (0.2, 0.6, 0.3, 1.0):
                canary(factory, share)
                some_by(2)
            registry.withdraw(reason=WHY)
            some_by(1)
            canary(factory, 0.5)
            some_by(2)
            some_by(1)
            registry.promote_trial(reason=WHY)
            wait_until(lambda: releases.current.release.number == 2)
            some_by(2)
        finally:
            ended.set()
        for one in asking:
            one.result()

    assert wrong == []
    assert len(loads) == 3  # once for each trial, and none for the promotion
    assert factory.books.feedback.completions_by_release() == dict(seen)
