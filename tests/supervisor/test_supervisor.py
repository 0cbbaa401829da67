"""Laws of the supervisor: what it says of a head that it starts again."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from small_factories import small_config

from aifactory.config import Config
from aifactory.supervisor.supervisor import Supervisor, read_up
from aifactory.supervisor.watch import Notice


class FakeNotices:
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, notice: Notice) -> None:
        self.said.append(f"{notice.event} {notice.part}")

    def audit(self, action: str, detail: Mapping[str, Any]) -> None:
        self.said.append(action)

    def restarted(self, part: str, *, because: str) -> None:
        self.said.append(f"started {part} because {because}")


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    with tempfile.TemporaryDirectory(prefix="up-") as folder:
        made = Supervisor(Config.model_validate(small_config(tmp_path, runtime={"head": {"folder": folder}})))
        yield made
        made._books.close()


def test_what_ends_with_the_head_is_said_to_be_lost_before_it_is_started_again(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    notices = FakeNotices()
    monkeypatch.setattr(supervisor.head, "missing", lambda: ["raylet"])
    monkeypatch.setattr(supervisor.head, "mend", lambda missing, give_up: ["gcs", "raylet"])
    supervisor._watch.look(0.0, {part: {number} for number, part in enumerate(["gcs", "raylet", "replica"], 1)})

    supervisor._keep_head(notices)  # type: ignore[arg-type]

    lost = {f"part_lost {part}" for part in ("gcs", "raylet", "replica")}
    assert set(notices.said[:3]) == lost
    assert notices.said[3:] == ["started gcs because raylet died", "started raylet because raylet died"]


def test_what_dies_alone_takes_nothing_along(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    notices = FakeNotices()
    monkeypatch.setattr(supervisor.head, "missing", lambda: ["gcs"])
    monkeypatch.setattr(supervisor.head, "mend", lambda missing, give_up: ["gcs"])
    supervisor._watch.look(0.0, {part: {number} for number, part in enumerate(["gcs", "raylet"], 1)})

    supervisor._keep_head(notices)  # type: ignore[arg-type]

    assert notices.said == ["started gcs because gcs died"]


@pytest.mark.parametrize("noted", [None, "ours", "another"])
def test_a_head_that_died_is_started_on_its_store_unless_that_knows_what_is_wanted_no_more(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, noted: str | None
) -> None:
    folder = supervisor.head.folder
    (folder / "gcs").mkdir()
    (folder / "head.json").write_text("{}")
    if noted is not None:
        served = supervisor._configured if noted == "ours" else noted
        (folder / "up.json").write_text(json.dumps({"programs": {}, "served": served}))
    kept = []
    monkeypatch.setattr(supervisor.head, "adopt", lambda: False)
    monkeypatch.setattr(supervisor.head, "mend", lambda missing, give_up: kept.append((folder / "gcs").exists()))
    monkeypatch.setattr(supervisor.head, "_ports", {"port": 1})

    supervisor._begin(FakeNotices())  # type: ignore[arg-type]

    assert kept == [noted != "another"]
    assert (folder / "head.json").exists(), "it is found where it was"
    assert read_up(folder)["served"] == supervisor._configured


def test_what_is_taken_over_goes_on_and_is_renewed_when_its_head_dies(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, notices = supervisor.head.folder, FakeNotices()
    (folder / "gcs").mkdir()
    (folder / "up.json").write_text(json.dumps({"programs": {}, "served": "another"}))
    monkeypatch.setattr(supervisor.head, "adopt", lambda: True)
    monkeypatch.setattr(supervisor.head, "missing", lambda: ["raylet"])
    monkeypatch.setattr(supervisor.head, "mend", lambda missing, give_up: ["gcs", "raylet"])
    monkeypatch.setattr(supervisor.head, "_ports", {"port": 1})

    supervisor._begin(notices)  # type: ignore[arg-type]
    assert read_up(folder)["served"] == "another", "whoever comes next must know it too"
    assert (folder / "gcs").exists()
    supervisor._keep_head(notices)  # type: ignore[arg-type]

    assert read_up(folder)["served"] == supervisor._configured
    assert not (folder / "gcs").exists()
