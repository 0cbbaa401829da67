"""In every process that has this folder on its path: each write to the books is a point, with a name, at which it can be killed.

Python imports this module as it starts, also in the processes that Ray starts; it acts where AIFACTORY_CRASH_POINTS names a
folder. There lie:

    plan.json     by the name of a point at how many of its writes the process is killed, or on which sides, one after another
    kills.jsonl   who was killed so far, where, and on which side of the write
    written.jsonl what was written

At the first write of a name the process is killed before the commit, and, when it comes there again, after it; then the second
write of that name has its turn, and so on for as many as the plan has. A kill is SIGKILL, by the process's own id.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = os.environ.get("AIFACTORY_CRASH_POINTS")
_ROLES = {"ServeReplica": "replica", "Evaluator": "evaluator", "turn_begun": "cycle", "TrainWorker": "trainer"}


def _role() -> str:
    """Which part of the loop this process is; Ray calls its processes by what they do."""
    title = Path("/proc/self/cmdline").read_bytes().decode(errors="replace")
    return next((role for name, role in _ROLES.items() if name in title), "driver")


def _meet(name: str, side: str) -> None:
    """Be at a point: note what was written, and die here if it is this point's turn."""
    folder, point = Path(str(FOLDER)), f"{_role()}: {name}"
    with open(folder / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if side == "after":
            _append(folder / "written.jsonl", {"point": point, "pid": os.getpid()})
        plan = json.loads((folder / "plan.json").read_text())
        sides = plan.get(point, [])
        sides = ["before", "after"] * sides if isinstance(sides, int) else sides
        kills = folder / "kills.jsonl"
        lines = kills.read_text().splitlines() if kills.exists() else []
        done = [line["side"] for line in map(json.loads, lines) if line["point"] == point]
        if len(done) < len(sides) and sides[len(done)] == side:
            number = done.count(side) + 1
            _append(kills, {"point": point, "side": side, "number": number, "pid": os.getpid()})
            os.kill(os.getpid(), signal.SIGKILL)


def _append(file: Path, line: dict[str, Any]) -> None:
    with open(file, "a") as stream:
        stream.write(json.dumps(line) + "\n")


def _watch_database(module: ModuleType) -> None:
    import sqlalchemy as sa

    write = module.Database.write

    @contextmanager
    def watched(self: Any, *, serialize: bool = False) -> Iterator[Any]:
        said: list[str] = []

        def note(_: Any, statement: Any, several: Any, values: Any, __: Any) -> None:
            if getattr(statement, "is_dml", False):
                said.append(_of(statement, values or (several[0] if several else {})))

        with write(self, serialize=serialize) as connection:
            sa.event.listen(connection, "before_execute", note)
            yield connection
            name = ", ".join(dict.fromkeys(said))
            if name:
                _meet(name, "before")
        if name:
            _meet(name, "after")

    module.Database.write = watched


def _of(statement: Any, values: Any) -> str:
    """What a statement writes, in words that are the same in every run."""
    values = {**statement.compile().params, **dict(values)}
    verb = statement.__visit_name__
    told = [values.get(name) for name in ("event", "kind", "state") if isinstance(values.get(name), str)]
    kind, slash, _ = str(values.get("subject") or "").partition("/")
    return " ".join([verb, statement.table.name, *told, *([kind] if slash else [])])


def _watch_artifacts(module: ModuleType) -> None:
    publish = module.ArtifactStore.publish

    @functools.wraps(publish)
    def watched(self: Any, noun: Any, record: Any) -> Any:
        if self.find(noun, record.fingerprint) is not None:
            return publish(self, noun, record)
        _meet(f"publish {record.kind}", "before")
        found = publish(self, noun, record)
        _meet(f"publish {record.kind}", "after")
        return found

    module.ArtifactStore.publish = watched


_WATCHED: dict[str, Callable[[ModuleType], None]] = {
    "aifactory.records.database": _watch_database,
    "aifactory.records.artifacts": _watch_artifacts,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules that are watched where Python would, and changes them once they are loaded."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in _WATCHED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def load_and_watch(module: ModuleType) -> None:
            load(module)
            _WATCHED[name](module)

        spec.loader.exec_module = load_and_watch  # type: ignore[method-assign]
        return spec


if FOLDER is not None:
    sys.meta_path.insert(0, _Finder())
