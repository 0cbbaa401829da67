"""The description of the interface: OpenAPI 3.1 out of the bodies' own types, and a page of it that loads nothing."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic.json_schema import models_json_schema

from aifactory import __version__
from aifactory.serve.wire import ClosedBody

_REF = "#/components/schemas/"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "The field that is wrong."},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}

_KEY = {"type": "http", "scheme": "bearer", "description": "An API key, as `aifactory keys create` prints it."}


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One thing that can be asked."""

    method: str
    path: str
    summary: str
    body: type[ClosedBody] | None = None
    query: type[ClosedBody] | None = None
    scope: str | None = None
    """What an API key must be good for; None: anybody may ask it."""
    status: int = 200
    """Of what it is answered with."""


def describe(operations: Iterable[Operation], *, title: str, needs_key: bool = False) -> dict[str, Any]:
    """The whole interface as OpenAPI 3.1.

    needs_key    whether nothing is answered without an API key, where operations have a scope
    """
    operations = list(operations)
    bodies = dict.fromkeys(operation.body for operation in operations if operation.body is not None)
    _, found = models_json_schema([(body, "validation") for body in bodies], ref_template=_REF + "{model}")
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, needs_key=needs_key)
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": __version__},
        "paths": paths,
        "components": {"schemas": found.get("$defs", {}) | {"Error": _ERROR}, "securitySchemes": {"key": _KEY}},
    }


def _operation(operation: Operation, *, needs_key: bool) -> dict[str, Any]:
    error = {"content": {"application/json": {"schema": {"$ref": _REF + "Error"}}}}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": f"{operation.method.lower()}{operation.path.replace('/', '_').replace('{', '').replace('}', '')}",
        "responses": {
            str(operation.status): {"description": "The answer."},
            "4XX": {"description": "What is wrong with the request."} | error,
            "5XX": {"description": "What is wrong with the server."} | error,
        },
    }
    if operation.scope is not None:
        # OpenAPI 3.1 lets schemes that are no OAuth name roles.
        key = {"key": [operation.scope]}
        described["security"] = [key] if needs_key else [{}, key]
    if operation.body is not None:
        schema = {"$ref": _REF + operation.body.__name__}
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    names = [part[1:-1] for part in operation.path.split("/") if part.startswith("{")]
    parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
    if operation.query is not None:
        fields = operation.query.model_json_schema()["properties"]
        parameters += [{"name": name, "in": "query", "schema": schema} for name, schema in fields.items()]
    if parameters:
        described["parameters"] = parameters
    return described


# ── the page ──────────────────────────────────────────────────────────────────────────────────────────────────────────

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "h2{margin-top:2.5rem;font-size:1.1rem}table{border-collapse:collapse;width:100%}"
    "td{border-top:1px solid #ddd;padding:.3rem .6rem;vertical-align:top}code{font-family:ui-monospace,monospace}"
    "@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}td{border-color:#444}}"
)


def page(description: Mapping[str, Any]) -> str:
    """The description as HTML that needs no other file."""
    schemas = description["components"]["schemas"]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(description['info']['title'])}</title><style>{_STYLE}</style>"
        f"<h1>{html.escape(description['info']['title'])}</h1><p>OpenAPI: <a href=openapi.json>openapi.json</a></p>"
    ]
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>")
            parts.append(f"<p>{html.escape(operation['summary'])}</p>")
            if "requestBody" in operation:
                reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
                parts.append(_table(schemas, reference.removeprefix(_REF), prefix=""))
    return "".join(parts)


def _table(schemas: Mapping[str, Any], name: str, *, prefix: str) -> str:
    return f"<table>{''.join(_rows(schemas, schemas[name], prefix=prefix))}</table>"


def _rows(schemas: Mapping[str, Any], schema: Mapping[str, Any], *, prefix: str) -> list[str]:
    rows = []
    required = schema.get("required", ())
    for field, value in schema.get("properties", {}).items():
        mark = " (required)" if field in required else ""
        text = html.escape(value.get("description", ""))
        kind = html.escape(" or ".join(dict.fromkeys(_kinds(value))))
        rows.append(f"<tr><td><code>{html.escape(prefix + field)}</code>{mark}<td>{kind}<td>{text}</tr>")
        for inner in _references(value):
            rows += _rows(schemas, schemas[inner], prefix=f"{prefix}{field}.")
    return rows


def _kinds(schema: Mapping[str, Any]) -> list[str]:
    members: Sequence[Mapping[str, Any]] = schema.get("anyOf") or schema.get("oneOf") or ()
    if members:
        return [kind for member in members for kind in _kinds(member) if kind != "null"]
    if "enum" in schema:
        return [str(value) for value in schema["enum"]]
    if schema.get("type") == "array":
        return [f"list of {' or '.join(_kinds(schema.get('items', {})))}"]
    return [str(schema.get("type", "object" if "$ref" in schema else "any value"))]


def _references(schema: Mapping[str, Any]) -> list[str]:
    members = [schema, *(schema.get("anyOf") or ())]
    return [member["$ref"].removeprefix(_REF) for member in members if "$ref" in member]
