"""What plans say beside what was measured: `python -m pytest tests/plan/test_plan_errors.py -s` prints the table."""

from __future__ import annotations

import ast
from pathlib import Path

import plan_errors
import published_runs
import pytest

from aifactory.plan import calibration

ROWS = plan_errors.rows()
GROUPS = list(dict.fromkeys(row.group for row in ROWS))


def test_the_table_of_errors_is_printed() -> None:
    lines = plan_errors.lines(ROWS)
    print("", *lines, sep="\n")

    assert sum(line.startswith("  ") for line in lines) == len(ROWS)


@pytest.mark.parametrize("group", GROUPS)
def test_predictions_are_within_the_bound_that_is_told_and_the_bound_is_no_wider_than_it_must_be(group: str) -> None:
    worst = max(abs(row.error) for row in ROWS if row.group == group and not row.is_fitted)

    assert worst <= calibration.BOUNDS[group] <= worst + 0.011


def test_every_group_has_a_bound_and_predictions() -> None:
    assert set(GROUPS) == set(calibration.BOUNDS)
    for group in GROUPS:
        assert any(not row.is_fitted for row in ROWS if row.group == group), group


def test_constants_are_what_the_fit_gives_to_three_digits() -> None:
    now = plan_errors.constants()

    for name, value in plan_errors.fit().items():
        assert now[name] == float(f"{value:.3g}"), name


def test_what_is_fitted_comes_out_as_it_was_measured() -> None:
    fitted = [row for row in ROWS if row.is_fitted and row.group != "published, decoding"]

    assert len(fitted) == 8
    assert all(abs(row.error) < 3e-3 for row in fitted), [(row.name, row.error) for row in fitted]


def test_most_of_what_is_known_was_held_out() -> None:
    assert sum(row.is_fitted for row in ROWS) <= len(ROWS) / 6


def test_every_run_of_the_gpu_benchmarks_is_in_the_table() -> None:
    for file in (plan_errors.ABLATION, plan_errors.TRAINED):
        ended = {name for name, found in plan_errors.result(file)["found"].items() if "failed" not in found}
        for group in ("own, training on one H200", "own, memory on one H200"):
            assert {row.name for row in ROWS if row.group == group and row.source == file} == ended


def test_no_known_run_needs_more_memory_than_a_plan_leaves_room_for() -> None:
    for row in ROWS:
        if row.unit == "GiB":
            assert row.known <= row.planned * calibration.MEMORY_MARGIN, row.name


def test_an_ablation_moves_plans_the_way_it_moved_the_runs() -> None:
    by_name = {row.name: row for row in ROWS if row.source == plan_errors.ABLATION and row.unit == "tokens/s"}
    start = by_name["as meant"]

    for name in (
        "without varlen attention",
        "without compilation",
        "one document a row",
        "half the rows",
        "twice the rows",
    ):
        row = by_name[name]
        assert (row.planned > start.planned) == (row.known > start.known), name


def test_published_runs_are_known_by_source_alone_and_no_code_of_the_planner_reads_them() -> None:
    assert all(run.source for run in published_runs.TRAINING)
    assert len({run.name for run in published_runs.TRAINING}) == len(published_runs.TRAINING)
    for file in (Path(calibration.__file__).parent).glob("*.py"):
        names = {
            node.module
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom)
        }
        assert not names & {"published_runs", "plan_errors"}, file
