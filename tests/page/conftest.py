"""Pages over books that were made, asked without a network."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chromium import chromium  # noqa: F401
from made_books import MadeBooks, whole
from postgres import postgres_server, postgres_url  # noqa: F401
from starlette.testclient import TestClient

from aifactory.page.access import Access
from aifactory.page.server import PageServer


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The folder of such a factory, and the time in it; nobody changes it."""
    folder = tmp_path_factory.mktemp("written")
    found = whole(folder)
    found.books.close()
    return folder, found.clock.now


@pytest.fixture
def made(written: tuple[Path, float], tmp_path: Path) -> Iterator[MadeBooks]:
    """A factory with something in every view."""
    folder, now = written
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    found = MadeBooks(tmp_path)
    found.clock.now = now
    yield found
    found.books.close()


@pytest.fixture
def client() -> Callable[..., TestClient]:
    """The page of some books, on loopback without a key or as `access` has it."""

    def of(made: MadeBooks, access: Access | None = None) -> TestClient:
        app = PageServer(made.books, access or Access(host="127.0.0.1")).app()
        return TestClient(app, base_url="http://127.0.0.1", follow_redirects=False)

    return of


@pytest.fixture
def page(made: MadeBooks, client: Callable[..., TestClient]) -> TestClient:
    """The page of the factory with something in every view."""
    return client(made)
