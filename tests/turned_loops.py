"""A loop of two cycles that is turned once in a process: real stages in this process, real feedback, two releases.

from turned_loops import copied, loop, turned_folder  # in a conftest.py
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from here_loops import here, tiny_config, turned

from aifactory import Config, Factory

_turned: dict[str, Path] = {}


@pytest.fixture(scope="session")
def turned_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a factory that has turned two cycles; nobody changes it. One for all rooms that ask."""
    if "folder" not in _turned:
        folder = tmp_path_factory.mktemp("turned")
        factory = here(tiny_config(folder))
        turned(factory)
        states = [cycle.state for cycle in factory.books.journal.cycles()]
        decisions = [cycle.decision for cycle in factory.books.journal.cycles()]
        factory.close()
        assert states == ["promoted", "promoted"], decisions
        _turned["folder"] = folder
    return _turned["folder"]


@pytest.fixture
def loop(turned_folder: Path) -> Iterator[Factory]:
    """The factory of two cycles, to be read."""
    factory = here(tiny_config(turned_folder))
    yield factory
    factory.close()


@pytest.fixture
def copied(turned_folder: Path, tmp_path: Path) -> Iterator[Callable[..., Factory]]:
    """Makes factories over a copy of it, which a test may change; `sources` of its own lie in the copy too."""
    folder = tmp_path / "copied"
    made: list[Factory] = []

    def copy(change: Callable[[Config], Config] = lambda config: config) -> Factory:
        if not folder.exists():
            shutil.copytree(turned_folder, folder)
        made.append(here(change(tiny_config(folder))))
        return made[-1]

    yield copy
    for factory in made:
        factory.close()
