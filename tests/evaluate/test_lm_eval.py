"""Laws of lm-eval's tasks in the scorecard: every example's score is kept, they refuse who is worse, and who lacks lm-eval is told."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from aifactory.cluster.tasks import run_here
from aifactory.config import Evaluate, LmEval, PromoteGate
from aifactory.errors import ConfigError, LmEvalError
from aifactory.evaluate.evidence import evidence_of
from aifactory.evaluate.gate import Comparison, Evidence, Promote, Reject, judge
from aifactory.evaluate.lm_eval import TaskScores, lm_eval_figures, lm_eval_of, lm_eval_table, run_lm_eval
from aifactory.evaluate.pipeline import evaluate_model
from aifactory.evaluate.statistics import Interval

BINARY = Path(__file__).parents[2] / ".peers" / "lm-eval" / "bin" / "python"
needs_lm_eval = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (BINARY.parent.parent / "installed").exists(),
        reason="expected lm-eval in an environment of its own, found none; make test-lm-eval",
    ),
]
TASK = """\
task: endings
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
TASKS = LmEval(tasks={"endings": "acc"})
GOOD = Interval(estimate=-1.0, low=-1.1, high=-0.9, confidence=0.95, num_examples=99, num_clusters=20)
EVIDENCE = Evidence(
    fixed=Comparison(name="holdout", candidate=GOOD, champion=GOOD, over_champion=GOOD, over_unigram=GOOD),
    target=None,
    parity_error=0.0,
)


