"""Tasks of the lm-eval library on a model, in a process of their own: its scores by example, and how two models compare.

Source   Gao et al., "The Language Model Evaluation Harness", doi:10.5281/zenodo.12608602.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from aifactory.errors import ConfigError, LmEvalError
from aifactory.evaluate.statistics import Interval, ratio_interval
from aifactory.records.artifacts import ArtifactStore, Model

if TYPE_CHECKING:
    from aifactory.config import LmEval

LM_EVAL_FILE = "lm_eval.parquet"
LM_EVAL_SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("metric", pa.string()),
        ("doc", pa.int64()),
        ("doc_hash", pa.string()),
        ("candidate", pa.float64()),
        ("champion", pa.float64()),
    ]
)
"""A row for each example of each task. doc: its number in the task; doc_hash: lm-eval's hash of what it holds."""
_END = 3000


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScores:
    """What a model scores on the examples of one task."""

    task: str
    metric: str
    by_doc: Mapping[int, tuple[str, float]]
    """By number of the example: the hash of what it holds, and the score; higher is better."""
    version: str
    """Of lm-eval, and of the task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LmEvalFigures:
    """A candidate on one task, and beside the release in production where there is one. Higher is better."""

    task: str
    metric: str
    version: str
    candidate: Interval
    over_champion: Interval | None
    margin: float


def run_lm_eval(store: ArtifactStore, model: Model, recipe: LmEval, python: str | None) -> list[TaskScores]:
    """The scores of a model on all tasks.

    python   the interpreter that has lm-eval; none is this one
    Raises   ConfigError where it has none; LmEvalError where it fails, or gives no such metric by example.
    """
    interpreter = sys.executable if python is None else str(Path(python).expanduser().absolute())
    _require(interpreter)
    with tempfile.TemporaryDirectory() as folder:
        command = [interpreter, "-m", "lm_eval", "--model", "hf"]
        command += ["--model_args", f"pretrained={store.fetch(model)},dtype=float32,trust_remote_code=False"]
        command += ["--tasks", ",".join(recipe.tasks), "--output_path", folder, "--log_samples"]
        command += ["--batch_size", str(recipe.batch_size), "--device", _device()]
        if (include := recipe.folder()) is not None:
            command += ["--include_path", str(include)]
        if recipe.limit is not None:
            command += ["--limit", str(recipe.limit)]
        if recipe.num_fewshot is not None:
            command += ["--num_fewshot", str(recipe.num_fewshot)]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=recipe.timeout_s,
                cwd=folder,
                env=_environment(),
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise LmEvalError(
                f"expected lm-eval to end within evaluate.lm_eval.timeout_s = {recipe.timeout_s:g} s, found it at work; allow more "
                "time, or set evaluate.lm_eval.limit."
            ) from error
        if done.returncode:
            raise LmEvalError(
                f"expected lm-eval to score {', '.join(recipe.tasks)}, found that it ended with {done.returncode}: "
                f"{(done.stderr or done.stdout)[-_END:].strip()}"
            )
        return [_scores(Path(folder), task, metric) for task, metric in recipe.tasks.items()]


def lm_eval_table(candidate: Sequence[TaskScores], champion: Sequence[TaskScores] | None) -> pa.Table:
    """Every example with the score of each model."""
    theirs = {scores.task: scores.by_doc for scores in champion or ()}
    rows = [
        {
            "task": scores.task,
            "metric": scores.metric,
            "doc": doc,
            "doc_hash": doc_hash,
            "candidate": value,
            "champion": theirs.get(scores.task, {}).get(doc, (None, None))[1],
        }
        for scores in candidate
        for doc, (doc_hash, value) in sorted(scores.by_doc.items())
    ]
    return pa.Table.from_pylist(rows, schema=LM_EVAL_SCHEMA)


def lm_eval_figures(
    table: pa.Table, versions: Mapping[str, str], *, margin: float, confidence: float, samples: int
) -> tuple[LmEvalFigures, ...]:
    """What the examples of each task say in all; `versions` by task."""
    found = []
    for task in dict.fromkeys(table["task"].to_pylist()):
        rows = [row for row in table.to_pylist() if row["task"] == task]
        ones, docs = [1.0] * len(rows), [str(row["doc"]) for row in rows]
        over = None
        if all(row["champion"] is not None for row in rows):
            differences = [row["candidate"] - row["champion"] for row in rows]
            over = ratio_interval(differences, ones, docs, confidence=confidence, samples=samples)
        found.append(
            LmEvalFigures(
                task=task,
                metric=rows[0]["metric"],
                version=versions[task],
                candidate=ratio_interval(
                    [row["candidate"] for row in rows], ones, docs, confidence=confidence, samples=samples
                ),
                over_champion=over,
                margin=margin,
            )
        )
    return tuple(found)


def lm_eval_of(figures: Sequence[Mapping[str, Any]]) -> tuple[LmEvalFigures, ...]:
    """The figures as a scorecard's record keeps them."""
    return tuple(
        LmEvalFigures(
            **{
                **each,
                "candidate": Interval(**each["candidate"]),
                "over_champion": None if each["over_champion"] is None else Interval(**each["over_champion"]),
            }
        )
        for each in figures
    )


