"""What every engine promises: the same tests on the project's own, with its kernels and without, and on vLLM's.

`AIFACTORY_ENGINE` chooses (torch or vllm; see the Makefile's test-engines). What an engine promises in its own measure is
said in `conformance.py`: how near its greedy tokens are to the model's best, and its scores to the model's own.
"""

from __future__ import annotations

import json
import random
import re
import threading
from collections import Counter

import pytest
import torch
from conformance import CONTEXT, Collected, Indexed, Many, held_until, teacher_forced
from small_adapters import write_adapter
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from aifactory.engine.protocol import Grammar
from aifactory.errors import BadRequestError, CapacityError, ConfigError, TokenizerMismatchError, UnsafeModelError

EOS = 0
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "kind": {"enum": ["bird", "dog", "löwe"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "kind", "age"],
    "additionalProperties": False,
}
REGEX = r"(the|a) [a-c]{2,4}( 😀|!)?"


@pytest.fixture
def engine(conforming):
    """An engine on the model, with eight slots, room for sixty more answers and for two adapters; nothing of a test is left in it."""
    yield conforming.shared
    assert conforming.shared.num_unfinished == 0
    assert conforming.shared.failure is None


@pytest.fixture(scope="session")
def prompts(tokenizer):
    rng = random.Random(0)
    lengths = [1, 3, 40, 17, 16, 5, 64, 33, 2, 90]
    return [[rng.randrange(1, tokenizer.vocab_size) for _ in range(length)] for length in lengths]


# ── answers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_greedy_answers_of_a_ragged_batch_are_the_models_own(conforming, engine, prompts, ask, tokenizer):
    answers = [ask(engine, prompt, max_tokens=24, temperature=0.0) for prompt in prompts]
    for prompt, answer in zip(prompts, answers, strict=True):
        conforming.check_greedy(conforming.model, prompt, answer.wait().ids, 24)
        end = -1 if answer.reason == "stop" else None
        assert answer.text == tokenizer.decode(answer.ids[:end])


def test_requests_that_come_while_others_decode_change_nothing(conforming, engine, prompts, ask):
    lengths = [5, 30, 12, 25, 3, 40, 7, 20, 33, 11]
    began, answers = threading.Event(), []
    for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        answers.append(ask(engine, prompt, max_tokens=length, temperature=0.0))
        began.wait(0.01 * (index % 3))
    for prompt, length, answer in zip(prompts, lengths, answers, strict=True):
        conforming.check_greedy(conforming.model, prompt, answer.wait().ids, length)


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.05}, {"top_k": 20, "top_p": 0.5}])
def test_the_same_seed_gives_the_same_answer_alone_and_in_a_crowd(engine, prompts, ask, settings):
    wanted = {"max_tokens": 20, "temperature": 1.3, "seed": 11, **settings}
    alone = ask(engine, prompts[3], **wanted).wait()
    crowd = [
        ask(engine, prompt, **(wanted if index == 3 else {"max_tokens": 30, "temperature": (index % 3) * 0.7}))
        for index, prompt in enumerate(prompts)
    ]
    assert crowd[3].wait().ids == alone.ids
    assert len({tuple(answer.wait().ids) for answer in crowd}) > 1
    other = ask(engine, prompts[3], **{**wanted, "seed": 12}).wait()
    assert other.ids != alone.ids


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63, 2**64 - 1])
def test_any_seed_that_may_be_asked_for_is_one(engine, ask, seed):
    first, second = (ask(engine, [4, 5, 6], max_tokens=12, temperature=1.3, seed=seed, n=1).wait() for _ in range(2))
    assert first.ids == second.ids


def test_without_a_seed_answers_differ(engine, ask):
    answers = [ask(engine, [4, 5, 6], max_tokens=12, temperature=1.5) for _ in range(4)]
    assert len({tuple(answer.wait().ids) for answer in answers}) > 1


