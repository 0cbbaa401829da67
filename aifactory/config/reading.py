"""Reading a configuration: YAML and dotted overrides into a checked model, and errors with the file and the line."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from aifactory.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)


def read_file(model: type[Model], file: Path, overrides: Sequence[str]) -> Model:
    """The configuration in `file`, with overrides such as `train.max_steps=10`.

    Raises   ConfigError with the file and the line, or the override, that is wrong; it names the nearest valid key.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(file.name, [p.name for p in _siblings(file)], n=1)
        hint = f" Did you mean {file.parent / near[0]}?" if near else ""
        raise ConfigError(f"expected a configuration file, found none at {file}.{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"expected a configuration file in UTF-8 at {file}, found: {error}.") from error
    return read_text(model, text, str(file), overrides)


def read_text(model: type[Model], text: str, origin: str, overrides: Sequence[str]) -> Model:
    """As `read_file`, for a text that came from `origin`."""
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: expected YAML, found: {error}") from error
    if not isinstance(data, dict):
        found = "nothing" if data is None else f"a {type(data).__name__}"
        raise ConfigError(f"{origin}:1: expected a mapping with the key 'name', found {found}; see configs/.")
    if repeated := [f"{origin}:{key.start_mark.line + 1}: {key.value!r}" for key in _repeated_keys(tree)]:
        raise ConfigError(f"expected every key once in its section, found again: {', '.join(repeated)}; delete one.")
    for override in overrides:
        _apply_override(data, override)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        explained = _Explainer(model, tree, origin, overrides)
        raise ConfigError("\n".join(explained.lines(error))) from error


def plain_overrides(values: Mapping[str, Any]) -> list[str]:
    """Overrides in the form of the command line from a mapping of dotted keys, for driver scripts."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]


def _siblings(file: Path) -> Iterator[Path]:
    return file.parent.glob("*.y*ml") if file.parent.is_dir() else iter(())


def _repeated_keys(tree: yaml.Node | None) -> Iterator[yaml.Node]:
    """Keys that stand twice in one mapping; YAML readers keep the last without a word."""
    waiting, seen = [tree], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            names = [key.value for key, _ in node.value]
            yield from (key for at, (key, _) in enumerate(node.value) if key.value in names[:at] and key.value != "<<")
            waiting.extend(value for _, value in node.value)
        elif isinstance(node, yaml.SequenceNode):
            waiting.extend(node.value)


def _apply_override(data: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"--set {override}: expected KEY=VALUE such as train.max_steps=10, found no key or no '='.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: expected a YAML value, found: {error}") from error
    node: Any = data
    *parents, last = dotted.split(".")
    for depth, key in enumerate(parents):
        node = _descend(node, key, parents[:depth], override)
    if isinstance(node, list):
        node[_index(node, last, parents, override)] = value
    else:
        node[last] = value


def _descend(node: Any, key: str, above: Sequence[str], override: str) -> Any:
    at: Any = _index(node, key, above, override) if isinstance(node, list) else key
    found = node[at] if isinstance(node, list) else node.get(key)
    if found is None:
        found = node[at] = {}
    if not isinstance(found, dict | list):
        where = ".".join([*above, key])
        raise ConfigError(f"--set {override}: expected a section at '{where}', found {found!r}; name a key above it.")
    return found


def _index(node: list[Any], key: str, above: Sequence[str], override: str) -> int:
    if not key.isdecimal() or int(key) >= len(node):
        raise ConfigError(
            f"--set {override}: expected a number below {len(node)} after '{'.'.join(above)}.', found {key!r}."
        )
    return int(key)


class _Explainer:
    """Says what is wrong with a configuration in the terms of the file that it came from."""

    def __init__(self, model: type[BaseModel], tree: yaml.Node | None, origin: str, overrides: Sequence[str]) -> None:
        self._model, self._tree, self._origin, self._overrides = model, tree, origin, overrides

    def lines(self, error: ValidationError) -> Iterator[str]:
        """A line for each problem."""
        for problem in error.errors():
            keys, holders, inside = self._resolve(problem["loc"])
            if problem["type"].startswith("union_tag"):
                keys, holders = [*keys, problem["ctx"]["discriminator"].strip("'")], inside
            dotted = ".".join(keys) if keys else "the configuration"
            where = _where(self._tree, keys, self._origin, self._overrides)
            if problem["type"] == "extra_forbidden":
                valid = sorted({key for model in holders for key in model.model_fields})
                near = difflib.get_close_matches(keys[-1], valid, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(valid)}"
                yield f"{where}: unknown key '{dotted}'; {hint}"
            elif problem["type"] == "union_tag_invalid":
                valid, tag = [tag for model in inside for tag in _tags(model)], problem["ctx"]["tag"]
                near = difflib.get_close_matches(tag, valid, n=1, cutoff=0.5)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                yield f"{where}: '{dotted}': expected {' or '.join(map(repr, valid))}, found {tag!r}{hint}"
            elif problem["type"] == "union_tag_not_found":
                valid = [tag for model in inside for tag in _tags(model)]
                yield f"{where}: expected the key '{dotted}', found none; add it: {' or '.join(map(repr, valid))}"
            elif problem["type"] == "missing":
                yield f"{where}: expected the key '{dotted}', found none; add it{_meaning(keys, holders)}"
            elif problem["type"] == "value_error":
                yield f"{where}: '{dotted}': {problem['msg'].removeprefix('Value error, ')}"
            else:
                expected = problem["msg"]
                for pattern, plain in _PLAIN_WORDS:
                    expected = re.sub(pattern, plain, expected)
                found = repr(problem["input"])
                found = found if len(found) <= 120 else found[:117] + "..."
                yield f"{where}: '{dotted}': {expected}, found {found}; change it{_meaning(keys, holders)}"

    def _resolve(self, location: Sequence[int | str]) -> tuple[list[str], list[type[BaseModel]], list[type[BaseModel]]]:
        """A location as keys of the file, the models of which one holds the last key, and those that it may hold.

        Pydantic puts the tag of a discriminated union between the index and the key; no key of the file stands there.
        """
        keys: list[str] = []
        holders: list[type[BaseModel]] = [self._model]
        inside: list[type[BaseModel]] = [self._model]
        for part in location:
            tagged = [model for model in inside if part in _tags(model)]
            if tagged and len(inside) > 1:
                inside = tagged
                continue
            keys.append(str(part))
            if isinstance(part, str):
                holders, inside = (
                    inside,
                    [
                        found
                        for model in inside
                        if part in model.model_fields
                        for found in _models_in(model.model_fields[part].annotation)
                    ],
                )
        return keys, holders, inside


_PLAIN_WORDS = (
    (r"^String should match pattern ", "expected text that matches "),
    (r"^(Input|Tuple|String|Keys) should (be|have) ", "expected "),
    (r"^expected (greater|less) ", r"expected a number \1 "),
    (r"valid dictionary or .*", "section of keys and values"),
    (r"valid tuple", "list"),
    (r" after validation, not \d+$", ""),
)
"""How pydantic's messages read in the form of ours."""

_TAGS = ("step", "kind")
"""The keys by which the members of discriminated unions are told apart."""


def _tags(model: type[BaseModel]) -> tuple[str, ...]:
    """The values of the key that tells this model from the others of its union."""
    for name in _TAGS:
        annotation = model.model_fields[name].annotation if name in model.model_fields else None
        if get_origin(annotation) is Literal:
            return get_args(annotation)
    return ()


def _meaning(keys: Sequence[str], holders: Sequence[type[BaseModel]]) -> str:
    """What the schema says of the last key."""
    name = next((key for key in reversed(keys) if not key.isdecimal()), "")
    fields = (model.model_fields[name] for model in holders if name in model.model_fields)
    text = next((field.description for field in fields if field.description), None)
    return f" ({' '.join(text.split()).rstrip('.')})" if text else ""


def _where(tree: yaml.Node | None, keys: Sequence[str], origin: str, overrides: Sequence[str]) -> str:
    dotted = ".".join(keys)
    for override in reversed(overrides):  # the last one holds
        target = override.partition("=")[0]
        if dotted == target or dotted.startswith(target + ".") or target.startswith(dotted + "."):
            return f"--set {override}"
    node, line = tree, 1
    for key in keys:
        if isinstance(node, yaml.MappingNode):
            pair = next(((k, v) for k, v in node.value if k.value == key), None)
            if pair is None:
                break
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and key.isdecimal() and int(key) < len(node.value):
            node = node.value[int(key)]
            line = node.start_mark.line + 1
    return f"{origin}:{line}"


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