def _require(interpreter: str) -> None:
    """Raise ConfigError where an interpreter has no lm-eval."""
    ask = "import importlib.util, sys; sys.exit(importlib.util.find_spec('lm_eval') is None)"
    try:
        done = subprocess.run([interpreter, "-c", ask], env=_environment(), capture_output=True, check=False)
    except OSError as error:
        raise ConfigError(
            f"expected a Python interpreter in runtime.lm_eval_python, found {interpreter}: {error}; correct the path."
        ) from error
    if done.returncode:
        raise ConfigError(
            f"expected lm-eval in the environment of {interpreter}, which evaluate.lm_eval needs, found none; install it: pip install "
            "'aifactory[lm-eval]', or name the interpreter of an environment that has it in runtime.lm_eval_python."
        )


def _environment() -> dict[str, str]:
    # Another interpreter must not find what this one is given to import, and no hub is asked what it holds of a local folder.
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _scores(folder: Path, task: str, metric: str) -> TaskScores:
    """What lm-eval has written of one task."""
    (results_file, *_) = sorted(folder.rglob("results_*.json"))
    results = json.loads(results_file.read_text(encoding="utf-8"))
    samples = sorted(folder.rglob(f"samples_{task}_[0-9]*.jsonl"))
    lines = samples[-1].read_text(encoding="utf-8").splitlines() if samples else []
    # One line for each filter of the answers; the first filter is the one that lm-eval shows first.
    rows = [json.loads(line) for line in lines]
    first = rows[0].get("filter") if rows else None
    rows = [row for row in rows if row.get("filter") == first]
    by_doc: dict[int, tuple[str, float]] = {}
    for row in rows:
        value = row.get(metric)
        if isinstance(value, bool | int | float):
            by_doc[int(row["doc_id"])] = (str(row.get("doc_hash", "")), float(value))
    if not by_doc:
        given = sorted({name for row in rows for name in row.get("metrics", ())})
        raise LmEvalError(
            f"expected a score by example of the metric {metric!r} from the task {task!r}, found "
            + (f"{', '.join(given)}" if given else "no example, as of a group of tasks")
            + "; correct evaluate.lm_eval.tasks."
        )
    better = results.get("higher_is_better", {}).get(task, {}).get(metric, True)
    sign = 1.0 if better else -1.0
    version = f"lm-eval {results.get('lm_eval_version', '?')}, task {results.get('versions', {}).get(task, '?')}"
    return TaskScores(
        task=task,
        metric=metric,
        by_doc={doc: (doc_hash, sign * value) for doc, (doc_hash, value) in by_doc.items()},
        version=version,
    )
