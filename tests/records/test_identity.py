"""python -m pytest tests/records/test_identity.py"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from aifactory.records.identity import canonical_json, fingerprint, hash_parts, hash_text, share_of


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        [-math.inf],
        {"x": {1, 2}},
        {"f": len},
        {"t": object()},
        b"bytes",
        {("a", "b"): 1},
        1j,
        {1: "int", "1": "text"},
    ],
)
def test_canonical_json_refuses_what_has_no_one_form(value: Any) -> None:
    with pytest.raises(TypeError):
        canonical_json(value)


def test_canonical_json_does_not_depend_on_the_order_of_keys() -> None:
    assert canonical_json({"b": [1, 2.5, None, True], "a": "ä"}) == '{"a":"ä","b":[1,2.5,null,true]}'
    assert canonical_json({"b": 1, "a": {"d": 1, "c": 2}}) == canonical_json({"a": {"c": 2, "d": 1}, "b": 1})


def test_a_fingerprint_is_the_same_in_every_process_and_version() -> None:
    golden = "0265ebfd15110204ddc7053c7b573be4e23cdaef571020538f3358dfd86480d9"  # printf '%s' TEXT | sha256sum

    made = fingerprint(stage="corpus", code_version=3, recipe={"seed": 1, "share": 0.05}, inputs=["a", "b"])

    text = '{"code":3,"inputs":["a","b"],"recipe":{"seed":1,"share":0.05},"stage":"corpus"}'
    assert made == hash_text(text) == golden


@pytest.mark.parametrize(
    "change",
    [
        {"stage": "tokens"},
        {"code_version": 4},
        {"recipe": {"seed": 2}},
        {"recipe": {}},
        {"inputs": ["b", "a"]},
        {"inputs": ["a"]},
        {"inputs": ["ab"]},
        {"recipe": {"seed": "1"}},
    ],
)
def test_a_fingerprint_changes_with_whatever_makes_the_thing(change: dict[str, Any]) -> None:
    values: dict[str, Any] = {"stage": "corpus", "code_version": 3, "recipe": {"seed": 1}, "inputs": ["a", "b"]}

    assert fingerprint(**(values | change)) != fingerprint(**values)


def test_parts_do_not_run_into_one_another() -> None:
    cases = [("ab", "c"), ("a", "bc"), ("abc",), ("", "abc"), ("abc", ""), ("1:a", "bc"), ()]

    assert len({hash_parts(*case) for case in cases}) == len(cases)


def test_text_without_utf8_has_a_hash_of_its_own() -> None:
    assert hash_text("\ud800") != hash_text("\ufffd")
    assert hash_parts("\ud800") != hash_parts("?")


def test_a_share_is_a_share_and_depends_on_the_salt() -> None:
    seeded = random.Random(1)
    keys = [str(seeded.random()) for _ in range(4_000)]

    chosen = {key for key in keys if share_of(key, salt="a") < 0.25}
    other = {key for key in keys if share_of(key, salt="b") < 0.25}

    assert all(0 <= share_of(key, salt="a") < 1 for key in keys)
    assert 900 < len(chosen) < 1_100
    assert 190 < len(chosen & other) < 310
    assert chosen == {key for key in reversed(keys) if share_of(key, salt="a") < 0.25}
