"""Laws of the list of metrics: everything on it is reported by some stage, shown by some panel, and no file is behind it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from aifactory.observe import metrics as listed
from aifactory.observe.alerts import alerts
from aifactory.observe.command import files
from aifactory.observe.dashboards import rows
from aifactory.observe.metrics import PREFIX, meters
from aifactory.observe.promql import rate

ROOT = Path(__file__).parents[2]
CONSTANTS = {
    name: metric.name for name, metric in vars(listed).items() if getattr(metric, "name", None) in meters.metrics
}


def test_every_metric_is_reported_by_the_code_that_it_measures() -> None:
    code = "\n".join(
        file.read_text()
        for file in (ROOT / "aifactory").rglob("*.py")
        if file.name not in ("dashboards.py", "alerts.py")
    )
    assert set(CONSTANTS.values()) == set(meters.metrics)
    assert not [name for name in CONSTANTS if not re.search(rf"\bmetrics\.{name}\b", code)]


def test_every_metric_is_in_a_panel() -> None:
    asked = "\n".join(query.text for row in rows() for panel in row.panels for query in panel.queries)
    missing = [
        m.name for m in meters.metrics.values() if not any(PREFIX + name + "{" in asked for name in m.exported_names)
    ]
    assert not missing


def test_the_committed_files_are_those_that_are_made() -> None:
    folder = ROOT / "configs" / "observe"
    found = {file.name: file.read_text() for file in folder.iterdir()}
    assert found == files(), "run: aifactory metrics write configs/observe"


def test_panels_do_not_lie_upon_one_another() -> None:
    places = [panel["gridPos"] for panel in json.loads(files()["grafana-dashboard.json"])["panels"]]
    taken: set[tuple[int, int]] = set()
    for place in places:
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24
        taken |= cells


def test_each_alert_has_a_name_of_its_own_and_says_what_to_do() -> None:
    assert len({alert.name for alert in alerts()}) == len(alerts())
    assert all(alert.remedy.endswith(".") and alert.summary for alert in alerts())


def test_a_label_that_a_metric_does_not_have_can_not_be_asked_for() -> None:
    with pytest.raises(ValueError, match="expected labels of aifactory_train_steps_total"):
        rate(listed.TRAIN_STEPS, "release")
    with pytest.raises(ValueError, match="expected labels of aifactory_train_steps_total"):
        rate(listed.TRAIN_STEPS, release="r1")


def test_the_command_writes_the_files_and_lists_the_metrics(tmp_path: Path) -> None:
    def command(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "aifactory", "metrics", *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout

    told = command("write", str(tmp_path / "made" / "here")).splitlines()
    assert {Path(line).name: Path(line).read_text() for line in told} == files()
    names = {each["name"]: each for each in json.loads(command("list", "--json"))}
    assert set(names) == {PREFIX + name for name in meters.metrics}
    assert names["ray_aifactory_serve_requests_total"]["labels"] == ["factory", "route", "status", "release"]