@pytest.fixture
def task(tmp_path):
    """A task of 40 seeded questions, as lm-eval reads it, in a folder of its own."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    draw = random.Random(7)
    words = ["the", "quick", "brown", "fox", "return", "in", "for"]
    docs = [
        {
            "text": " ".join(draw.choices(words, k=draw.randint(2, 9))),
            "choices": [" ".join(draw.choices(words, k=2)) for _ in range(3)],
            "label": draw.randrange(3),
        }
        for _ in range(40)
    ]
    (folder / "docs.json").write_text("\n".join(json.dumps(doc) for doc in docs))
    (folder / "endings.yaml").write_text(TASK.format(file=folder / "docs.json"))
    return folder


def scores(values, task="endings"):
    by_doc = {i: (f"hash{i}", float(value)) for i, value in enumerate(values)}
    return [TaskScores(task=task, metric="acc", by_doc=by_doc, version="lm-eval 0, task 1")]


def figures(mine, theirs, margin=0.05):
    table = lm_eval_table(scores(mine), None if theirs is None else scores(theirs))
    return lm_eval_figures(table, {"endings": "lm-eval 0, task 1"}, margin=margin, confidence=0.95, samples=400)


def test_without_lm_eval_the_extra_is_named(store, publish_model, make_model):
    """The environment of these tests has none."""
    model = publish_model(1, make_model(1))

    with pytest.raises(ConfigError, match=r"pip install 'aifactory\[lm-eval\]', or name the interpreter"):
        run_lm_eval(store, model, TASKS, None)
    with pytest.raises(
        ConfigError, match=r"expected a Python interpreter in runtime\.lm_eval_python, found /nowhere/py"
    ):
        run_lm_eval(store, model, TASKS, "/nowhere/python")


def test_what_lies_in_the_folder_of_tasks_bears_identity_and_where_it_lies_does_not(tmp_path):
    def recipe(name, text):
        folder = tmp_path / name
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "a.yaml").write_text(text)
        return TASKS.model_copy(update={"include_path": str(folder)}).recipe()

    assert recipe("one", "task: a") == recipe("two", "task: a") != recipe("three", "task: b")
    assert TASKS.model_copy(update={"batch_size": 1}).recipe() == TASKS.recipe()
    assert TASKS.model_copy(update={"limit": 3}).recipe() != TASKS.recipe()
    with pytest.raises(ConfigError, match=r"expected a folder in evaluate\.lm_eval\.include_path"):
        TASKS.model_copy(update={"include_path": str(tmp_path / "none")}).recipe()


def test_a_candidate_that_is_established_to_be_worse_on_a_task_is_refused():
    generator = np.random.default_rng(0)
    theirs = generator.random(300) < 0.7

    def verdict(mine, **options):
        found = figures(mine, theirs, **options)
        assert lm_eval_of(json.loads(json.dumps([asdict(each) for each in found]))) == found
        return judge(replace(EVIDENCE, lm_eval=found), PromoteGate())

    same = verdict(theirs)
    assert isinstance(same, Promote)
    assert any("lm-eval endings: acc of the candidate is 0." in reason for reason in same.reasons)
    worse = np.where(generator.random(300) < 0.25, False, theirs)
    refused = verdict(worse)
    assert isinstance(refused, Reject)
    (reason,) = [each for each in refused.reasons if each.startswith("failed")]
    assert "lm-eval endings" in reason and reason.endswith("must not reach below -0.05")
    assert isinstance(verdict(worse, margin=0.5), Promote)


def test_without_a_release_in_production_a_task_is_shown_and_refuses_nobody():
    (found,) = figures([True, False, True, True], None)

    assert found.over_champion is None and found.candidate.estimate == 0.75
    first = Comparison(name="holdout", candidate=GOOD, over_unigram=GOOD)
    assert isinstance(judge(replace(EVIDENCE, fixed=first, lm_eval=(found,)), PromoteGate()), Promote)


class TestLmEvalItself:
    pytestmark = needs_lm_eval

    @pytest.fixture(autouse=True)
    def offline(self, monkeypatch, tmp_path):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def test_a_candidate_and_the_release_in_production_are_scored_by_example(
        self, store, publish_model, make_model, publish_corpus, tokenizer, task
    ):
        candidate, champion = (publish_model(seed, make_model(seed)) for seed in (1, 2))
        asked = LmEval(tasks={"endings": "acc"}, include_path=str(task), limit=30)
        recipe = Evaluate(prompt_bytes=40, answer_bytes=60, max_tasks=20, bootstrap_samples=200, lm_eval=asked)
        evaluated = evaluate_model(
            candidate=candidate,
            champion=champion,
            sources=publish_corpus(10)[0],
            feedback=(),
            recipe=recipe,
            store=store,
            target=("scorecard", "a"),
            run=run_here,
            lm_eval_python=str(BINARY),
        )

        table = pq.read_table(Path(store.storage.root) / "scorecard" / "a" / "lm_eval.parquet").to_pylist()
        assert [row["doc"] for row in table] == list(range(30))
        docs = [json.loads(line) for line in (task / "docs.json").read_text().splitlines()][:30]
        for column, seed in (("candidate", 1), ("champion", 2)):
            assert [row[column] for row in table] == [
                float(best(make_model(seed), tokenizer, doc) == doc["label"]) for doc in docs
            ]
        (found,) = evaluated.evidence.lm_eval
        assert found.candidate.estimate == pytest.approx(sum(row["candidate"] for row in table) / 30)
        assert found.version.startswith("lm-eval 0.4")
        assert evidence_of(json.loads(json.dumps(evaluated.figures))) == evaluated.evidence

    def test_a_metric_or_a_task_that_is_none_is_named(self, store, publish_model, make_model, task):
        model = publish_model(1, make_model(1))

        def run(**tasks):
            return run_lm_eval(store, model, LmEval(tasks=tasks, include_path=str(task), limit=3), str(BINARY))

        with pytest.raises(LmEvalError, match=r"metric 'f1' from the task 'endings', found acc, acc_norm"):
            run(endings="f1")
        with pytest.raises(LmEvalError, match="nowhere"):
            run(nowhere="acc")


def best(model, tokenizer, doc):
    """Which of the choices has the highest log-likelihood after the text, each with a space before it, as lm-eval asks."""
    likelihoods = []
    for choice in doc["choices"]:
        prompt, whole = tokenizer.encode(doc["text"]), tokenizer.encode(f"{doc['text']} {choice}")
        ids = torch.tensor([whole])
        with torch.inference_mode():
            logs = model(input_ids=ids).logits[0].log_softmax(-1)
        likelihoods.append(sum(float(logs[i - 1, whole[i]]) for i in range(len(prompt), len(whole))))
    return int(np.argmax(likelihoods))