def test_n_answers_come_by_index_and_the_first_is_the_only_one_of_n_1(engine, ask, submit):
    wanted = {"max_tokens": 10, "temperature": 1.5, "seed": 8}
    one, many, again = ask(engine, [4, 5, 6], **wanted), Indexed(5), Indexed(5)
    submit(engine, many, [4, 5, 6], n=5, **wanted)
    submit(engine, again, [4, 5, 6], n=5, **wanted)
    assert many.wait()[0] == one.wait().ids
    assert again.wait() == many.wait()
    assert len({tuple(ids) for ids in many.wait()}) > 1


# ── ends ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_stop_strings_never_leak_wherever_they_begin(engine, prompts, ask):
    text = ask(engine, prompts[3], max_tokens=40, temperature=0.0).wait().text
    assert len(text) > 30
    # Strings that begin and end inside tokens: those of three characters from the middle on.
    stops = [text[begin : begin + 3] for begin in range(len(text) // 3, len(text) - 3, 3)]
    answers = [ask(engine, prompts[3], max_tokens=40, temperature=0.0, stop=("never there", stop)) for stop in stops]
    for stop, answer in zip(stops, answers, strict=True):
        assert answer.wait().text == text[: text.index(stop)]
        assert answer.reason == "stop"
        assert not any(stop in delta.text for delta in answer.deltas)


def test_a_stop_token_ends_the_answer_and_has_no_text(engine, prompts, ask, tokenizer):
    whole = ask(engine, prompts[3], max_tokens=12, temperature=0.0).wait()
    at = next(at for at in range(4, 12) if whole.ids[at] not in whole.ids[:at])
    cut = ask(engine, prompts[3], max_tokens=12, temperature=0.0, stop_token_ids=(whole.ids[at], 3)).wait()
    assert (cut.ids, cut.reason) == (whole.ids[: at + 1], "stop")
    assert cut.text == tokenizer.decode(whole.ids[:at])


def test_the_models_end_token_ends_the_answer_and_has_no_text(engine, ask):
    ended = ask(engine, [4, 5], max_tokens=9, temperature=0.0, logit_bias={EOS: 100.0}, logprobs=1).wait()
    assert (ended.ids, ended.text, ended.reason) == ([EOS], "", "stop")
    assert len(ended.scores) == 1


def test_the_length_counts_tokens_and_the_whole_context_can_be_used(engine, ask):
    for length in (1, 2, 7):
        answer = ask(engine, [4, 5], max_tokens=length, temperature=0.0, logit_bias={EOS: -100.0}).wait()
        assert (len(answer.ids), answer.reason) == (length, "length")
    full = ask(engine, [1] * (CONTEXT - 10), max_tokens=10, temperature=0.0, logit_bias={EOS: -100.0}).wait()
    assert (len(full.ids), full.reason) == (10, "length")


# ── scores ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_scores_are_the_models_own_whatever_else_is_asked(conforming, engine, ask):
    prompt = [5, 9, 33, 2, 17]
    wanted = [
        {"temperature": 0.0, "logprobs": 0},
        {"temperature": 0.0, "logprobs": 5, "presence_penalty": 2.0},
        {"temperature": 1.5, "seed": 3, "logprobs": 20, "top_k": 4, "logit_bias": {7: 50}},
        {"temperature": 1.3, "seed": 3, "logprobs": 3, "top_p": 0.7, "repetition_penalty": 1.3},
        {"temperature": 1.0, "seed": 4},
    ]
    answers = [ask(engine, prompt, max_tokens=12, **options) for options in wanted]
    for options, answer in zip(wanted, answers, strict=True):
        scores = answer.wait().scores
        if "logprobs" not in options:
            assert scores == []
            continue
        assert all(len(delta.scores) == len(delta.token_ids) for delta in answer.deltas)
        assert [score.token_id for score in scores] == answer.ids
        log_probs = teacher_forced(conforming.model, prompt + answer.ids)[len(prompt) - 1 :]
        for place, score in enumerate(scores):
            conforming.check_score(score.logprob, log_probs[place, score.token_id])
            best = log_probs[place].topk(options["logprobs"] or 1).values
            assert len(score.top) == options["logprobs"]
            for (token_id, logprob), expected in zip(score.top, best, strict=False):
                conforming.check_score(logprob, expected)
                conforming.check_score(logprob, log_probs[place, token_id])


def test_echo_gives_the_prompt_and_the_scores_that_the_model_gives_it(conforming, engine, ask, tokenizer):
    prompt = tokenizer.encode("the quick brown 😀 bird")
    greedy = {"max_tokens": 4, "temperature": 0.0}
    wordless = ask(engine, prompt, **greedy).wait()
    # The prompt is in the caches of whoever keeps beginnings by now: its scores must be there all the same, twice.
    scored, again = (ask(engine, prompt, **greedy, echo=True, logprobs=2, stop=("quick",)).wait() for _ in range(2))
    alone = ask(engine, prompt, max_tokens=0, echo=True, logprobs=0).wait()
    unscored = ask(engine, prompt, max_tokens=0, echo=True).wait()
    half = ask(engine, tokenizer.encode("a😀")[:-1], max_tokens=0, echo=True).wait()

    # A stop string in the prompt ends nothing.
    assert scored.text == again.text == "the quick brown 😀 bird" + wordless.text
    assert scored.ids == wordless.ids
    log_probs = teacher_forced(conforming.model, prompt)
    for answer in (scored, again, alone):
        scores = answer.deltas[0].prompt_scores
        assert [score.token_id for score in scores] == prompt
        assert (scores[0].logprob, scores[0].top) == (None, ())
        for place in range(1, len(prompt)):
            conforming.check_score(scores[place].logprob, log_probs[place - 1, prompt[place]])
            assert len(scores[place].top) == (0 if answer is alone else 2)
        assert all(not delta.prompt_scores for delta in answer.deltas[1:])
    for answer in (alone, unscored):
        assert (answer.text, answer.ids, answer.reason) == ("the quick brown 😀 bird", [], "length")
    assert half.text == "a�"


# ── how tokens are chosen ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.4},
        {"repetition_penalty": 0.8},
        {"frequency_penalty": 1.7, "presence_penalty": -0.4},
        {"presence_penalty": 2.0, "logit_bias": {5: 4.0, 6: -30.0}},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.9, "presence_penalty": 0.3},
    ],
)
def test_penalties_and_biases_are_those_of_their_formulas(conforming, engine, prompts, ask, options):
    prompt = prompts[3]
    ids = ask(engine, prompt, max_tokens=20, temperature=0.0, **options).wait().ids
    logits = conforming.logits(prompt + ids)[len(prompt) - 1 :]
    for place, token_id in enumerate(ids):
        row = logits[place].clone()
        seen = torch.tensor(sorted({*prompt, *ids[:place]}))
        penalty = options.get("repetition_penalty", 1.0)
        row[seen] = torch.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
        for other, count in Counter(ids[:place]).items():
            row[other] -= count * options.get("frequency_penalty", 0.0) + options.get("presence_penalty", 0.0)
        for other, bias in options.get("logit_bias", {}).items():
            row[other] += bias
        assert float(row.max() - row[token_id]) <= conforming.greedy_nats + 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 4},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"temperature": 0.9, "top_k": 9, "top_p": 0.7},
        {"temperature": 0.8, "top_k": 5, "min_p": 0.1},
    ],
)
def test_tokens_are_drawn_from_those_that_may_be_in_their_shares(conforming, engine, submit, settings):
    prompt = [5, 9, 33]
    temperature = 2.0 * settings.get("temperature", 1.0)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    warpers += [TopKLogitsWarper(settings["top_k"])] if "top_k" in settings else []
    warpers += [TopPLogitsWarper(settings["top_p"])] if "top_p" in settings else []
    warpers += [MinPLogitsWarper(settings["min_p"])] if "min_p" in settings else []
    expected = warpers(torch.zeros(1, 1, dtype=torch.long), conforming.logits(prompt)[-1:].float())[0].softmax(-1)
    assert int((expected > 1e-3).sum()) > 1, "nothing to draw"
    counts = Counter()
    for seed in range(12):
        many = Indexed(32)
        options = {**settings, "temperature": temperature, "seed": 1000 * seed}
        submit(engine, many, prompt, max_tokens=1, n=32, **options)
        counts.update(ids[0] for ids in many.wait())
    found = torch.zeros_like(expected)
    for token_id, count in counts.items():
        found[token_id] = count / counts.total()
    assert float(found[expected == 0].sum()) == 0.0
    # 384 draws: three standard deviations of a share of a half, and the seeds are fixed.
    assert float((found - expected).abs().max()) < 0.077


