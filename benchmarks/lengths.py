"""Lengths: how long questions and answers are where people wrote both: docstrings and bodies of Python's own library.

A function's signature and docstring ask for its body, as the tasks of code models do. Every function of the top-level modules
of the interpreter's library that has a docstring gives one pair; words, numbers and marks each count as a token. Pairs
that are longer than what a benchmark serves are cut to it. Modules in other folders (tests, packages) are left out.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_TOKEN = re.compile(r"\w+|[^\w\s]")


@cache
def pairs() -> tuple[tuple[int, int], ...]:
    """(question, answer) in tokens, of every function, by module and place."""
    found = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = file.read_text(encoding="utf-8", errors="replace")
        found += [(len(_TOKEN.findall(question)), len(_TOKEN.findall(body))) for question, body in _functions(text)]
    return tuple(pair for pair in found if min(pair))


def draw(rng: random.Random, *, most_prompt: int, most_answer: int) -> tuple[int, int]:
    """The lengths of one request."""
    prompt, answer = rng.choice(pairs())
    return min(prompt, most_prompt), min(answer, most_answer)


def _functions(text: str) -> Iterator[tuple[str, str]]:
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
            begin = node.body[1].lineno - 1
            yield "\n".join(lines[node.lineno - 1 : begin]), "\n".join(lines[begin : node.end_lineno])
