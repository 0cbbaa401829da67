"""Most of what is kept is made by hand; what learns and forgets is a loop of two cycles that is turned once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kept_books import kept_config, kept_factory
from postgres import postgres_server, postgres_url  # noqa: F401
from turned_loops import copied, turned_folder  # noqa: F401

from aifactory import Config, Factory


@pytest.fixture
def factory(tmp_path: Path) -> Iterator[Factory]:
    """A factory of two releases."""
    made = kept_factory(tmp_path / "f")
    yield made
    made.close()


@pytest.fixture
def again(tmp_path: Path) -> Iterator[Callable[..., Factory]]:
    """Opens the same factory anew, as another process would; on another database if one is named."""
    made: list[Factory] = []

    def opened(url: str | None = None) -> Factory:
        config: Config = kept_config(tmp_path / "f")
        runtime = config.runtime.model_copy(update={"state_url": url})
        made.append(Factory(config.model_copy(update={"runtime": runtime})))
        return made[-1]

    yield opened
    for each in made:
        each.close()
