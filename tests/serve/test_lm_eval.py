"""Laws of lm-eval: by its `local-completions` over our HTTP a task scores what it scores by its `hf` on the same folder."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path

import pytest

from aifactory.serve.releases import Releases

BINARY = Path(__file__).parents[2] / ".peers" / "lm-eval" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not BINARY.exists(), reason="expected lm-eval in an environment of its own, found none; make test-lm-eval"
    ),
]
TOLERANCE_NATS = 1e-3
"""Most that a choice's log-likelihood may differ by: both compute in fp32, in another order."""
TASK = """\
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "a",
    "bird",
    "in",
    "hand",
    "is",
    "worth",
    "two",
    "bush",
    "größe",
    "🙂",
]


@pytest.fixture(scope="module")
def folder(exported):
    """The exported model, with what transformers itself wants to know of its tokenizer, as `tokenize` writes it."""
    folder = exported(1)
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 10**12, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A task of 40 seeded questions with 3 answers each, as lm-eval reads it."""
    root = tmp_path_factory.mktemp("task")
    draw = random.Random(5)

    def words(least, most):
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    docs = [
        {
            "text": words(1, 20),
            "choices": [words(1, length) for length in (1, 3, 8)],
            "label": draw.randrange(3),
        }
        for _ in range(40)
    ]
    file = root / "docs.json"
    file.write_text("\n".join(json.dumps(doc) for doc in docs))
    (root / "words.yaml").write_text(TASK.format(file=file))
    return root


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory, folder, module_factory, module_answering, load):
    factory = module_factory(tmp_path_factory.mktemp("served"))
    factory.promote(factory.publish(1))
    releases = Releases(factory.books, load)
    releases.load_first()
    with module_answering(factory, releases) as one:
        yield one


def score(task, model, arguments, out):
    """Each question's answers with their log-likelihood and whether each is what greedy decoding gives; and the figures."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "home"), "OPENAI_API_KEY": "none"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    command = [str(BINARY), "-m", "lm_eval", "--model", model, "--model_args", arguments, "--tasks", "words"]
    command += ["--include_path", str(task), "--output_path", str(out), "--log_samples", "--device", "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=out)
    assert done.returncode == 0, done.stderr[-4_000:]
    (samples,) = out.rglob("samples_words_*.jsonl")
    (results,) = out.rglob("results_*.json")
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    figures = json.loads(results.read_text())["results"]["words"]
    return [[answer[0] for answer in row["resps"]] for row in rows], figures


def test_a_task_scores_over_http_what_it_scores_on_the_model_itself(endpoint, folder, task, tmp_path):
    for name in ("http", "model"):
        (tmp_path / name).mkdir()
    served = f"model=alpha,base_url={endpoint.url}/v1/completions,tokenizer_backend=huggingface,tokenizer={folder}"
    served += ",tokenized_requests=True,num_concurrent=4,max_length=160,max_retries=1"

    ours, our_figures = score(task, "local-completions", served, tmp_path / "http")
    theirs, their_figures = score(task, "hf", f"pretrained={folder},dtype=float32", tmp_path / "model")

    assert len(ours) == len(theirs) == 40
    pairs = [pair for mine, other in zip(ours, theirs, strict=True) for pair in zip(mine, other, strict=True)]
    furthest = max(abs(float(mine[0]) - float(other[0])) for mine, other in pairs)
    print(f"{len(pairs)} log-likelihoods differ by {furthest:.1e} nats at most")
    assert furthest <= TOLERANCE_NATS
    # They are no constants, and none of them is near another's.
    assert len({round(float(other[0]), 2) for _, other in pairs}) > 60
    assert [str(mine[1]) for mine, _ in pairs] == [str(other[1]) for _, other in pairs]
    for name in ("acc,none", "acc_norm,none"):
        assert our_figures[name] == their_figures[name]
