"""Laws of releases: a request ends on the one on which it began, and one that does not load never takes a request."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from aifactory.engine.golden import GOLDEN_NAME
from aifactory.engine.protocol import GenerationRequest
from aifactory.errors import AIFactoryError, CapacityError, StateError
from aifactory.serve.releases import Releases
from aifactory.text.tokenizer import TextTokenizer, load_tokenizer

COMPLETE = {"model": "alpha", "prompt": "hello"}
PROMPTS = ["the quick ", "a bird in ", "naïve 🙂 "]


class Clock:
    """A clock that is set by hand."""

    def __init__(self):
        self.at = 1000.0

    def __call__(self):
        return self.at


class SlowTokenizer(TextTokenizer):
    """Encodes no text before it is let."""

    def __init__(self, *parts, **options):
        super().__init__(*parts, **options)
        self.entered, self.let = threading.Event(), threading.Event()

    def encode(self, text):
        self.entered.set()
        assert self.let.wait(20)
        return super().encode(text)


@pytest.fixture
def fakes(factory, fake_engine):
    """Releases whose loads each give a new fake engine, and the engines in order."""
    engines = []

    def load_fake(folder):
        engines.append(fake_engine())
        return engines[-1], load_tokenizer(folder)

    factory.promote(factory.publish(1))
    releases = Releases(factory.books, load_fake)
    releases.load_first()
    return releases, engines


# ── while requests run ────────────────────────────────────────────────────────────────────────────────────────────────


def engine_threads():
    """Those of the engines in this process; other tests may have left some."""
    return {thread for thread in threading.enumerate() if thread.name == "torch-engine"}


def test_swaps_under_load_fail_nothing_and_mix_nothing(factory, answer_on, load, says, wait_until):
    seed_of = {1: 1, 2: 2, 3: 3}
    expected = {(release, prompt): says(seed, prompt, 20) for release, seed in seed_of.items() for prompt in PROMPTS}
    assert len(set(expected.values())) == len(expected), "models that can be told apart"
    engines, before = [], engine_threads()

    def load_and_note(folder):
        engine, tokenizer = load(folder)
        engines.append(engine)
        return engine, tokenizer

    factory.promote(factory.publish(1))
    releases = Releases(factory.books, load_and_note)
    releases.load_first()
    ended, seen, wrong = threading.Event(), Counter(), []

    def ask(endpoint, index):
        for number in itertools.count(index):
            if ended.is_set():
                return
            prompt, stream = PROMPTS[number % 3], bool(number // 3 % 2)
            try:
                answer = endpoint.client.completions.create(
                    model="alpha", prompt=prompt, max_tokens=20, temperature=0, stream=stream
                )
                chunks = list(answer) if stream else [answer]
            except openai.APIError as error:
                wrong.append(error)
                continue
            (name,) = {chunk.model for chunk in chunks}
            (fingerprint,) = {chunk.system_fingerprint for chunk in chunks}
            release = factory.books.registry.release(int(name.removeprefix("alpha-r")))
            text = "".join(chunk.choices[0].text for chunk in chunks)
            seen[release.number] += 1
            if fingerprint != release.fingerprint or text != expected[release.number, prompt]:
                wrong.append((name, fingerprint, prompt, text))

    def serve_until_seen(number):
        wait_until(lambda: releases.current.release.number == number)
        count = seen[number]
        wait_until(lambda: seen[number] >= count + 6)

    with answer_on(factory, releases, poll_s=0.02) as endpoint, ThreadPoolExecutor(6) as pool:
        asking = [pool.submit(ask, endpoint, index) for index in range(6)]
        try:
            serve_until_seen(1)
            for seed in (2, 3):
                factory.promote(factory.publish(seed))
                serve_until_seen(seed)
            assert factory.books.registry.rollback(reason="test").number == 2
            serve_until_seen(2)
            assert factory.books.registry.rollback(reason="test").number == 1
            serve_until_seen(1)
        finally:
            ended.set()
        for one in asking:
            one.result()

        assert wrong == []
        assert set(seen) == {1, 2, 3}
        assert sum(factory.books.feedback.completions_by_release().values()) == sum(seen.values())
        wait_until(lambda: len(engine_threads() - before) <= 1)
        for engine in engines[:-1]:
            with pytest.raises(CapacityError):
                engine.submit(GenerationRequest(id="late", prompt_ids=(1,)), lambda delta: None)
    swaps = factory.books.journal.events(event="swapped")
    assert all(swap.seconds > 0 for swap in swaps)
    assert [swap.subject for swap in swaps] == [
        "alpha-r2",
        "alpha-r3",
        "alpha-r2",
        "alpha-r1",
    ]


def test_a_release_is_closed_after_its_last_answer_and_not_before(factory, answer_on, fakes, pool, wait_until):
    releases, engines = fakes
    with answer_on(factory, releases) as endpoint:
        plain = pool.submit(endpoint.client.completions.create, **COMPLETE)
        wait_until(lambda: len(engines[0].asked) == 1)
        asked = pool.submit(endpoint.client.completions.create, **COMPLETE, stream=True)
        engines[0].say("one ", to=1)
        stream = asked.result()
        factory.promote(factory.publish(2))
        endpoint.run(releases.look(30.0))

        later = pool.submit(endpoint.client.completions.create, **COMPLETE)
        engines[1].say("new", "stop")
        assert later.result().model == "alpha-r2"
        engines[0].say("old", "stop")
        assert (plain.result().model, plain.result().choices[0].text) == ("alpha-r1", "old")
        time.sleep(0.2)
        assert not engines[0].closed
        engines[0].say("two", "stop", to=1)
        chunks = list(stream)

        assert "".join(chunk.choices[0].text for chunk in chunks) == "one two"
        assert {chunk.model for chunk in chunks} == {"alpha-r1"}
        wait_until(lambda: engines[0].closed)
        assert engines[0].cancelled == []
        assert not engines[1].closed


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_is_read_during_a_swap_ends_on_the_release_on_which_it_began(
    factory, answer_on, fake_engine, pool, wait_until, stream
):
    engines, tokenizers = [], []

    def load_slow(folder):
        engines.append(fake_engine())
        tokenizers.append(SlowTokenizer((folder / "tokenizer.json").read_bytes()))
        return engines[-1], tokenizers[-1]

    factory.promote(factory.publish(1))
    releases = Releases(factory.books, load_slow)
    releases.load_first()
    with answer_on(factory, releases) as endpoint:
        asked = pool.submit(lambda: list(endpoint.client.completions.create(**COMPLETE, stream=stream)))
        assert tokenizers[0].entered.wait(10)
        factory.promote(factory.publish(2))
        endpoint.run(releases.look(30.0))
        time.sleep(0.2)
        assert not engines[0].closed

        tokenizers[0].let.set()
        engines[0].say("old", "stop")

        asked.result()
        wait_until(lambda: engines[0].closed)
        assert engines[0].cancelled == []
        assert factory.books.feedback.completions_by_release() == {1: 1}


def test_what_is_not_done_when_the_drain_time_is_up_is_cut_off(factory, answer_on, fakes, pool, wait_until):
    releases, engines = fakes
    with answer_on(factory, releases) as endpoint:
        asked = pool.submit(endpoint.client.completions.create, **COMPLETE)
        wait_until(lambda: len(engines[0].asked) == 1)
        factory.promote(factory.publish(2))
        endpoint.run(releases.look(0.2))

        with pytest.raises(openai.InternalServerError) as cut:
            asked.result()

        assert cut.value.status_code == 503
        assert engines[0].closed


def test_a_client_that_goes_away_does_not_hold_up_a_swap(factory, answer_on, fakes, pool, wait_until):
    releases, engines = fakes
    with answer_on(factory, releases) as endpoint:
        asked = pool.submit(endpoint.client.completions.create, **COMPLETE, stream=True)
        engines[0].say("one")
        stream = asked.result()
        factory.promote(factory.publish(2))
        endpoint.run(releases.look(30.0))

        stream.close()

        wait_until(lambda: engines[0].closed)


def test_nothing_in_production_changes_nothing(factory, fakes):
    releases, engines = fakes

    for _ in range(3):
        asyncio.run(releases.look(1.0))

    assert len(engines) == 1
    assert not engines[0].closed
    assert factory.books.journal.events(event="swapped") == []


def test_the_first_release_is_taken_while_it_waits(factory, answer_on, load, wait_until):
    releases = Releases(factory.books, load)
    releases.load_first()
    with answer_on(factory, releases, poll_s=0.02) as endpoint:
        with pytest.raises(openai.InternalServerError):
            endpoint.client.completions.create(**COMPLETE)
        factory.promote(factory.publish(1))
        wait_until(lambda: releases.current is not None)

        assert endpoint.client.completions.create(**COMPLETE).model == "alpha-r1"


# ── what does not load ────────────────────────────────────────────────────────────────────────────────────────────────


def add_pickle(folder):
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def drop_weights(folder):
    (folder / "model.safetensors").unlink()


def cut_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def scramble_weights(folder):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-4000:] = bytes(4000)
    file.write_bytes(data)


def scramble_header(folder):
    file = folder / "model.safetensors"
    file.write_bytes(b"\xff" * 16 + file.read_bytes()[16:])


def change_golden(folder):
    golden = json.loads((folder / GOLDEN_NAME).read_bytes())
    golden["answers"][0]["log_probs"][0] -= 0.1
    (folder / GOLDEN_NAME).write_text(json.dumps(golden))


def change_golden_tokens(folder):
    golden = json.loads((folder / GOLDEN_NAME).read_bytes())
    golden["answers"][1]["ids"][0] += 1
    (folder / GOLDEN_NAME).write_text(json.dumps(golden))


def drop_golden(folder):
    (folder / GOLDEN_NAME).unlink()


def garble_golden(folder):
    (folder / GOLDEN_NAME).write_bytes(b"{")


def garble_config(folder):
    (folder / "config.json").write_bytes(b"{")


def drop_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


DAMAGES = [
    add_pickle,
    drop_weights,
    cut_weights,
    scramble_weights,
    scramble_header,
    change_golden,
    change_golden_tokens,
    drop_golden,
    garble_golden,
    garble_config,
    drop_tokenizer,
]


def test_a_damaged_release_takes_no_request_and_a_later_good_one_does(factory, answer_on, load, says, wait_until):
    factory.promote(factory.publish(1))
    releases = Releases(factory.books, load)
    releases.load_first()
    with answer_on(factory, releases) as endpoint:
        for number, damage in enumerate(DAMAGES, start=2):
            factory.promote(factory.publish(2, damage))
            for _ in range(3):
                endpoint.run(releases.look(5.0))
            assert releases.current.release.number == 1, damage.__name__
            answer = endpoint.client.completions.create(**COMPLETE, max_tokens=4, temperature=0)
            assert (answer.model, answer.choices[0].text) == ("alpha-r1", says(1, "hello", 4))

            failures = factory.books.journal.events(event="load_failed")
            assert [failure.subject for failure in failures] == [f"alpha-r{n}" for n in range(2, number + 1)]
            assert len(failures[-1].detail["reason"]) > 20, damage.__name__

        good = factory.promote(factory.publish(2))
        endpoint.run(releases.look(5.0))
        answer = endpoint.client.completions.create(**COMPLETE, max_tokens=4, temperature=0)

    assert answer.model == good.name
    assert answer.choices[0].text == says(2, "hello", 4)
    reasons = [failure.detail["reason"] for failure in factory.books.journal.events(event="load_failed")]
    assert "UnsafeModelError" in reasons[0]
    assert "pytorch_model.bin" in reasons[0]
    assert all("ParityError" in reasons[DAMAGES.index(damage)] for damage in (scramble_weights, change_golden))


def test_a_release_that_the_storage_did_not_give_is_tried_again_later(factory, fake_engine):
    clock, tries, away = Clock(), [], True

    def load_if_there(folder):
        tries.append(clock.at)
        if away and len(tries) > 1:
            raise OSError("the storage is away")
        return fake_engine(), load_tokenizer(folder)

    factory.promote(factory.publish(1))
    releases = Releases(factory.books, load_if_there, clock=clock)
    releases.load_first()
    factory.promote(factory.publish(2))
    for _ in range(1000):
        asyncio.run(releases.look(1.0))
        clock.at += 1

    assert [at - 1000 for at in tries[1:]] == [0, 60, 180, 420, 900]
    assert len(factory.books.journal.events(event="load_failed")) == 1
    away = False
    clock.at += 10_000
    asyncio.run(releases.look(1.0))
    assert releases.current.release.number == 2


def test_a_replica_that_starts_on_a_damaged_release_serves_the_one_before_it(factory, load):
    factory.promote(factory.publish(1))
    factory.promote(factory.publish(2))
    factory.books.registry.rollback(reason="test")
    factory.promote(factory.publish(3, drop_weights))

    releases = Releases(factory.books, load)
    releases.load_first()

    assert releases.current.release.number == 1
    (failure,) = factory.books.journal.events(event="load_failed")
    assert failure.subject == "alpha-r3"
    asyncio.run(releases.look(1.0))
    assert releases.current.release.number == 1
    releases.close(0.0)


def test_a_replica_that_can_load_nothing_says_why(factory, load):
    factory.promote(factory.publish(1, drop_weights))
    factory.promote(factory.publish(2, add_pickle))
    releases = Releases(factory.books, load)

    with pytest.raises(AIFactoryError, match=r"pytorch_model\.bin"):
        releases.load_first()

    assert releases.current is None


# ── when the database is away ─────────────────────────────────────────────────────────────────────────────────────────


def rename(factory, old, new):
    with factory.books.database.write() as connection:
        connection.exec_driver_sql(f"ALTER TABLE {old} RENAME TO {new}")


def test_the_watch_goes_on_when_the_database_was_away(factory, answer_on, fakes, wait_until):
    releases, engines = fakes
    with answer_on(factory, releases, poll_s=0.01):
        rename(factory, "promotions", "gone")
        time.sleep(0.1)
        rename(factory, "gone", "promotions")
        factory.promote(factory.publish(2))

        wait_until(lambda: releases.current.release.number == 2)
        wait_until(lambda: engines[0].closed)


def test_a_swap_that_cannot_be_written_down_still_closes_the_old_release(factory, answer_on, fakes, wait_until):
    releases, engines = fakes
    with answer_on(factory, releases) as endpoint:
        factory.promote(factory.publish(2))
        rename(factory, "journal", "gone")

        with pytest.raises(StateError):
            endpoint.run(releases.look(5.0))

        assert releases.current.release.number == 2
        wait_until(lambda: engines[0].closed)
        rename(factory, "gone", "journal")