def test_answers_match_their_grammars_beside_others_that_are_free(conforming, engine, prompts, ask):
    schema, regex = Grammar(kind="json_schema", text=json.dumps(SCHEMA)), Grammar(kind="regex", text=REGEX)
    asked = []
    for index in range(9):
        grammar = (schema, regex, None)[index % 3]
        options = {"temperature": 0.0 if index < 3 else 1.2, "seed": index, "max_tokens": 90}
        asked.append((grammar, ask(engine, [index + 1, 7], grammar=grammar, **options)))
    for grammar, answer in asked:
        text = answer.wait().text
        if grammar is None:
            continue
        assert answer.reason == "stop"
        if grammar is regex:
            assert re.fullmatch(REGEX, text)
            continue
        value = json.loads(text)
        assert list(value) == ["name", "kind", "age"]
        assert len(value["name"]) <= 5 and value["kind"] in SCHEMA["properties"]["kind"]["enum"]
        assert isinstance(value["age"], int) and 0 <= value["age"] <= 99
    whole = ask(engine, [1], max_tokens=50, grammar=Grammar(kind="regex", text="the quick brown fox")).wait()
    # It ends where nothing may follow, without a token for the end.
    assert (whole.text, whole.reason, EOS in whole.ids) == ("the quick brown fox", "stop", False)
    cut = ask(engine, [1], max_tokens=2, temperature=0.0, grammar=schema).wait()
    assert (cut.reason, len(cut.ids)) == ("length", 2)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", "(unclosed"),
        ("json_schema", "{not json"),
        ("json_schema", '{"type": "no such type"}'),
        ("json_schema", "[1]"),
        ("regex", "a{1000}{1000}"),
    ],
)
def test_a_grammar_that_is_none_is_refused_at_submit(engine, submit, kind, text):
    with pytest.raises(BadRequestError) as refused:
        submit(engine, Collected(), [1], grammar=Grammar(kind=kind, text=text))
    assert refused.value.field == "grammar"


