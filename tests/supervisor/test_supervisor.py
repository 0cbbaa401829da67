"""Laws of the supervisor: what it says of a head that it starts again."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_factories import small_config

from aifactory.config import Config
from aifactory.supervisor.supervisor import Supervisor
from aifactory.supervisor.watch import Notice


class FakeNotices:
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, notice: Notice) -> None:
        self.said.append(f"{notice.event} {notice.part}")

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
