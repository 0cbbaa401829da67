"""Laws of the endpoint with vLLM's engine on Ray Serve: it answers, swaps, is replaced when it dies, and leaves nothing behind.

In an environment with both. The model is compiled, as it is served, so it takes minutes: `make test-serve-vllm`.
"""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import psutil
import pytest
from conformance import make_model

from aifactory.engine.golden import GOLDEN_NAME, golden_answers
from aifactory.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.vllm
PROMPT = "the quick "
TOKENS = 100


@pytest.fixture(scope="session")
def exported(exported, tmp_path_factory):
    """The folder of the model of a seed, whose heads have a size that vLLM's kernels have."""
    root = tmp_path_factory.mktemp("wider")
    tokenizer = load_tokenizer(exported(1))

    def export(seed):
        folder = root / str(seed)
        if not folder.exists():
            model = make_model(tokenizer.vocab_size, seed=seed)
            model.save_pretrained(folder)
            (folder / "tokenizer.json").write_bytes(tokenizer.tokenizer_json)
            (folder / GOLDEN_NAME).write_bytes(golden_answers(model, tokenizer))
        return folder

    return export


@pytest.fixture
def served(ray_session, module_factory, tmp_path):
    """A factory that serves the model of seed 1 on Ray, and a client of it; at its end there is no process of vLLM's."""
    from aifactory.serve.app import start, stop

    factory = module_factory(tmp_path, port=0, poll_s=0.2, engine="vllm", slots=4, drain_timeout_s=60)
    factory.promote(factory.publish(1))
    try:
        url = start(factory.books).url
        yield factory, url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
    finally:
        stop(factory.books.config.name, drain_timeout_s=0.0)
        factory.books.close()


def processes():
    """vLLM's, of all releases."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE and "VLLM::" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def ask(client, **options):
    options = {"model": "alpha", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, **options}
    return client.completions.create(**options)


def test_it_answers_swaps_is_replaced_when_its_process_is_killed_and_ends_with_the_endpoint(served, says, wait_until):
    from aifactory.serve.app import is_running, stop

    factory, url, client = served
    expected = {seed: says(seed, PROMPT, TOKENS) for seed in (1, 2)}
    assert expected[1] != expected[2]
    first = processes()

    # It answers, streams, scores and refuses.
    assert (answer := ask(client)).choices[0].text == expected[1]
    assert answer.model == "alpha-r1"
    assert "".join(chunk.choices[0].text for chunk in ask(client, stream=True) if chunk.choices) == expected[1]
    assert len(ask(client, max_tokens=5, logprobs=2).choices[0].logprobs.token_logprobs) == 5
    with pytest.raises(openai.BadRequestError, match="engine torch") as refused:
        ask(client, temperature=0.001)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="engine torch"):
        client.embeddings.create(model="alpha", input="a")

    # A swap under traffic fails nobody; the process of the old release goes.
    told, answers = threading.Event(), []

    def ask_on():
        while not told.is_set():
            answers.append(ask(client))

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(ask_on) for _ in range(3)]
        try:
            factory.promote(factory.publish(2))
            wait_until(lambda: factory.books.journal.events(event="swapped"), timeout_s=400)
            count = len(answers)
            wait_until(lambda: len(answers) > count + 6, timeout_s=60)
        finally:
            told.set()
        for each in asking:
            each.result()
    assert {(each.model, each.choices[0].text) for each in answers} == {
        ("alpha-r1", expected[1]),
        ("alpha-r2", expected[2]),
    }
    wait_until(lambda: not any(process.is_running() for process in first), timeout_s=60)

    # Killed, it says so; another replica takes its place and answers.
    before = processes()
    (core,) = [process for process in before if "EngineCore" in " ".join(process.cmdline())]
    replica = httpx.get(f"{url}/readyz", timeout=60).json()["replica"]
    begun, replaced, errors = threading.Event(), threading.Event(), []

    def ask_in_spite_of_errors():
        while not replaced.is_set():
            try:
                for chunk in ask(client, stream=True):
                    begun.set()
                    del chunk
            except openai.APIError as error:
                errors.append(error)
                replaced.wait(0.2)

    def is_replaced():
        try:
            ready = httpx.get(f"{url}/readyz", timeout=60)
        except httpx.HTTPError:
            return False
        return ready.status_code == 200 and ready.json()["replica"] != replica

    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask_in_spite_of_errors) for _ in range(8)]
        try:
            assert begun.wait(120)
            os.kill(core.pid, signal.SIGKILL)
            wait_until(is_replaced, timeout_s=400)
        finally:
            replaced.set()
        for each in asking:
            each.result()
    # Those in flight were told in their streams, and those who came before the other replica was there by a status.
    # Who was let in at the very moment is told 429 by the engine itself.
    assert {error.type for error in errors} <= {"server_error", "rate_limit_error"}
    assert {"engine_failed"} <= {error.code for error in errors}
    assert {error.status_code for error in errors if isinstance(error, openai.APIStatusError)} <= {429, 502, 503}
    assert any("ended by the server" in error.message for error in errors)
    assert ask(client).choices[0].text == expected[2]
    wait_until(lambda: not any(process.is_running() for process in before), timeout_s=60)

    # The end leaves nothing.
    assert processes()
    stop("alpha", drain_timeout_s=60.0)
    assert not is_running("alpha")
    wait_until(lambda: not processes(), timeout_s=60)