# ── adapters ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_mixed_adapters_in_a_batch_answer_as_their_merged_models_do(
    conforming, engine, ask, tokenizer, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("adapters")
    models = {
        None: conforming.model,
        "some": write_adapter(folder / "some", conforming.model, ("v_proj", "up_proj"), rank=3, alpha=6, seed=1),
        "all": write_adapter(folder / "all", conforming.model, LLAMA, rank=8, alpha=4, seed=2, use_rslora=True),
    }
    running = ask(engine, [1, 2], max_tokens=100, temperature=0.0, logit_bias={EOS: -100.0})
    with pytest.raises(BadRequestError, match="adapter of none") as refused:
        ask(engine, [3], adapter="some", max_tokens=2)
    assert refused.value.field == "adapter"
    engine.add_adapter("some", folder / "some")
    engine.add_adapter("all", folder / "all")
    rng = random.Random(4)
    # The same prompt under each name: a reused beginning of another adapter's would show.
    shared = [rng.randrange(1, tokenizer.vocab_size) for _ in range(70)]
    asked = []
    for index in range(12):
        name = (None, "some", "all")[index % 3]
        prompt = shared if index < 6 else [rng.randrange(1, tokenizer.vocab_size) for _ in range(3 * index)]
        asked.append((name, prompt, ask(engine, prompt, adapter=name, max_tokens=12, temperature=0.0)))
    for name, prompt, answer in asked:
        conforming.check_greedy(models[name], prompt, answer.wait().ids, 12)
    assert len({tuple(answer.ids) for _, _, answer in asked[:3]}) == 3
    assert len(running.wait().ids) == 100

    with pytest.raises(ConfigError, match="in use"):
        engine.add_adapter("all", folder / "all")
    (folder / "some" / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UnsafeModelError):
        engine.add_adapter("unsafe", folder / "some")
    write_adapter(folder / "dora", conforming.model, ("v_proj",), rank=2, alpha=2, seed=1, use_dora=True)
    with pytest.raises(ConfigError, match="use_dora"):
        engine.add_adapter("dora", folder / "dora")
    again = ask(engine, shared, adapter="all", max_tokens=12, temperature=0.0).wait()
    assert again.ids == asked[2][2].ids


