"""Laws of the documentation: what it shows is so. Commands exist, configurations load, and the reference leaves nothing out."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from aifactory.cli import command_parser
from aifactory.config import Config

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
SMALL: dict[str, Any] = {
    "name": "docs",
    "ingest": {"sources": [{"name": "docs", "kind": "text", "path": "/data/docs"}]},
}


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """Code blocks of a language, by page."""
    for page in PAGES:
        for found in re.finditer(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            yield page.name, found[1]


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference_pages", ROOT / "docs" / "reference_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("page", "text"), list(blocks("yaml")))
def test_every_configuration_that_is_shown_loads(page: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PASSWORD", "secret")
    shown = yaml.safe_load(text.replace(', "..."]', "]"))

    Config.model_validate(merged(SMALL, shown))


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return base | {
        key: merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in changes.items()
    }


def commands() -> list[tuple[str, str]]:
    """Every line of a block, and every piece in backquotes, that begins with the command."""
    found = []
    for page in [*PAGES, ROOT / "README.md"]:
        text = page.read_text(encoding="utf-8")
        lines = [
            line for block in re.findall(r"^```(?:bash)?\n(.*?)^```", text, re.M | re.S) for line in block.splitlines()
        ]
        lines += re.findall(r"`(aifactory [^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
        found += [(page.name, line.strip()) for line in lines if line.strip().startswith("aifactory ")]
    return found


@pytest.mark.parametrize(("page", "line"), commands())
def test_every_command_that_is_shown_is_one(page: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for word in shlex.split(line, comments=True) if word != "…"]
    words = words[: words.index(">")] if ">" in words else words
    parser, known = command_parser(), set[str]()
    for word in words[1:]:
        nested = next((each for each in parser._actions if isinstance(each, argparse._SubParsersAction)), None)
        if nested is None:
            break
        assert word in nested.choices, line
        parser = nested.choices[word]
        known |= {option for action in parser._actions for option in action.option_strings}
    used = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
    assert used <= known, line


def test_the_reference_names_every_verb_and_every_option(reference: ModuleType) -> None:
    pages = reference.pages()

    verbs = next(action for action in command_parser()._actions if action.dest == "verb")
    assert verbs.choices is not None
    for verb, sub in verbs.choices.items():  # type: ignore[attr-defined]
        section = pages["command"].partition(f"## aifactory {verb}\n")[2].partition("\n## ")[0]
        for action in sub._actions:
            for option in action.option_strings:
                assert f"`{option}`" in section or action.dest == "help", (verb, option)
    definitions = Config.model_json_schema()["$defs"]
    for name, definition in definitions.items():
        section = pages["configuration"].partition(f"## {name}\n")[2].partition("\n## ")[0]
        assert all(f"| `{option}` |" in section for option in definition.get("properties", ())), name
    for path in ("/v1/completions", "/v1/feedback", "/healthz"):
        assert path in pages["http"]


def test_every_page_is_in_the_navigation(reference: ModuleType) -> None:
    told = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    named = re.findall(r"[\w./-]+\.md", str(told))

    written = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES}
    assert sorted(named) == sorted(written | {f"reference/{name}.md" for name in reference.pages()})
