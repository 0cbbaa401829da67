"""A hook of MkDocs: the pages of the reference, from the command's parser, the configuration's schema and the OpenAPI description."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put the made pages beside those that are written."""
    from mkdocs.structure.files import File

    for name, text in pages().items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def pages() -> dict[str, str]:
    """Markdown by the page's name."""
    from aifactory.cli import command_parser
    from aifactory.config import schema_json

    return {
        "command": command_page(command_parser()),
        "configuration": configuration_page(json.loads(schema_json())),
        "http": http_page(interface()),
    }


def interface() -> dict[str, Any]:
    """What the endpoint says of itself, of a factory that serves nothing."""
    from aifactory.config import Config
    from aifactory.records.books import Books
    from aifactory.serve.gateway import Gateway

    text = "name: docs\ningest: {sources: [{name: docs, kind: text, path: /data}]}\n"
    with tempfile.TemporaryDirectory() as folder:
        config = Config.from_text(text, origin="docs", overrides=[f"runtime.storage={folder}"])
        books = Books(config)
        described = Gateway(books, cast(Any, None), config.serve)._description()
        books.close()
    return described


# ── the command ───────────────────────────────────────────────────────────────────────────────────────────────────────


def command_page(parser: argparse.ArgumentParser) -> str:
    """Every verb with its arguments."""
    lines = ["# The command", "", f"{parser.description} {parser.epilog}", ""]
    (verbs,) = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
    for verb, sub in verbs.choices.items():
        lines += [f"## aifactory {verb}", ""]
        if sub.description:
            lines += [_cell(sub.description.partition(": ")[2] or sub.description), ""]
        rows = [
            (_shown(option), _helped(option))
            for option in sub._actions
            if not isinstance(option, argparse._HelpAction | argparse._SubParsersAction)
        ]
        lines += _table(("argument", "what it is"), rows)
        for option in sub._actions:
            if isinstance(option, argparse._SubParsersAction):
                lines += _table(
                    ("what", "what it does"),
                    [(f"`{each.dest}`", _cell(each.help or "")) for each in option._choices_actions],
                )
    return "\n".join(lines) + "\n"


def _shown(option: argparse.Action) -> str:
    """As it is written; what follows it beside it."""
    takes = str(option.metavar or option.dest.upper()) if option.nargs != 0 and not option.choices else ""
    if not option.option_strings:
        return f"`{option.metavar or option.dest}`"
    return " ".join([", ".join(f"`{each}`" for each in option.option_strings), *([f"`{takes}`"] if takes else [])])


def _helped(option: argparse.Action) -> str:
    text = _cell(option.help or "")
    if option.choices:
        text += f" ({', '.join(f'`{each}`' for each in option.choices)})"
    return text + (" Required." if option.required and option.option_strings else "")


# ── the configuration ─────────────────────────────────────────────────────────────────────────────────────────────────


def configuration_page(schema: Mapping[str, Any]) -> str:
    """Every section with its options, in the order in which the schema reaches them."""
    lines = [
        "# The configuration",
        "",
        "A YAML file. All but `runtime` is the recipe, which bears identity: another value gives other fingerprints. `runtime` never "
        "does. Any option is put over the file by `--set section.option=value`. `aifactory config schema` prints the JSON schema, by "
        "which an editor completes and checks.",
        "",
    ]
    definitions = schema.get("$defs", {})
    lines += _section("The file", schema)
    for name, definition in definitions.items():
        if "properties" in definition:
            lines += _section(name, definition)
    return "\n".join(lines) + "\n"


def _section(name: str, schema: Mapping[str, Any]) -> list[str]:
    lines = [f"## {name}", ""]
    if schema.get("description"):
        lines += [_cell(schema["description"]), ""]
    required = set(schema.get("required", ()))
    rows = []
    for option, told in schema["properties"].items():
        text = _cell(told.get("description", ""))
        rows.append((f"`{option}`", _kind(told), text + (" Required." if option in required else "")))
    return [*lines, *_table(("option", "kind", "what it is"), rows)]


def _kind(told: Mapping[str, Any]) -> str:
    """What a value is, in a few words; a section is a link."""
    if "$ref" in told:
        name = told["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})" if name[:1].isupper() else name
    if "const" in told:
        return f"`{told['const']}`"
    if "enum" in told:
        return ", ".join(f"`{each}`" for each in told["enum"])
    for key in ("anyOf", "oneOf"):
        if key in told:
            return " or ".join(dict.fromkeys(_kind(each) for each in told[key]))
    if told.get("type") == "array":
        inner = told.get("items") or {}
        if told.get("prefixItems"):
            return "[" + ", ".join(_kind(each) for each in told["prefixItems"]) + "]"
        return f"list of {_kind(inner)}" if inner else "list"
    if told.get("type") == "object":
        inner = told.get("additionalProperties")
        return f"mapping to {_kind(inner)}" if isinstance(inner, Mapping) else "mapping"
    return str(told.get("type", "any")).replace("null", "none")


# ── HTTP ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def http_page(description: Mapping[str, Any]) -> str:
    """Every operation, and the bodies that it takes."""
    lines = [
        "# HTTP",
        "",
        "What the inference endpoint answers. The running endpoint says the same at `/docs`, and as OpenAPI 3.1 at `/openapi.json`.",
        "",
    ]
    rows = []
    for path, methods in description["paths"].items():
        for method, told in methods.items():
            rows.append((f"`{method.upper()} {path}`", _cell(told.get("summary", ""))))
    lines += _table(("operation", "what it does"), rows)
    for name, schema in description["components"]["schemas"].items():
        if "properties" in schema:
            lines += _section(name, schema)
    return "\n".join(lines) + "\n"


# ── how ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _table(title: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    return [*("| " + " | ".join(row) + " |" for row in (title, ["---"] * len(title), *rows)), ""]


def _cell(text: str) -> str:
    """Text on one line, in which nothing is taken for markup or for the end of a cell; what is in backquotes stays code."""
    pieces = " ".join(text.split()).split("`")
    if len(pieces) % 2 == 0:  # a backquote that nobody closes
        return _plain("'".join(pieces))
    return "`".join(piece if number % 2 else _plain(piece) for number, piece in enumerate(pieces))


def _plain(text: str) -> str:
    # Markdown would take [text](…) and *text* for markup; the docstrings mean what they say.
    return text.replace("|", "\\|").replace("<", "&lt;").replace("[", "&#91;").replace("*", "\\*").replace("_", "\\_")