# ── requests beside one another ───────────────────────────────────────────────────────────────────────────────────────


def test_what_can_never_be_served_is_refused_by_name_and_others_go_on(conforming, engine, ask, submit):
    fine = ask(engine, [1, 2, 3], max_tokens=60, temperature=0.0, name="fine", logit_bias={EOS: -100.0})
    vocabulary = conforming.model.config.vocab_size
    for field, prompt, options in (
        ("max_tokens", [1] * (CONTEXT - 10), {"max_tokens": 11}),
        ("prompt_ids", [1] * (CONTEXT + 40), {"max_tokens": 1}),
        ("prompt_ids", [], {}),
        ("prompt_ids", [-1], {}),
        ("prompt_ids", [vocabulary], {}),
        ("logit_bias", [1], {"logit_bias": {100_000: 1.0}}),
        ("stop_token_ids", [1], {"stop_token_ids": (100_000,)}),
        ("n", [1], {"n": 100}),
        ("id", [1], {"name": "fine"}),
    ):
        with pytest.raises(BadRequestError) as refused:
            submit(engine, Collected(), prompt, **{"max_tokens": 1, **options})
        assert refused.value.field == field
    assert len(fine.wait().ids) == 60


def test_random_traffic_with_cancels_leaves_every_other_answer_right(conforming, engine, ask, tokenizer):
    rng = random.Random(9)
    prompts = [[rng.randrange(1, tokenizer.vocab_size) for _ in range(rng.randrange(1, 60))] for _ in range(50)]
    lengths = [rng.randrange(1, 40) for _ in prompts]
    doomed = {index for index in range(50) if rng.random() < 0.3}
    began, answers = threading.Event(), []
    for index, prompt in enumerate(prompts):
        answers.append(ask(engine, prompt, max_tokens=lengths[index], temperature=0.0, name=f"r{index}"))
        if index % 4 == 3:
            began.wait(rng.random() * 0.02)
            for late in range(index - 3, index + 1):
                if late in doomed:
                    engine.cancel(f"r{late}")
    for index, answer in enumerate(answers):
        ids = answer.wait().ids
        length = len(ids) if answer.reason == "cancelled" else lengths[index]
        conforming.check_greedy(conforming.model, prompts[index], ids, length)
        assert index in doomed or answer.reason != "cancelled"
        assert all(delta.finish_reason is None for delta in answer.deltas[:-1])


def test_cancel_ends_every_answer_of_a_request_and_one_that_is_unknown_nothing(engine, submit):
    many = Indexed(6)
    submit(engine, many, [4, 5, 6], n=6, max_tokens=CONTEXT - 3, logit_bias={EOS: -100.0}, name="many")
    engine.cancel("unknown")
    engine.cancel("many")
    many.wait()
    assert set(many.reasons) == {"cancelled"}
    engine.cancel("many")


def test_a_callback_that_raises_harms_nobody_else(conforming, engine, submit, ask, wait_until):
    def explode(delta):
        raise ValueError("client gone")

    submit(engine, explode, [1, 2], max_tokens=50, temperature=0.0)
    other = ask(engine, [3, 4], max_tokens=20, temperature=0.0)
    conforming.check_greedy(conforming.model, [3, 4], other.wait().ids, 20)
    wait_until(lambda: engine.num_unfinished == 0)


