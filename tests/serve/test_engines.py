"""Laws of choosing an engine: what the configuration names is what answers, or the error says what is missing."""

from __future__ import annotations

import asyncio
import sys
import threading

import pytest
import torch

from aifactory.config import Config
from aifactory.config.runtime import Endpoint
from aifactory.engine.engine import TorchEngine
from aifactory.engine.protocol import GenerationRequest, Sampling
from aifactory.errors import BadRequestError, ConfigError, ParityError
from aifactory.serve.app import Replica
from aifactory.serve.engines import load_engine


@pytest.fixture
def no_vllm(monkeypatch):
    """As where vLLM is not installed."""
    monkeypatch.setitem(sys.modules, "vllm", None)


def test_the_projects_own_engine_answers_unless_another_is_named(exported):
    assert Endpoint().engine == "torch"
    engine, tokenizer = load_engine(exported(1), Endpoint(slots=2, max_queued=3), tolerance=1e-3)
    try:
        assert isinstance(engine, TorchEngine)
        assert tokenizer.encode("a")
        with pytest.raises(BadRequestError, match="n of at most 3"):
            engine.submit(GenerationRequest(id="a", prompt_ids=(1,), sampling=Sampling(n=4)), print)
    finally:
        engine.close(0.0)
    with pytest.raises(ParityError):
        load_engine(exported(1), Endpoint(), tolerance=-1.0)


@pytest.mark.parametrize(("weights", "read"), [("auto", 4), ("float32", 4), ("bfloat16", 2), ("int8", 1)])
def test_the_engine_reads_weights_as_the_configuration_says(exported, weights, read):
    engine, _ = load_engine(exported(1), Endpoint(slots=2), tolerance=1e-3)
    other, _ = load_engine(exported(1), Endpoint(slots=2, weights=weights), tolerance=1e-3)
    try:
        share = other.weight_bytes / engine.weight_bytes
    finally:
        for each in (engine, other):
            each.close(0.0)
    # int8 has a scale a row beside it.
    assert read / 4 <= share <= read / 4 + (0.1 if weights == "int8" else 0.0)


@pytest.mark.parametrize("options", [{}, {"weights": "int8"}, {"weights": "bfloat16", "mode": "resilient"}], ids=str)
def test_what_was_generated_is_read_to_the_same_bits(exported, options):
    prompt = tuple(3 + 7 * place % 250 for place in range(80))
    scored = Sampling(max_tokens=8, temperature=0.0, logprobs=1)

    def scores_of(begun):
        engine, _ = load_engine(exported(1), Endpoint(slots=2, **options), tolerance=1e-3)
        scores, ended = [], threading.Event()

        def take(delta):
            scores.extend(delta.scores)
            if delta.finish_reason is not None:
                ended.set()

        try:
            request = GenerationRequest(id="a", prompt_ids=prompt, sampling=scored, begun=(begun,) if begun else ())
            engine.submit(request, take)
            assert ended.wait(60)
        finally:
            engine.close(0.0)
        return scores

    whole = scores_of(())
    rest = scores_of(tuple(score.token_id for score in whole[:5]))

    assert [score.token_id for score in rest] == [score.token_id for score in whole[5:]]
    assert rest == whole[5:]


def test_weights_that_an_engine_or_a_device_does_not_have_are_refused():
    with pytest.raises(ValueError, match="weights beside engine: torch alone, found bfloat16"):
        Endpoint(engine="vllm", weights="bfloat16")
    with pytest.raises(ValueError, match="batch_invariant beside engine: torch alone"):
        Endpoint(engine="vllm", batch_invariant=True)
    with pytest.raises(ValueError, match="int8 on a CPU alone"):
        Endpoint(weights="int8", gpus_per_replica=1)


def test_a_model_in_bfloat16_is_near_what_it_was_or_is_refused(exported):
    from aifactory.engine import parity
    from aifactory.engine.load import load_model

    model = parity.in_bfloat16(load_model(exported(1), device="cpu", dtype=torch.float32))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}

    model = load_model(exported(1), device="cpu", dtype=torch.float32)

    def turn(model, _, output):
        output.logits = output.logits if model.dtype == torch.float32 else -output.logits

    model.register_forward_hook(turn)
    with pytest.raises(ParityError, match="weights as bfloat16"):
        parity.in_bfloat16(model)


def test_vllm_that_is_not_installed_is_a_configuration_error_that_says_what_to_install(exported, no_vllm):
    with pytest.raises(ConfigError, match=r"aifactory\[vllm\].*engine to torch"):
        load_engine(exported(1), Endpoint(engine="vllm"), tolerance=1e-3)


def test_a_replica_without_the_engine_that_is_asked_for_blames_no_release(make_small, tmp_path, no_vllm):
    factory = make_small(tmp_path, engine="vllm")
    factory.promote(factory.publish(1))
    with pytest.raises(ConfigError, match=r"aifactory\[vllm\]"):
        Replica(factory.books)
    assert not factory.books.journal.events(event="load_failed")


def test_an_engine_that_is_none_is_refused_by_name():
    text = "name: a\ningest: {sources: [{name: d, kind: text, path: /d}]}\nruntime: {endpoint: {engine: triton}}\n"
    with pytest.raises(ConfigError, match=r"endpoint\.engine"):
        Config.from_text(text, origin="test")


def test_streams_that_are_to_go_on_elsewhere_want_an_engine_that_can():
    with pytest.raises(ValueError, match=r"engine: torch beside mode: resilient, found engine: vllm"):
        Endpoint(engine="vllm", mode="resilient")
    assert Endpoint(engine="vllm").mode == "direct"
    assert Endpoint(mode="resilient").engine == "torch"


def test_a_replica_whose_engine_has_failed_is_not_healthy(factory, monkeypatch):
    factory.promote(factory.publish(1))
    # Its name is Serve's to give.
    monkeypatch.setattr("aifactory.serve.app._replica_name", lambda: "replica-1")
    replica = Replica(factory.books)

    async def ask():
        try:
            await replica.check_health()
        finally:
            replica._follower.cancel()
            replica._batches.cancel()

    asyncio.run(ask())
    monkeypatch.setattr(TorchEngine, "failure", property(lambda engine: "its thread has ended"))
    with pytest.raises(RuntimeError, match="thread has ended"):
        asyncio.run(ask())
