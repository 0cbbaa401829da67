"""Laws of choosing an engine: what the configuration names is what answers, or the error says what is missing."""

from __future__ import annotations

import asyncio
import sys

import pytest

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