def test_the_engine_may_be_used_from_its_own_callbacks(engine, submit):
    second, third = Collected(), Collected()

    def on_first(delta):
        if delta.finish_reason:
            submit(engine, second, [2], max_tokens=3, seed=0, name="first")
            submit(engine, third, [2], max_tokens=100, logit_bias={EOS: -100.0}, name="third")
            engine.cancel("third")

    submit(engine, Collected(on_first), [1], max_tokens=2, seed=0, name="first")
    assert second.wait().reason in ("length", "stop")
    assert third.wait().reason == "cancelled"


def test_a_full_queue_raises_capacity_error_and_a_cancel_makes_room(conforming, engine, submit):
    let = threading.Event()
    running = Many([Collected(held_until(let)) for _ in range(conforming.num_slots)])
    long = {"max_tokens": CONTEXT - 1, "logit_bias": {EOS: -100.0}}
    for index, each in enumerate(running):
        submit(engine, each, [1], name=f"r{index}", **long)
    running.wait_until_begun(1)
    # Held in a callback, the engine ends nothing.
    waiting = [Collected() for _ in range(conforming.max_queued)]
    for index, answer in enumerate(waiting):
        submit(engine, answer, [1], max_tokens=2, name=f"w{index}")
    refused = 0
    while refused == 0:
        try:
            submit(engine, waiting_too := Collected(), [1], max_tokens=2)
            waiting.append(waiting_too)
            assert len(waiting) <= conforming.max_queued + conforming.num_slots
        except CapacityError:
            refused += 1
    engine.cancel("w0")
    let.set()
    assert waiting[0].wait().reason == "cancelled"
    for index in range(len(running)):
        engine.cancel(f"r{index}")
    assert {each.wait().reason for each in running} == {"cancelled"}
    assert {each.wait().reason for each in waiting[1:]} <= {"length", "stop"}


# ── another release, and the end ──────────────────────────────────────────────────────────────────────────────────────


def test_a_swap_lets_those_in_flight_end_on_the_old_weights(conforming, ask, submit):
    old, other = conforming.start(conforming.model), conforming.make_model(seed=8)
    let = threading.Event()
    prompt, long = [5, 9, 33, 2], {"max_tokens": 400, "temperature": 0.0, "logit_bias": {EOS: -100.0}}
    # Held in a callback, the old one ends nothing while the new one starts.
    held = Many([Collected(held_until(let)) for _ in range(3)])
    for index, each in enumerate(held):
        submit(old, each, [*prompt, index], **long)
    held.wait_until_begun(1)
    new = conforming.start(other)
    first = ask(new, prompt, max_tokens=16, temperature=0.0).wait()
    conforming.check_greedy(other, prompt, first.ids, 16)
    assert [each.reason for each in held if each.deltas] == [None] * sum(bool(each.deltas) for each in held)
    let.set()
    old.close(120.0)
    for index, answer in enumerate(held):
        assert (answer.wait().reason, len(answer.ids)) == ("length", 400)
        conforming.check_greedy(conforming.model, [*prompt, index], answer.ids, 400, bias={EOS: -100.0})
    assert old.num_unfinished == 0
    with pytest.raises(CapacityError):
        ask(old, [1], max_tokens=1)
    with pytest.raises(CapacityError):
        old.add_adapter("late", conforming.folder)

    # Without patience, what is in flight and what waits is cancelled.
    cut = [ask(new, [1], **{**long, "max_tokens": CONTEXT - 1}) for _ in range(conforming.num_slots + 3)]
    new.close(0.0)
    assert {answer.wait().reason for answer in cut} == {"cancelled"}
    new.close(0.0)


def test_an_engine_may_be_closed_from_its_own_callback(conforming, submit):
    engine = conforming.start(conforming.model)
    closing = Collected(lambda delta: engine.close(5.0))
    submit(engine, closing, [1], max_tokens=2, seed=0)
    closing.wait()
    engine.close(60.0)
    assert engine.num_unfinished == 0


def test_a_tokenizer_of_another_model_is_refused(conforming):
    small = conforming.make_model(vocab_size=100)
    with pytest.raises(TokenizerMismatchError, match="at most 100 tokens"):
        conforming.start(small)
