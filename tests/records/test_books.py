"""Books: where a factory's state lies, in and out of a Ray job, in this process and in others."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aifactory.config import Config
from aifactory.errors import ConfigError
from aifactory.records.books import Books, state_url
from aifactory.records.storage import Storage

JOB = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
PLACES = """
import json, sys
from aifactory.config import Config
from aifactory.errors import ConfigError
from aifactory.records.books import Books
found = []
for values in json.loads(sys.argv[1]):
    try:
        books = Books(Config.model_validate(values))
        found.append([books.storage.root, books.database.url.render_as_string()])
    except ConfigError as error:
        found.append(str(error))
print(json.dumps(found))
"""


def values(**runtime: Any) -> dict[str, Any]:
    source = {"name": "docs", "kind": "text", "path": "nowhere"}
    return {"name": "small", "ingest": {"sources": [source]}, "runtime": runtime}


def config(**runtime: Any) -> Config:
    return Config.model_validate(values(**runtime))


def places(cwd: Path, environment: dict[str, str], *runtimes: dict[str, str]) -> Any:
    """Storage root and database of factories, or the error, in a process of its own."""
    clean = {name: value for name, value in os.environ.items() if name not in JOB}
    done = subprocess.run(
        [sys.executable, "-c", PLACES, json.dumps([values(**runtime) for runtime in runtimes])],
        cwd=cwd,
        env=clean | {"HOME": str(cwd / "home")} | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return json.loads(done.stdout)


def test_by_default_state_lies_below_the_current_folder_and_a_relative_place_is_made_absolute(tmp_path: Path) -> None:
    default, storage, database = places(tmp_path, {}, {}, {"storage": "here"}, {"state_url": "sqlite:///x.db"})

    here = f"{tmp_path}/.aifactory/small"
    assert default == [here, f"sqlite:///{here}/state.db"]
    assert storage[0] == f"{tmp_path}/here/small"
    assert database == [here, f"sqlite:///{tmp_path}/x.db"]


def test_a_job_keeps_its_state_below_the_home_folder_and_refuses_places_that_would_be_deleted_with_it(
    tmp_path: Path,
) -> None:
    default, storage, database, absolute, home, home_database = places(
        tmp_path,
        JOB,
        {},
        {"storage": "here"},
        {"state_url": "sqlite:///here.db"},
        {"storage": f"{tmp_path}/s"},
        {"storage": "~/s"},
        {"state_url": "sqlite:///~/x.db"},
    )

    below_home = f"{tmp_path}/home/.aifactory/small"
    assert default == [below_home, f"sqlite:///{below_home}/state.db"]
    assert "runtime.storage in a Ray job, found 'here'" in storage
    assert "runtime.state_url in a Ray job, found 'sqlite:///here.db'" in database
    assert absolute[0] == f"{tmp_path}/s/small"
    assert home[0] == f"{tmp_path}/home/s/small"
    assert home_database[1] == f"sqlite:///{tmp_path}/home/x.db"


def test_storage_that_is_no_disk_needs_a_database_by_name() -> None:
    with pytest.raises(ConfigError, match=r"runtime.state_url beside a storage root that is no local path"):
        state_url(config(storage="s3://bucket"), Storage("s3://bucket/small"))
    url = "postgresql+psycopg://me:secret@db/state"
    assert state_url(config(storage="s3://bucket", state_url=url), Storage("s3://bucket/small")) == url


def test_pickled_books_open_the_same_places_from_another_folder_and_ask_as_the_same_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    code = """
import os, pickle, sys
from aifactory.config import Config
from aifactory.records.books import Books
books = Books(Config.model_validate({values}), key_id="key-7")
books.journal.write("asked")
open("../books.pickle", "wb").write(pickle.dumps(books))
""".replace("{values}", repr(values(storage="here")))
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "one", check=True, timeout=60)

    monkeypatch.chdir(tmp_path / "two")
    books = pickle.loads((tmp_path / "books.pickle").read_bytes())

    assert books.storage.root == f"{tmp_path}/one/here/small"
    assert books.database.url.database == f"{tmp_path}/one/here/small/state.db"
    assert [(event.event, event.key_id) for event in books.journal.events()] == [("asked", "key-7")]
    assert books.journal.key_id == "key-7"
    again = pickle.loads(pickle.dumps(books))
    assert again.config == books.config
    assert not list((tmp_path / "two").iterdir())


def test_the_resolved_configuration_gives_the_same_books_again(tmp_path: Path) -> None:
    for runtime in ({"storage": str(tmp_path)}, {"storage": f"file://{tmp_path}"}):
        books = Books(config(**runtime))
        resolved = Books(books.resolved_config())

        assert resolved.storage.root == books.storage.root
        assert resolved.database.url == books.database.url
        assert resolved.resolved_config() == books.resolved_config()


def test_the_password_of_a_database_goes_with_the_books_and_not_into_their_name(tmp_path: Path) -> None:
    url = "postgresql+psycopg://me:secret@db/state"
    books = Books(config(storage=str(tmp_path), state_url=url))

    assert books.resolved_config().runtime.state_url == url
    assert "secret" not in books.database.url.render_as_string()
