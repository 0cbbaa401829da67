"""What vLLM's engine has of its own: what it refuses by name, how it fails, and that a release that was changed is none.

In vLLM's environment alone: `make test-engines`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conformance import CONTEXT, Collected

from aifactory.engine.golden import GOLDEN_NAME, check_golden_engine, golden_answers
from aifactory.engine.protocol import GenerationRequest, Grammar, Sampling
from aifactory.errors import BadRequestError, CapacityError, ConfigError, ParityError

pytestmark = pytest.mark.vllm
EOS = 0


@pytest.mark.parametrize(
    ("field", "sampling"),
    [
        ("temperature", {"temperature": 0.005}),
        ("temperature", {"temperature": 2.1}),
        ("min_p", {"min_p": 0.1, "top_p": 0.9}),
        ("logit_bias", {"repetition_penalty": 1.1, "logit_bias": {3: 1.0}}),
        ("logprobs", {"logprobs": 1, "grammar": Grammar(kind="regex", text="a+")}),
    ],
)
def test_what_vllm_would_compute_otherwise_is_refused_by_name(conforming, submit, field, sampling):
    with pytest.raises(BadRequestError, match="engine torch") as refused:
        submit(conforming.shared, Collected(), [1, 2], **sampling)
    assert refused.value.field == field


def test_embeddings_beginnings_and_a_prompt_of_the_whole_context_are_refused_by_name(conforming, submit):
    with pytest.raises(BadRequestError, match="engine torch") as refused:
        conforming.shared.submit(GenerationRequest(id="e", prompt_ids=(1, 2), pooling="mean"), Collected())
    assert refused.value.field == "pooling"
    begun = GenerationRequest(id="b", prompt_ids=(1, 2), begun=((), (3,)), sampling=Sampling(n=2))
    with pytest.raises(BadRequestError, match=r"found 1 tokens.*engine torch") as refused:
        conforming.shared.submit(begun, Collected())
    assert refused.value.field == "begun"
    with pytest.raises(BadRequestError, match="one more") as refused:
        submit(conforming.shared, Collected(), [1] * CONTEXT, max_tokens=0, echo=True, logprobs=0)
    assert refused.value.field == "prompt_ids"


def test_the_golden_answers_are_the_trainers_and_those_of_changed_weights_are_not(conforming, tokenizer, tmp_path):
    (tmp_path / GOLDEN_NAME).write_bytes(golden_answers(conforming.model, tokenizer))
    assert check_golden_engine(tmp_path, conforming.shared, tokenizer, tolerance=1e-3) <= 1e-3
    golden = json.loads((tmp_path / GOLDEN_NAME).read_bytes())
    golden["answers"][1]["log_probs"][0] -= 0.5
    (tmp_path / GOLDEN_NAME).write_text(json.dumps(golden))
    with pytest.raises(ParityError, match=r"difference of 0\.5"):
        check_golden_engine(tmp_path, conforming.shared, tokenizer, tolerance=1e-3)


def test_more_adapters_or_ranks_than_there_is_room_for_are_refused(conforming, tmp_path):
    from small_adapters import write_adapter

    write_adapter(tmp_path / "wide", conforming.model, ("v_proj",), rank=9, alpha=2, seed=1)
    with pytest.raises(ConfigError, match="rank 8 at most, found 9"):
        conforming.shared.add_adapter("wide", tmp_path / "wide")
    write_adapter(tmp_path / "fits", conforming.model, ("v_proj",), rank=8, alpha=2, seed=1)
    while len(conforming.shared.adapters) < 2:
        conforming.shared.add_adapter(f"fits-{len(conforming.shared.adapters)}", tmp_path / "fits")
    with pytest.raises(ConfigError, match="at most 2 adapters, found one more, 'third'"):
        conforming.shared.add_adapter("third", tmp_path / "fits")
    assert not {"wide", "third"} & conforming.shared.adapters


def test_a_model_that_vllm_can_not_load_is_a_configuration_error(conforming, tokenizer, tmp_path):
    from aifactory.engine.vllm_engine import VllmEngine

    conforming.model.save_pretrained(tmp_path / "model")
    broken = tmp_path / "model" / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match="vLLM can serve"):
        VllmEngine(tmp_path / "model", tokenizer, num_threads=1, eager=True)
    with pytest.raises(ConfigError, match="vLLM for cuda"):
        VllmEngine(shutil.copytree(conforming.folder / "model-0", tmp_path / "m"), tokenizer, device="cuda", eager=True)


def test_the_environment_of_the_process_is_left_as_it_was(conforming):
    assert conforming.shared.failure is None
    assert not {"VLLM_CPU_OMP_THREADS_BIND", "LD_PRELOAD", "VLLM_NO_USAGE_STATS"} & os.environ.keys()


def test_when_vllms_process_is_killed_all_answers_end_with_an_error_and_the_engine_says_so(
    conforming, submit, wait_until
):
    before = set(psutil.Process().children(recursive=True))
    engine = conforming.start(conforming.model)
    own = set(psutil.Process().children(recursive=True)) - before
    long = {"max_tokens": CONTEXT - 1, "logit_bias": {EOS: -100.0}}
    answers = [Collected() for _ in range(6)]
    for answer in answers:
        submit(engine, answer, [1], **long)
    answers[0].begun.wait(60)
    (core,) = [
        process for process in own if "EngineCore" in process.name() or "EngineCore" in " ".join(process.cmdline())
    ]
    core.kill()
    for answer in answers:
        assert answer.wait().reason == "error"
        assert answer.deltas[-1].error
    wait_until(lambda: engine.failure is not None)
    with pytest.raises(CapacityError, match="has ended"):
        submit(engine, Collected(), [1], max_tokens=1)
    assert engine.num_unfinished == 0
    engine.close(5.0)
    # Whoever is told only now is told the same.
    assert engine.failure is not None
    # Nobody of them is left.
    wait_until(lambda: not any(process.is_running() and process.status() != "zombie" for process in own))


PARENT = """
import sys
from pathlib import Path
from aifactory.engine.protocol import GenerationRequest, Sampling
from aifactory.engine.vllm_engine import VllmEngine
from aifactory.text.tokenizer import load_tokenizer
def main():
    folder = Path(sys.argv[1])
    engine = VllmEngine(folder, load_tokenizer(folder), num_threads=1, eager=True)
    engine.submit(GenerationRequest(id="a", prompt_ids=(1,), sampling=Sampling(max_tokens=2)), lambda delta: None)
    print("answers", flush=True)
    sys.stdin.read()
