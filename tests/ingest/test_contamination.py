"""Laws of contamination: leaks are found, quotations and boilerplate are none, and an index is a set."""

from __future__ import annotations

import pickle
import random
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from aifactory.ingest.contamination import ContaminationIndex


def words(rng, count):
    return [f"w{rng.randrange(10**6)}" for _ in range(count)]


def replaced(rng, text, number):
    text = list(text)
    for i in rng.sample(range(len(text)), number):
        text[i] = f"v{rng.randrange(10**6)}"
    return text


def texts(*lists):
    return pa.array([" ".join(text) for text in lists])


def measured(index, *lists):
    overlaps = index.overlaps(texts(*lists))
    return overlaps.share_N.tolist(), overlaps.passage_words_N.tolist(), overlaps.leaks().tolist()


def reference(index_texts, text, n, least):
    """Share and largest passage by sets of tuples and of places."""
    grams = lambda t: [] if len(t) < least else [tuple(t[i : i + n]) for i in range(max(len(t) - n + 1, 1))]  # noqa: E731
    held = {gram for t in index_texts for gram in grams(t)}
    hits = [i for i, gram in enumerate(grams(text)) if gram in held]
    passages = []
    for k, i in enumerate(hits):
        if k == 0 or i - hits[k - 1] > 4 * n:
            passages.append(set())
        passages[-1] |= set(range(i, min(i + n, len(text))))
    return len(hits) / max(len(grams(text)), 1), max(map(len, passages), default=0)


# ── what is a leak ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_exact_copy_leaks_whatever_its_length_case_and_punctuation():
    rng = random.Random(0)
    held = [words(rng, count) for count in (8, 12, 13, 14, 40, 400)]
    index = ContaminationIndex.build(texts(*held))
    assert measured(index, *held) == ([1.0] * 6, [8, 12, 13, 14, 40, 400], [True] * 6)
    overlaps = index.overlaps(pa.array(["“" + ",\n".join(text).upper() + "!”" for text in held]))
    assert (overlaps.share_N == 1).all()
    _, _, leaks = measured(index, *(words(rng, 100) for _ in range(50)))
    assert not any(leaks)


@pytest.mark.parametrize("seed", range(50))
def test_a_copy_with_three_of_a_hundred_words_changed_leaks(seed):
    rng = random.Random(seed)
    held = words(rng, 100)
    index = ContaminationIndex.build(texts(held))
    near = replaced(rng, held, 3)
    (share, _), (_, passage), leaks = measured(index, near, words(rng, 3000) + near + words(rng, 3000))
    assert share >= 0.55
    assert passage >= 70
    assert leaks == [True, True]


def test_a_copy_in_a_long_document_leaks_by_its_passage():
    rng = random.Random(1)
    held = words(rng, 80)
    index = ContaminationIndex.build(texts(held))
    share, passage, leaks = measured(index, words(rng, 5000) + held + words(rng, 5000))
    assert share[0] < 0.01
    assert passage == [80]
    assert leaks == [True]


def test_a_quotation_of_a_sentence_is_no_leak():
    rng = random.Random(2)
    held = words(rng, 300)
    index = ContaminationIndex.build(texts(held))
    quotes = [words(rng, 60) + held[start : start + 25] + words(rng, 60) for start in range(0, 275, 25)]
    shares, passages, leaks = measured(index, *quotes)
    assert not any(leaks)
    assert all(0 < share < 0.2 for share in shares)
    assert set(passages) == {25}
    # Many of them, far apart, in a long document are none either.
    spread = [word for quote in quotes for word in quote]
    assert measured(index, spread)[1:] == ([25], [False])


def test_prompts_and_answers_of_a_holdout_are_found_apart():
    rng = random.Random(3)
    prompt, answer = words(rng, 30), words(rng, 30)
    index = ContaminationIndex.build(texts(prompt, answer))
    assert measured(index, prompt, answer)[2] == [True, True]
    assert measured(index, prompt[-10:] + answer[:10])[0] == [0.0]


def test_texts_of_few_words_match_nothing_and_short_ones_only_as_a_whole():
    index = ContaminationIndex.build(pa.array(["yes", "a b c d e f g", "one two three four five six seven eight", ""]))
    assert len(index.keys_K) == 1
    found = index.overlaps(
        pa.array(
            [
                "yes",
                "a b c d e f g",
                "",
                "One, two, three, four, five, six, seven, eight.",
                "one two three four five six seven eight nine",
                " \n",
            ]
        )
    )
    assert found.share_N.tolist() == [0, 0, 0, 1, 0, 0]
    assert found.passage_words_N.tolist() == [0, 0, 0, 8, 0, 0]


def test_what_many_training_rows_have_in_common_is_no_leak_and_what_leaks_beside_it_is():
    rng = random.Random(4)
    licence, held = words(rng, 120), words(rng, 80)
    index = ContaminationIndex.build(texts(licence + held))
    rows = [licence + words(rng, 100) for _ in range(30)] + [licence + held, held + words(rng, 20), words(rng, 100)]
    assert measured(index, *rows)[2] == [True] * 32 + [False]
    count_K = np.zeros(len(index.keys_K), np.int64)
    for block in (rows[:7], rows[7:20], rows[20:], []):
        np.add.at(count_K, *index.document_counts(texts(*block).cast(pa.string())))
    places, counts = index.document_counts(texts(*rows))
    assert (count_K[places] == counts).all()
    assert count_K.sum() == counts.sum()
    assert set(counts.tolist()) == {31, 2, 1}
    assert measured(index.without(count_K), *rows)[2] == [False] * 30 + [True, True, False]


