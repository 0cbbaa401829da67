"""Laws of `aifactory down` where there is little to end: it finds the cluster that there is, and waits for none that is not."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_factories import small_config

from aifactory.config import Config
from aifactory.supervisor.down import bring_down, running_cluster


@pytest.fixture
def listening() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def noted(folder: Path, address: str) -> dict[str, str]:
    (folder / "ray").mkdir()
    (folder / "ray" / "ray_current_cluster").write_text(address + "\n")
    return {"RAY_TMPDIR": str(folder)}


def test_the_cluster_that_is_named_goes_before_the_one_that_is_noted(tmp_path: Path, listening: str) -> None:
    environment = noted(tmp_path, listening)

    assert running_cluster(environment) == listening
    assert running_cluster({**environment, "RAY_ADDRESS": "ray://head:10001"}) == "ray://head:10001"


def test_a_note_of_a_cluster_that_is_gone_is_no_cluster(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        gone = f"127.0.0.1:{server.getsockname()[1]}"

    assert running_cluster(noted(tmp_path, gone)) is None
    assert running_cluster({"RAY_TMPDIR": str(tmp_path / "none")}) is None


def test_where_nothing_was_left_behind_nothing_is_ended_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "none"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    head = {"folder": str(Path(tempfile.gettempdir()) / "none-at-all")}
    config = Config.model_validate(small_config(tmp_path, runtime={"head": head}))

    told = bring_down(config)

    assert told.parts == []
    assert told.lines() == ["Nothing was left behind; nothing was ended."]
    assert not (tmp_path / "storage" / "small" / "state.db").exists()