if __name__ == "__main__":
    main()
"""


def test_when_the_process_of_the_engine_is_killed_vllms_end_with_it(conforming, tmp_path, wait_until):
    assert conforming.shared.num_unfinished == 0
    (tmp_path / "parent.py").write_text(PARENT)
    command = [sys.executable, str(tmp_path / "parent.py"), str(conforming.folder / "model-0")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        # What vLLM logs comes before it.
        assert "answers\n" in iter(parent.stdout.readline, "")
        theirs = psutil.Process(parent.pid).children(recursive=True)
        assert len(theirs) >= 2
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 60
    while any(process.is_running() and process.status() != "zombie" for process in theirs):
        if time.monotonic() > deadline:
            left = [process for process in theirs if process.is_running()]
            for process in left:
                process.kill()
            pytest.fail(f"left behind: {left}")
        time.sleep(0.2)


def test_a_release_is_loaded_and_checked_as_the_configuration_has_it(conforming, tokenizer, tmp_path, ask):
    """Compiled, as served; so it takes a minute or more."""
    from aifactory.config.runtime import Endpoint
    from aifactory.engine.vllm_engine import VllmEngine
    from aifactory.serve.engines import load_engine

    conforming.model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.tokenizer_json)
    (tmp_path / GOLDEN_NAME).write_bytes(golden_answers(conforming.model, tokenizer))
    endpoint = Endpoint(engine="vllm", slots=2, max_queued=5, cpus_per_replica=1.0)
    engine, loaded = load_engine(tmp_path, endpoint, tolerance=1e-3)
    try:
        assert isinstance(engine, VllmEngine)
        assert loaded.digest() == tokenizer.digest()
        answers = [ask(engine, [5, 9, 33, index], max_tokens=20, temperature=0.0) for index in range(6)]
        with pytest.raises(BadRequestError) as refused:
            ask(engine, [1], n=6)
        assert refused.value.field == "n"
        for index, answer in enumerate(answers):
            conforming.check_greedy(conforming.model, [5, 9, 33, index], answer.wait().ids, 20)
    finally:
        engine.close(0.0)


def test_a_schema_beyond_a_limit_is_its_requests_fault_and_nobody_elses(conforming, ask):
    def nested(depth):
        schema = {"type": "integer", "minimum": 0, "maximum": 9}
        for _ in range(depth):
            schema = {"type": "object", "properties": {"a": schema}, "required": ["a"], "additionalProperties": False}
        return Grammar(kind="json_schema", text=json.dumps(schema))

    other = ask(conforming.shared, [1, 2], max_tokens=20, temperature=0.0)
    with pytest.raises(BadRequestError, match="recursion limit") as refused:
        ask(conforming.shared, [1], grammar=nested(62))
    assert refused.value.field == "grammar"
    # What vLLM's own limit on nesting refuses is known when it is asked.
    deep = ask(conforming.shared, [1], grammar=nested(61)).wait()
    assert (deep.reason, deep.deltas[-1].fault) == ("error", "grammar")
    fits = ask(conforming.shared, [1], max_tokens=300, grammar=nested(20)).wait()
    assert (fits.reason, fits.text.count("{")) == ("stop", 20)
    conforming.check_greedy(conforming.model, [1, 2], other.wait().ids, 20)
