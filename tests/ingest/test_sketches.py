"""Laws of sketches: what they are, and what they estimate; `test_leaks` has what is done by them."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
import pytest
from said_words import replaced, words

from aifactory.config import Ingest
from aifactory.ingest.sketches import _GEAR, MOST_ROWS, RUN, SHORTEST, SIZE, Sketches


def hashes(text):
    """The hash of each run of bytes, by its definition."""
    said = text.lower().encode()
    runs = {said[i : i + RUN] for i in range(len(said) - RUN + 1)}
    return {sum(int(_GEAR[byte]) << (RUN - 1 - at) for at, byte in enumerate(run)) % 2**32 for run in runs}


def jaccard(one, other):
    return len(hashes(one) & hashes(other)) / len(hashes(one) | hashes(other))


TEXTS = [
    "",
    "short",
    "x" * SHORTEST,
    "x" * 5000,
    "ab" * 300,
    "Eines Tages, als er \u00e4lter war, ging er fort.",
    "\u6771\u4eac" * 40,
]


def test_a_sketch_is_the_least_hashes_of_the_runs_of_its_text_each_once():
    rng = random.Random(0)
    texts = [" ".join(rng.choices("abcD", k=rng.choice([10, 63, 64, 65, 66, 200, 1000]))) for _ in range(60)] + TEXTS

    sketches = Sketches.of(pa.array(texts))

    found = [sketches.hash_M[a:b].tolist() for a, b in zip(sketches.end_N1[:-1], sketches.end_N1[1:], strict=True)]
    assert found == [sorted(hashes(text))[:SIZE] if len(text.encode()) >= SHORTEST else [] for text in texts]
    assert {len(each) for each in found} >= {0, 1, 2, SIZE}


def test_a_similarity_is_near_that_of_all_runs():
    rng = random.Random(1)
    for length, changed in ((20, 3), (150, 20)):
        held = [" ".join(words(rng, length)) for _ in range(12)]
        texts = [replaced(rng, text, rng.randrange(changed + 1)) for text in held]

        like, similarity = Sketches.of(pa.array(texts)).most_like(Sketches.of(pa.array(held)))

        for i, text in enumerate(texts):
            assert like[i] == (i if similarity[i] > 0 else -1)
            assert similarity[i] == 1 or text != held[i]
            assert similarity[i] == pytest.approx(jaccard(text, held[i]), abs=0.35)


def test_of_rows_that_are_equally_like_the_first_is_named():
    text = " ".join(words(random.Random(4), 20))
    held = Sketches.of(pa.array(["nothing of it is in here at all", text, text]))

    like, similarity = Sketches.of(pa.array([text, "too short", ""])).most_like(held)

    assert like.tolist() == [1, -1, -1]
    assert similarity.tolist() == [1, 0, 0]


def test_what_many_rows_of_the_holdout_have_in_common_makes_no_row_like_another():
    rng = random.Random(2)
    form = " ".join(words(rng, 40))

    def similarity(number):
        held = Sketches.of(pa.array([f"{form} {' '.join(words(rng, 5))}" for _ in range(number)]))
        return Sketches.of(pa.array([form])).most_like(held)[1][0]

    assert similarity(MOST_ROWS) > 0.5
    assert similarity(10 * MOST_ROWS) < 0.2


def test_rows_of_a_mask_and_rows_put_together_keep_their_sketches():
    rng = random.Random(3)
    texts = [" ".join(words(rng, rng.randrange(60))) for _ in range(50)]
    mask = np.array([rng.random() < 0.5 for _ in texts])
    sketches = Sketches.of(pa.array(texts))

    taken, joined = (
        sketches.take(mask),
        Sketches.joined([sketches.take(mask), sketches.take(~mask), Sketches.joined([])]),
    )

    wanted = Sketches.of(pa.array([text for text, is_in in zip(texts, mask, strict=True) if is_in]))
    assert taken.hash_M.tolist() == wanted.hash_M.tolist()
    assert taken.end_N1.tolist() == wanted.end_N1.tolist()
    assert len(joined) == len(texts)
    assert joined.take(np.arange(len(texts)) < len(taken)).hash_M.tolist() == taken.hash_M.tolist()


def test_a_step_that_looks_for_near_duplicates_takes_the_place_of_the_quarantine():
    section = {"name": "docs", "kind": "text", "path": "nowhere"}
    near = Ingest.model_validate({"sources": [section], "steps": [{"step": "near_duplicates"}]})
    passages = Ingest.model_validate({"sources": [section], "steps": [{"step": "decontaminate"}]})

    assert near.quarantine is None
    assert passages.quarantine == 0.4
