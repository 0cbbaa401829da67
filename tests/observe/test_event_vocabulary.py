"""One vocabulary: whatever the code logs or enters into the journal is in it, and nothing is in it that nobody says."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from aifactory.observe.vocabulary import EVENTS

PACKAGE = Path(__file__).parents[2] / "aifactory"
TREES = {
    file.relative_to(PACKAGE).as_posix(): ast.parse(file.read_text(encoding="utf-8"))
    for file in PACKAGE.rglob("*.py")
    if "migrations" not in file.parts
}
HANDED_ON = {
    "observe/progress.py": "a stage that says how far it is, under its own name",
    "workshop/bench.py": "what its callers name by event=",
    "records/journal.py": "what its callers name, and both ends of a cycle",
    "records/registry.py": "the past tense of an action",
    "supervisor/notices.py": "what a notice of the supervisor is called",
}


def constants() -> dict[str, str]:
    found: dict[str, str] = {}
    for node in (node for tree in TREES.values() for node in tree.body if isinstance(node, ast.Assign)):
        for target in node.targets:
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            for name, value in zip(names, values, strict=False):
                if isinstance(name, ast.Name) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                    found[name.id] = value.value
    return found


CONSTANTS = constants()


def said() -> Iterator[tuple[str, ast.expr]]:
    """What stands for the event where something is logged or entered."""
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if (called.endswith("log_event") and node.args) or (called.endswith("journal.write") and node.args):
                yield file, node.args[0]
            elif (called.endswith("write_within") and len(node.args) > 1) or (
                called == "asyncio.to_thread" and ast.unparse(node.args[0]) == "write"
            ):
                yield file, node.args[1]
            elif called.endswith(".make"):
                yield from ((file, keyword.value) for keyword in node.keywords if keyword.arg == "event")


def names_in(file: str, node: ast.expr) -> set[str]:
    """The events that an expression may be."""
    if isinstance(node, ast.Constant):
        return {node.value}
    if isinstance(node, ast.Name) and node.id in CONSTANTS:
        return {CONSTANTS[node.id]}
    if isinstance(node, ast.Name) and (original := imported(file, node.id)):
        return {CONSTANTS[original]}
    assert file in HANDED_ON, f"{file} says {ast.unparse(node)}: expected the name of an event, or a constant"
    return set()


def imported(file: str, name: str) -> str | None:
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return alias.name
    return None


def test_whatever_is_logged_or_entered_is_in_the_vocabulary() -> None:
    unknown = {(file, name) for file, node in said() for name in names_in(file, node) if name not in EVENTS}
    assert not unknown


def test_nothing_is_in_the_vocabulary_that_nobody_says() -> None:
    found = {name for file, node in said() for name in names_in(file, node)}
    told = ("records/journal.py", "records/registry.py", "supervisor/watch.py", "supervisor/supervisor.py")
    text = "\n".join((PACKAGE / file).read_text() for file in told)
    found |= {name for name in EVENTS if f'"{name}"' in text}
    assert set(EVENTS) - found == set()


def run(code: str, form: str) -> subprocess.CompletedProcess[str]:
    head = "from aifactory.observe.events import *\n"
    environment = {"AIFACTORY_LOG": form, "PATH": "", "PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run(
        [sys.executable, "-c", head + code], capture_output=True, text=True, env=environment, check=False
    )


def test_as_json_each_line_is_an_object_whatever_it_says() -> None:
    code = (
        "log_to_stderr()\n"
        "log_event('trained', rows=3, loss=float('nan'), text='a\\nb', of=object)\n"
        "try: 1 / 0\nexcept ZeroDivisionError: logger.exception('failed request=%s', '/x')\n"
    )
    first, second = (json.loads(line) for line in run(code, "json").stderr.splitlines())
    assert (first["event"], first["level"]) == ("trained", "info")
    assert first["values"] == {"rows": 3, "loss": "nan", "text": "a\nb", "of": "<class 'object'>"}
    assert (second["event"], second["level"]) == ("logged", "error")
    assert second["values"]["text"] == "failed request=/x"
    assert "ZeroDivisionError" in second["error"]


def test_another_form_is_refused_by_name() -> None:
    done = run("log_to_stderr()", "xml")
    assert "expected text or json in the environment variable AIFACTORY_LOG, found 'xml'" in done.stderr
