"""Evidence as a scorecard keeps it: read back for the gate, and as wide as a choice among candidates makes it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from aifactory.config import Evaluate
from aifactory.errors import StorageError
from aifactory.evaluate.comparisons import compared, over_best
from aifactory.evaluate.gate import BatchIntegrity, Comparison, Evidence, OverBest
from aifactory.evaluate.guards import GuardFigures
from aifactory.evaluate.judge import judgement_of
from aifactory.evaluate.lm_eval import LM_EVAL_FILE, lm_eval_figures, lm_eval_of
from aifactory.evaluate.statistics import Interval, ratio_interval
from aifactory.records.artifacts import Scorecard
from aifactory.records.storage import Storage

EXAMPLES_FILE = "examples.parquet"
"""Every task with the bits of each model."""


def evidence_of(figures: Any) -> Evidence:
    """The evidence as a scorecard's record keeps it."""
    fixed = _comparison(figures["holdout"])
    assert fixed is not None
    return Evidence(
        fixed=fixed,
        target=_comparison(figures["target"]),
        parity_error=figures["parity_error"],
        best=_over_best_of(figures.get("best")),
        judge=judgement_of(figures.get("judge")),
        lm_eval=lm_eval_of(figures.get("lm_eval", ())),
        guards=tuple(GuardFigures(**each) for each in figures.get("guards", ())),
        new_batches=tuple(
            BatchIntegrity(batch=each["batch"], prompt_gain=Interval(**each["prompt_gain"]))
            for each in figures.get("new_batches", ())
        ),
    )


def evidence_of_best(storage: Storage, scorecard: Scorecard, recipe: Evaluate, *, of: int) -> Evidence:
    """The evidence for a candidate that was chosen of several by these scores: its intervals as wide as that makes them.

    Read from the scores of the examples; no model runs. A choice among k equals finds the luckiest, so each interval holds
    with 1 - (1 - c) / k (Bonferroni 1936; Dunn 1961, "Multiple Comparisons Among Means", JASA 56): those of all k hold at
    once with c, and no row need be kept from choosing.
    """
    evidence = evidence_of(scorecard.figures)
    if of == 1:
        return evidence
    table = _read_table(storage, scorecard, EXAMPLES_FILE)
    confidence = 1 - (1 - recipe.confidence) / of
    # Ten resamples beyond each end, or there is nothing to read the end from.
    samples = max(recipe.bootstrap_samples, math.ceil(20 / (1 - confidence)))
    wide = recipe.model_copy(update={"confidence": confidence, "bootstrap_samples": samples})
    fixed = compared(table, "holdout", wide)
    assert fixed is not None
    target = None if evidence.target is None else compared(table, "target", wide)
    best = None if evidence.best is None else over_best(table, evidence.best.release, wide)
    judged = evidence.judge
    if judged is not None:
        rows = table.filter(pa.compute.is_valid(table["judge_forward"])).to_pylist()
        preference = ratio_interval(
            [(row["judge_forward"] + row["judge_backward"]) / 2 for row in rows],
            [1.0] * len(rows),
            [row["cluster"] for row in rows],
            confidence=confidence,
            samples=samples,
        )
        judged = replace(judged, preference=preference)
    tasks = evidence.lm_eval
    if tasks:
        by_doc = _read_table(storage, scorecard, LM_EVAL_FILE)
        versions = {each.task: each.version for each in tasks}
        tasks = lm_eval_figures(by_doc, versions, margin=tasks[0].margin, confidence=confidence, samples=samples)
    return replace(evidence, fixed=fixed, target=target, judge=judged, best=best, lm_eval=tasks, num_candidates=of)


def _comparison(values: Any) -> Comparison | None:
    if values is None:
        return None
    intervals = {k: Interval(**v) if isinstance(v, dict) else v for k, v in values.items() if k != "name"}
    return Comparison(name=values["name"], **intervals)


def _over_best_of(values: Any) -> OverBest | None:
    if values is None:
        return None
    exact = None if values["exact"] is None else Interval(**values["exact"])
    return OverBest(release=values["release"], over=Interval(**values["over"]), exact=exact)


def _read_table(storage: Storage, scorecard: Scorecard, name: str) -> pa.Table:
    data = storage.read_bytes(scorecard.kind, scorecard.fingerprint[:16], name)
    if data is None:
        raise StorageError(f"expected {scorecard.uri}/{name}, found no such file; evaluate again in another root.")
    return pq.read_table(pa.BufferReader(data))
