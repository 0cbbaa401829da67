"""Identity: what makes two things the same.

A fingerprint is the hash of what made a thing (recipe, inputs, code version); a digest is the hash of its bytes. The
first is known before any work is done, the second only after it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no white space and nothing but plain values.

    Raises   TypeError for anything that has no one representation (callables, sets, objects, NaN).
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise TypeError(f"expected plain JSON values, found a number that has no JSON form in {value!r}") from error


def fingerprint(*, stage: str, code_version: int, recipe: Mapping[str, Any], inputs: Iterable[str]) -> str:
    """SHA-256 (64 hex digits) of the stage, its code version, its recipe and its inputs' fingerprints, in order."""
    parts = {"stage": stage, "code": code_version, "recipe": recipe, "inputs": list(inputs)}
    return hash_text(canonical_json(parts))


def hash_text(text: str) -> str:
    """SHA-256 of the UTF-8 of `text`, 64 hex digits. Lone surrogates, which have no UTF-8, are hashed as such."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def hash_parts(*parts: str) -> str:
    """SHA-256 of several texts that can't run into one another: each is preceded by its length."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        state.update(f"{len(data)}:".encode())
        state.update(data)
    return state.hexdigest()


def share_of(key: str, *, salt: str) -> float:
    """A number in [0, 1) that depends on `key` and `salt` alone; rows with less than x of it are a share of x."""
    return int(hash_parts(salt, key)[:13], 16) / 16**13