def test_an_n_gram_counts_once_for_each_text_that_repeats_it():
    rng = random.Random(5)
    phrase = words(rng, 13)
    index = ContaminationIndex.build(texts(phrase))
    places, counts = index.document_counts(texts(phrase * 5, phrase, words(rng, 50)))
    assert (places.tolist(), counts.tolist()) == ([0], [2])


@pytest.mark.parametrize("seed", range(4))
def test_share_and_passage_are_those_of_the_definition(seed):
    rng = random.Random(seed)
    n, least = 3, 2
    lists = [[rng.choice("abcdefghijk") for _ in range(rng.randrange(0, 80))] for _ in range(300)]
    held, others = lists[:12], lists[12:]
    shares, passages, _ = measured(ContaminationIndex.build(texts(*held), ngram_words=n, min_words=least), *others)
    expected = [reference(held, text, n, least) for text in others]
    assert shares == [share for share, _ in expected]
    assert passages == [passage for _, passage in expected]
    assert len(set(shares)) > 20


# ── an index is a set ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_index_depends_on_its_texts_alone():
    rng = random.Random(6)
    lists = [words(rng, rng.randrange(0, 200)) for _ in range(300)]
    index = ContaminationIndex.build(texts(*lists))
    assert (np.diff(index.keys_K.astype(object)) > 0).all()
    again = ContaminationIndex.build(texts(*rng.sample(lists, 300), *lists[:50]).cast(pa.large_string()))
    parts = [ContaminationIndex.build(texts(*part)) for part in (lists[200:], lists[:100], lists[50:220])]
    sliced = ContaminationIndex.build(texts(["x"] * 20, *lists, ["y"] * 20)[1:-1])
    for other in (again, ContaminationIndex.merge(parts), sliced):
        assert (other.keys_K == index.keys_K).all()
        assert other.digest == index.digest
    assert ContaminationIndex.build(texts(*lists[1:])).digest != index.digest
    assert ContaminationIndex.build(texts(*lists), min_words=9).digest != index.digest


def test_overlaps_depend_on_nothing_but_the_text_and_the_index():
    rng = random.Random(7)
    held = [words(rng, 200) for _ in range(20)]
    index = ContaminationIndex.build(texts(*held))
    # Longer in all than what is read at once, and one that alone is.
    lists = [rng.choice(held)[: rng.randrange(200)] + words(rng, rng.randrange(200)) for _ in range(300)]
    lists.append(words(rng, 60_000) + held[0])
    whole = index.overlaps(texts(*lists))
    order = rng.sample(range(len(lists)), len(lists))
    for found, rows in (
        (index.overlaps(texts(*(lists[i] for i in order))), order),
        (index.overlaps(texts(["x"], *lists, ["y"])[1:-1]), range(len(lists))),
        (index.overlaps(texts(*lists).cast(pa.large_string())), range(len(lists))),
    ):
        assert (found.share_N == whole.share_N[list(rows)]).all()
        assert (found.passage_words_N == whole.passage_words_N[list(rows)]).all()


def test_an_index_may_be_pickled_or_lie_in_a_file(tmp_path):
    rng = random.Random(8)
    lists = [words(rng, 100) for _ in range(20)]
    index = ContaminationIndex.build(texts(*lists[:10]))
    expected = measured(index, *lists)
    np.save(tmp_path / "keys.npy", index.keys_K)
    for other in (
        pickle.loads(pickle.dumps(index)),
        ContaminationIndex(np.load(tmp_path / "keys.npy", mmap_mode="r")),
    ):
        assert other.digest == index.digest
        assert measured(other, *lists) == expected


def test_an_index_of_nothing_finds_nothing():
    index = ContaminationIndex.build(pa.array([], pa.string()))
    found = index.overlaps(texts(words(random.Random(9), 50), []))
    assert found.share_N.tolist() == [0, 0]
    assert index.overlaps(pa.array([], pa.string())).leaks().shape == (0,)
    assert index.document_counts(texts(["a"] * 20))[0].shape == (0,)


def test_words_of_any_script_are_found():
    held = "Zażółć gęślą jaźń i pójdź w ciemną noc, żółwiu mój drogi, bo świt już blisko jest. 中文测试句子没有空格但是可以被找到的。"
    index = ContaminationIndex.build(pa.array([held]))
    other = re.sub(r"[,.。]", "", held).replace(" ", "\u3000")
    assert index.overlaps(pa.array([held, other])).share_N.tolist() == [1, 1]


# Indexes of earlier cycles must stay comparable: who changes this digest raises the code version of ingest.
GOLDEN = "7a6994f423993784ceb35aed1aafb097e63b0961fbff6c9ab4a647200355cc2a"
PINNED = """
import pyarrow as pa
from aifactory.ingest.contamination import ContaminationIndex
texts = [" ".join(f"w{i * k % 17}" for i in range(30)) for k in range(5)] + ["中文测试句子没有空格但是可以被找到的", "a b c d e f g h"]
print(ContaminationIndex.build(pa.array(texts)).digest)
"""


def test_an_index_is_the_same_in_every_process():
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", PINNED], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        )
        assert done.stdout.strip() == GOLDEN


def test_what_does_not_fit_is_said():
    text = pa.array(["a b c"])
    with pytest.raises(ValueError, match="1 <= min_words <= ngram_words, found 14 and 13"):
        ContaminationIndex.build(text, min_words=14)
    index = ContaminationIndex.build(text, ngram_words=2, min_words=2)
    with pytest.raises(ValueError, match=r"found \[\(2, 2\), \(13, 8\)\]"):
        ContaminationIndex.merge([index, ContaminationIndex.build(text)])
    with pytest.raises(ValueError, match="a count for each of 2 n-grams, found 3"):
        index.without(np.zeros(3, np.int64))
