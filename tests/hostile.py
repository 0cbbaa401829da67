"""Hostile requests: what a seed and a number make of valid requests, as bytes on a connection, and a client that sends them.

    Attacks(seed).make(number) ─▶ Attack (parts to write, and when to go away) ─▶ send ─▶ what came back

An attack is a function of seed and number, so one that found something is made again by itself.
"""

from __future__ import annotations

import asyncio
import copy
import gzip
import json
import random
import re
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

LIMIT_S = 120.0
"""Liveness: what has no end by then hangs. Far above what a loaded machine takes."""

Going = Literal["stays", "while sending", "before the answer", "in the answer"]
_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
_TOOL = {"type": "function", "function": {"name": "f"}}
_MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
_CALLS = [
    {"role": "user", "content": [{"type": "text", "text": "how?"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"city": "x"}'}}],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
]

VALID: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [
        {"model": "alpha", "prompt": "the quick ", "max_tokens": 8},
        {"model": "alpha", "prompt": "the lazy ", "max_tokens": 60, "stream": True, "seed": 7},
        {"model": "alpha", "prompt": ["a", "b"], "n": 2, "max_tokens": 4, "logprobs": 3, "echo": True},
        {"model": "alpha", "prompt": [5, 6, 7], "max_tokens": 0, "echo": True, "logprobs": 0},
        {"model": "alpha", "prompt": [[5, 6], [7]], "max_tokens": 3, "stop": ["x"], "stop_token_ids": [9], "user": "u"},
        {"model": "alpha", "prompt": "x", "structured_outputs": {"regex": "[a-c]{2,5}"}, "max_tokens": 9},
        {"model": "alpha", "prompt": "x", "structured_outputs": {"json": _SCHEMA}, "max_tokens": 20, "seed": 1},
        {
            "model": "alpha",
            "prompt": "x",
            "temperature": 0.8,
            "top_p": 0.9,
            "top_k": 20,
            "min_p": 0.05,
            "repetition_penalty": 1.1,
            "frequency_penalty": 0.5,
            "presence_penalty": -0.5,
            "logit_bias": {"9": 5, "10": -100},
            "seed": 3,
            "timeout": 60,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": 12,
        },
    ],
    "/v1/chat/completions": [
        {"model": "alpha", "messages": _MESSAGES, "max_tokens": 8},
        {"model": "alpha", "messages": _MESSAGES, "max_completion_tokens": 60, "stream": True, "temperature": 0},
        {"model": "alpha", "messages": _CALLS, "tools": [_TOOL], "tool_choice": "auto", "max_tokens": 8, "seed": 2},
        {"model": "alpha", "messages": _MESSAGES, "tools": [_TOOL], "stream": True, "n": 2, "max_tokens": 12},
        {"model": "alpha", "messages": _MESSAGES, "logprobs": True, "top_logprobs": 2, "n": 3, "max_tokens": 4},
        {"model": "alpha", "messages": _MESSAGES, "response_format": {"type": "json_object"}, "max_tokens": 9},
        {
            "model": "alpha",
            "messages": _MESSAGES,
            "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": _SCHEMA}},
            "max_tokens": 24,
            "stream": True,
        },
    ],
    "/v1/embeddings": [
        {"model": "alpha", "input": "hello"},
        {"model": "alpha", "input": ["a", "b"], "encoding_format": "base64", "user": "u", "timeout": 60},
        {"model": "alpha", "input": [[5, 6], [7]], "encoding_format": "float"},
    ],
    "/tokenize": [
        {"prompt": "hello", "add_special_tokens": False, "return_token_strs": True},
        {"model": "alpha", "messages": _MESSAGES, "tools": [_TOOL], "add_generation_prompt": True},
    ],
    "/detokenize": [{"model": "alpha", "tokens": [5, 6, 7]}],
    "/v1/feedback": [
        {"completion": "?", "score": 1, "comment": "good"},
        {"completion": "?", "correction": "better", "user": "u", "idempotency_key": "k"},
        {"completion": "?", "preferred": 0, "rejected": 1},
        {"preferred": "?", "rejected": "?"},
    ],
    "/v1/batches": [
        {
            "input_file_id": "file-1",
            "endpoint": "/v1/completions",
            "completion_window": "24h",
            "metadata": {"a": "b"},
        }
    ],
}
"""Bodies that the gateway takes (but for the ids of answers and files)."""
_GETS = ("/healthz", "/readyz", "/openapi.json", "/docs", "/v1/models", "/v1/models/alpha", "/v1/files", "/v1/batches")
_NAMED = ("/v1/files/file-1", "/v1/files/file-1/content", "/v1/batches/batch-1", "/v1/batches/batch-1/cancel")

_NUMBERS: Sequence[Any] = (
    *(
        0,
        -1,
        1,
        2,
        127,
        128,
        129,
        255,
        2**31 - 1,
        2**31,
        2**32,
        2**53 + 1,
        2**63 - 1,
        2**63,
        2**64 - 1,
        2**64,
        -(2**63),
    ),
    *(10**30, -(10**400), 0.0, -0.0, 0.5, 1.5, 1e-8, 1e-40, 1e-46, 5e-324, -5e-324, 1e38, 1e39, 1e308, -1e308),
    *(float("nan"), float("inf"), float("-inf"), 99.999, 100, 100.0001, -2, 2.0, 20, 21, 160, 319, 320, 321),
)
_TEXTS: Sequence[str] = (
    *("", " ", "\0", "a\0b", "\ud800", "x\udfffy", "\ud83d\ude42", "🙂" * 50, "\u2028\u2029\u0085", "\ufeff", "\u202e"),
    *("<|endoftext|>", "<call>", "</call>", '<call>{"name": ', "assistant: ", "e\u0301" * 40, "\x7f\x1b[0m\r\n"),
    *("{{ 7*7 }}", "{% raw %}", "%s%n%d", "'; DROP TABLE completions;--", "../../etc/passwd", "alpha-r1", "\\ud800"),
    *(
        "null",
        "true",
        "NaN",
        "a" * 65,
        "a" * 257,
        "a" * 1025,
        "word " * 300,
        "\ue000\ue001",
        "\n" * 200,
        "٣",
        "data: x\n\n",
    ),
)
_EXPRESSIONS: Sequence[str] = (
    *(
        "(",
        ")",
        "[",
        "a{1000}{1000}",
        "(a*)*b",
        "(a|aa)+$",
        "^a$",
        "(?i)x",
        "\\b",
        "\\d{0,100000}",
        "a{99999}",
        "",
        ".*",
    ),
    *(
        "(?=a)b",
        "(" * 200 + ")" * 200,
        "(" * 3000,
        "[^\\x00-\\x{10FFFF}]",
        "a&~a",
        "\\p{L}+",
        "\\1",
        "(?P<n>a)",
        "x|" * 500,
    ),
    *("(.*a){12}", "(a?){60}a{60}", "[\\d-x]", "\\u{110000}", "(?x) # y"),
)
_SCHEMAS: Sequence[Any] = (
    {},
    {"type": "nonsense"},
    {"type": []},
    {"type": "string", "minLength": 5, "maxLength": 2},
    {"type": "string", "maxLength": 10**9},
    {"type": "string", "pattern": "(a*)*b{5000}"},
    {"type": "integer", "minimum": 5, "maximum": 1},
    {"type": "number", "multipleOf": 0},
    {"type": "number", "minimum": 1e308, "exclusiveMaximum": float("inf")},
    {"type": "array", "minItems": 10**6},
    {"type": "array", "uniqueItems": True, "items": {"enum": list(range(2000))}},
    {"enum": []},
    {"const": None},
    {"$ref": "#"},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    {"$ref": "http://127.0.0.1:9/schema.json"},
    {"$ref": "file:///etc/passwd"},
    {"$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"},
    {"not": {}},
    {"allOf": [{"type": "string"}, {"type": "integer"}]},
    {"anyOf": [{"type": "object", "properties": {f"p{i}": {}}} for i in range(200)]},
    {"oneOf": [{}, {}]},
    {"patternProperties": {"(": {}}},
    {"properties": {"\ud800": {}}},
    {"properties": {"a" * 5000: {"type": "integer"}}},
    {"if": {}, "then": False, "else": True},
    {"format": "date-time", "type": "string"},
    {"x-guidance": {"item_separator": "(", "lenient": True}},
    True,
)
_SERVED = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
"""Methods that reach the gateway; the server itself answers others, and paths that are not in ASCII, by closing."""
_DEPTHS = (30, 31, 200, 301, 500, 801, 900, 931, 950, 961, 970, 981, 990)
_WORDS = (
    "stream",
    "n",
    "best_of",
    "echo",
    "logprobs",
    "prompt",
    "messages",
    "tools",
    "stop",
    "seed",
    "user",
    "timeout",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """One hostile request."""

    number: int
    kind: str
    """What was done to a valid request."""
    parts: Sequence[bytes]
    """What is written, with a turn of the loop between two."""
    going: Going = "stays"
    """When the client goes away."""
    most: int = 0
    """How many bytes of the answer it waits for, if it goes in the answer."""
    resets: bool = False
    """It goes by a reset of the connection."""
    is_whole: bool = True
    """It is a whole HTTP request, which has a right to an answer."""


class Attacks:
    """The attacks of a seed."""

    def __init__(self, seed: int, *, answers: Sequence[str] = (), files: Sequence[str] = ()) -> None:
        """answers, files: ids that are known, which requests may name."""
        self.seed = seed
        self._answers = list(answers) or ["cmpl-0"]
        self._files = list(files) or ["file-1"]

    def make(self, number: int) -> Attack:
        """The attack of this number."""
        draw = random.Random(f"{self.seed}:{number}")
        kinds: Sequence[tuple[int, Callable[[random.Random], dict[str, Any]]]] = (
            (40, self._values),
            (20, self._plain),
            (10, self._text),
            (8, self._encoding),
            (10, self._headers),
            (8, self._targets),
            (7, self._framing),
            (7, self._form),
        )
        (make,) = draw.choices([kind for _, kind in kinds], [weight for weight, _ in kinds])
        made = make(draw)
        request = made.pop("request")
        parts = made.pop("parts", None) or _cut(draw, request)
        if made.get("is_whole", True) and draw.random() < 0.25:
            made |= self._departure(draw, parts)
        return Attack(number=number, kind=make.__name__.strip("_"), **{"parts": parts} | made)

    # ── kinds ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _values(self, draw: random.Random) -> dict[str, Any]:
        """A body with values that are wrong, odd or at the limit."""
        path, body = self._body(draw)
        for _ in range(draw.choice((1, 1, 1, 2, 4))):
            body = self._mutate(draw, body)
        return {"request": _post(path, _dump(body))}

    def _plain(self, draw: random.Random) -> dict[str, Any]:
        """A valid request: the engine is to be at work."""
        path, body = self._body(draw)
        return {"request": _post(path, _dump(body))}

    def _text(self, draw: random.Random) -> dict[str, Any]:
        """A body that is hardly JSON."""
        path, body = self._body(draw)
        data = bytearray(_dump(body))
        for _ in range(draw.choice((1, 1, 2, 8))):
            at = draw.randrange(len(data) + 1)
            how = draw.randrange(8)
            if how == 0:
                del data[at:]
            elif how == 1:
                del data[at : at + draw.randrange(1, 6)]
            elif how == 2:
                data[at:at] = draw.randbytes(draw.randrange(1, 5))
            elif how == 3:
                data[at:at] = draw.choice(
                    (b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\\u", b"\0", b"/*x*/", b"NaN")
                )
            elif how == 4 and data:
                data[min(at, len(data) - 1)] = draw.randrange(256)
            elif how == 5:
                data[at:at] = data[: draw.randrange(len(data) + 1)]
            elif how == 6:
                data[at:at] = draw.choice((b"[", b'{"a":', b'"', b" ", b"9", b"\\ud800")) * draw.choice((20, 990, 3000))
            else:
                # Twice the same name; the later one counts.
                data[1:1] = b'"model": %s, ' % _dump(draw.choice((*_TEXTS, *_NUMBERS)))
            data = data or bytearray(b" ")
        return {"request": _post(path, bytes(data))}

    def _encoding(self, draw: random.Random) -> dict[str, Any]:
        """A body in another encoding, or said to be in one."""
        path, body = self._body(draw)
        text = json.dumps(body, ensure_ascii=False)
        name = draw.choice(("utf-16", "utf-16-be", "utf-32", "utf-8-sig", "latin-1", "utf-7", "cp037", "gzip", "utf-8"))
        if name == "gzip":
            return {"request": _post(path, gzip.compress(text.encode()), b"Content-Encoding: gzip")}
        said = draw.choice((name, "utf-8", "nonsense", '"', "utf-8; charset=utf-16")).encode()
        kind = draw.choice((b"application/json", b"text/plain", b"application/x-www-form-urlencoded", b"", b"\xff"))
        data = text.encode(name, "replace")
        return {"request": _post(path, data, kind=kind + b"; charset=" + said)}

    def _headers(self, draw: random.Random) -> dict[str, Any]:
        """Headers that are odd, many or large."""
        path, body = self._body(draw)
        odd = (
            b"",
            b"\xff\xfe",
            b"a" * 300,
            b"a" * 9_000,
            b"a" * 70_000,
            b'"',
            b"0",
            b"-1",
            b"nan",
            b"inf",
            b"1e999",
            b"5",
        )
        lines = []
        for _ in range(draw.choice((1, 1, 2, 5))):
            name = draw.choice(
                (
                    *(
                        b"Authorization",
                        b"X-Request-Timeout",
                        b"Idempotency-Key",
                        b"Accept",
                        b"Accept-Encoding",
                        b"Origin",
                    ),
                    *(b"Content-Type", b"Cookie", b"Expect", b"Upgrade", b"X-Forwarded-For", b"Range", b"Host", b"TE"),
                    *(
                        b"Transfer-Encoding",
                        b"OpenAI-Organization",
                        b"x" * 200,
                        b"bad name",
                        b"",
                        b"\xc3\xa4",
                        b"Trailer",
                    ),
                )
            )
            lines.append(
                name + b": " + draw.choice((*odd, b"100-continue", b"websocket", b"Bearer x", b"chunked", b"*/*"))
            )
        lines += [b"X-%d: y" % number for number in range(draw.choice((0, 0, 0, 90, 2_000)))]
        draw.shuffle(lines)
        return {"request": _post(path, _dump(body), *lines), "is_whole": False}

    def _targets(self, draw: random.Random) -> dict[str, Any]:
        """Methods and paths of all kinds."""
        path = draw.choice((*VALID, *_GETS, *_NAMED, "/", "*", "http://other/v1/models"))
        for _ in range(draw.choice((0, 0, 1, 1, 2))):
            at = draw.randrange(len(path) + 1)
            path = path[:at] + draw.choice(_PIECES) + path[at:]
        path = path.replace("file-1", draw.choice(self._files)).replace(" ", "%20")
        method = draw.choice(
            ("GET", "GET", "POST", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "Q", "get")
        )
        if method == "DELETE" and draw.random() < 0.9:
            method = "GET"
        data = b"" if method in ("GET", "HEAD") else _dump(self._body(draw)[1])
        return {
            "request": _post(path, data, method=method),
            "is_whole": path[:1] == "/" and path.isascii() and method in _SERVED,
        }

    def _framing(self, draw: random.Random) -> dict[str, Any]:
        """What HTTP itself says of the body is wrong, or is no HTTP."""
        path, body = self._body(draw)
        data = _dump(body)
        head = b"POST %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n" % path.encode()
        how = draw.randrange(10)
        if how == 0:  # more is promised than comes: the client goes
            return {
                "request": head + b"Content-Length: %d\r\n\r\n" % (len(data) + draw.choice((1, 50_000))) + data,
                "going": "while sending",
                "is_whole": False,
            }
        if how == 1:  # less is promised than comes
            return {"request": head + b"Content-Length: %d\r\n\r\n" % (len(data) // 2) + data, "is_whole": False}
        if how in (2, 3):
            pieces, left = [], data
            while left:
                size = draw.randrange(1, len(left) + 1)
                pieces.append(b"%x\r\n%s\r\n" % (size, left[:size]))
                left = left[size:]
            end = (
                b"0\r\n\r\n"
                if how == 2
                else draw.choice((b"0\r\nX: y\r\n\r\n", b"-1\r\n", b"zz\r\n", b"ffffffffffffffff\r\n"))
            )
            parts = [head + b"Transfer-Encoding: chunked\r\n\r\n", *pieces, end]
            return {
                "request": b"",
                "parts": parts,
                "is_whole": how == 2,
                "going": "stays" if how == 2 else "while sending",
            }
        if how == 4:
            both = b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n"
            return {"request": head + both + data, "is_whole": False, "going": "while sending"}
        if how == 5:
            length = draw.choice((b"-1", b"x", b"1e3", b"99999999999999999999", b"5, 5", b""))
            return {
                "request": head + b"Content-Length: " + length + b"\r\n\r\n" + data,
                "is_whole": False,
                "going": "while sending",
            }
        if how == 6:  # two at once on one connection
            first = _post(path, data).replace(b"Connection: close\r\n", b"", 1)
            return {"request": first + _post(*reversed((_dump(self._body(draw)[1]), path)))}
        if how == 7:
            garbage = draw.choice(
                (
                    b"\x16\x03\x01\x02\x00",
                    b"GET /\r\n\r\n",
                    b"\r\n" * 50,
                    draw.randbytes(200),
                    b"PRI * HTTP/2.0\r\n\r\n",
                )
            )
            return {"request": garbage, "is_whole": False, "going": "while sending"}
        if how == 8:  # a body above the limit
            large = {**body, "user": "x" * draw.choice((20_000, 300_000, 2_000_000))}
            return {"request": _post(path, _dump(large)), "is_whole": False}
        return {
            "request": _post(path, data).replace(b"HTTP/1.1", draw.choice((b"HTTP/1.0", b"HTTP/0.9", b"HTTP/9.9"))),
            "is_whole": False,
        }

    def _form(self, draw: random.Random) -> dict[str, Any]:
        """An uploaded file, as it should be or not."""
        fields = [
            [b'form-data; name="purpose"', draw.choice((b"batch", b"batch", b"batch", b"fine-tune", b"", b"\xff\0"))],
            [b'form-data; name="file"; filename="a.jsonl"', draw.choice((b"{}", b"", b"\0" * 5_000, b"x" * 30_000))],
        ]
        for _ in range(draw.choice((0, 0, 1, 2))):
            field = draw.choice(fields)
            how = draw.randrange(6)
            if how == 0:
                field[0] = draw.choice(
                    (
                        b"",
                        b"form-data",
                        b"attachment; name=",
                        b'form-data; name="\xff"',
                        b'form-data; name="file"; filename="\xff\0\r"',
                        b'form-data; name="file"; filename=""',
                        b"form-data; name*=utf-8''file",
                    )
                )
            elif how == 1:
                fields.append(list(field))
            elif how == 2 and len(fields) > 1:
                fields.remove(field)
            elif how == 3:
                fields += [[b'form-data; name="x%d"' % number, b"y"] for number in range(draw.choice((1, 5, 50)))]
            elif how == 4:
                field[1] = draw.randbytes(draw.choice((1, 1_000)))
            else:
                field[1] = b"\r\n--limit\r\n" + field[1]
        data = b"".join(b"--limit\r\nContent-Disposition: %s\r\n\r\n%s\r\n" % tuple(field) for field in fields)
        data += draw.choice(
            (b"--limit--\r\n", b"--limit--\r\n", b"--limit--", b"", b"--limit", b"--limit\r\n--limit--")
        )
        kinds = (b"multipart/form-data; boundary=limit",) * 6
        odd = (
            b"multipart/form-data",
            b"multipart/form-data; boundary=",
            b"multipart/form-data; boundary=" + b"a" * 9_000,
        )
        more = (
            b"multipart/mixed; boundary=limit",
            b"application/json",
            b"multipart/form-data; charset=rot13; boundary=limit",
        )
        kind = draw.choice((*kinds, *odd, *more, b"", b"\xff; boundary=\xff"))
        return {"request": _post("/v1/files", data, kind=kind)}

    def _departure(self, draw: random.Random, parts: Sequence[bytes]) -> dict[str, Any]:
        going: Going = draw.choice(("while sending", "before the answer", "in the answer", "in the answer"))
        made: dict[str, Any] = {
            "going": going,
            "resets": draw.random() < 0.5,
            "most": draw.choice((1, 200, 600, 2_000)),
        }
        if going == "while sending":
            data = b"".join(parts)
            made |= {"parts": [data[: draw.randrange(len(data))]], "is_whole": False}
        return made

    # ── bodies ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _body(self, draw: random.Random) -> tuple[str, dict[str, Any]]:
        path = draw.choices(list(VALID), [8, 8, 2, 2, 1, 3, 1])[0]
        body = copy.deepcopy(draw.choice(VALID[path]))
        for name, value in body.items():
            if value == "?":
                body[name] = draw.choice(self._answers)
        if "input_file_id" in body:
            body["input_file_id"] = draw.choice(self._files)
        if draw.random() < 0.2:
            body |= draw.choice(({"stream": True}, {"temperature": 0}, {"timeout": 0.01}, {"n": 3}, {"user": "u2"}))
        return path, body

    def _mutate(self, draw: random.Random, body: Any) -> Any:
        places = list(_places(body))
        how = draw.randrange(12)
        if not places or how == 0:
            return {**body, draw.choice((*_WORDS, *_TEXTS)): self._value(draw)} if isinstance(body, dict) else [body]
        holder, key = draw.choice(places)
        value = holder[key]
        if how <= 5:
            holder[key] = self._value(draw, near=str(key))
        elif how == 6:
            del holder[key]
        elif how == 7 and isinstance(holder, dict):
            holder[draw.choice((f"{key}s", str(key).upper(), f" {key}", *_WORDS))] = holder.pop(key)
        elif how == 8:
            holder[key] = draw.choice(([value], {"a": value}, [[value]], *(f"@deep {depth}@" for depth in _DEPTHS)))
        elif how == 9 and isinstance(value, list):
            holder[key] = value * draw.choice((0, 2, 20, 65, 128, 129, 500))
        elif how == 9 and isinstance(value, str):
            holder[key] = value * draw.choice((0, 2, 50, 300))
        elif how == 10 and isinstance(value, str):
            at = draw.randrange(len(value) + 1)
            holder[key] = value[:at] + draw.choice(_TEXTS) + value[at:]
        elif how == 10 and isinstance(value, int | float):
            holder[key] = draw.choice((-value, value + 1, value * 10, value % 1_000 + 0.5, str(value), bool(value)))
        else:
            other = draw.choice(VALID[draw.choice(list(VALID))])
            body |= {name: copy.deepcopy(other[name]) for name in draw.sample(list(other), draw.randint(1, len(other)))}
        return body

    def _value(self, draw: random.Random, *, near: str = "") -> Any:
        if near == "regex" or draw.random() < 0.05:
            return draw.choice(_EXPRESSIONS)
        if near in ("json", "schema", "parameters") or draw.random() < 0.05:
            return copy.deepcopy(draw.choice(_SCHEMAS))
        how = draw.randrange(8)
        if how <= 2:
            return draw.choice(_NUMBERS)
        if how <= 4:
            return draw.choice(_TEXTS)
        if how == 5:
            return draw.choice((None, True, False, [], {}, [[]], [{}], [None], {"": None}, {"a": {"b": []}}))
        if how == 6:
            return [draw.choice((*_NUMBERS, *_TEXTS)) for _ in range(draw.choice((1, 2, 17, 65, 300)))]
        return {
            str(draw.choice((*_TEXTS, *_NUMBERS, *range(320)))): draw.choice(_NUMBERS)
            for _ in range(draw.choice((1, 5, 300)))
        }


_PIECES = (
    "%00",
    "%ff",
    "%2e%2e/",
    "..",
    "//",
    "/",
    "?a=b",
    "?limit=1&limit=-1",
    "%",
    "%zz",
    "#x",
    "é",
    "a" * 5_000,
    "{model}",
    ";",
    "%0d%0a",
    "\\",
    "%ed%a0%80",
)


async def send(host: str, port: int, attack: Attack) -> bytes:
    """What came back, to the end of the connection or until the client went away. Raises TimeoutError if it hangs."""
    async with asyncio.timeout(LIMIT_S):
        reader, writer = await asyncio.open_connection(host, port, limit=2**24)
        got = b""
        try:
            for part in attack.parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0)
            if attack.going == "while sending":
                if not attack.resets and writer.can_write_eof():
                    writer.write_eof()
                    got = await reader.read(-1)
            elif attack.going == "in the answer":
                while len(got) < attack.most and (piece := await reader.read(attack.most)):
                    got += piece
            elif attack.going == "stays":
                got = await reader.read(-1)
        except OSError:
            pass  # the server may close a connection of which it has seen enough
        finally:
            if attack.resets:
                with suppress(OSError):  # the server was first
                    raw = writer.get_extra_info("socket")
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.close()
    return got


def status_of(answer: bytes) -> int | None:
    """The status of an HTTP answer; None where there is none."""
    match = re.match(rb"HTTP/1\.[01] (\d{3})", answer)
    return int(match[1]) if match else None


def _post(path: str, data: bytes, *lines: bytes, kind: bytes = b"application/json", method: str = "POST") -> bytes:
    head = [f"{method} {path} HTTP/1.1".encode(), b"Host: x", b"Connection: close", b"Content-Type: " + kind, *lines]
    if data or method == "POST":
        head.append(b"Content-Length: %d" % len(data))
    return b"\r\n".join([*head, b"", data])


def _dump(value: Any) -> bytes:
    """In JSON; a mark of a depth becomes lists or objects so deep, which could not be written otherwise."""

    def deep(mark: re.Match[str]) -> str:
        depth = int(mark[1])
        return "[" * depth + "]" * depth if depth % 2 else '{"a":' * depth + "1" + "}" * depth

    return re.sub(r'"@deep (\d+)@"', deep, json.dumps(value)).encode()


def _cut(draw: random.Random, request: bytes) -> list[bytes]:
    """In one piece mostly; else in several, anywhere."""
    if draw.random() < 0.8 or len(request) < 4:
        return [request]
    cuts = sorted(draw.sample(range(1, len(request)), min(draw.choice((1, 2, 10)), len(request) - 1)))
    return [request[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(request)], strict=True)]


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a JSON value, as what holds it and its key."""
    found: list[tuple[Any, Any]] = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found.append((value, key))
        found += _places(inner)
    return found
