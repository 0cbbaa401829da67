"""Laws of near-duplicates: what is found, who survives, that no row like a holdout trains, and that blocks can't be seen."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
import pytest

from aifactory.ingest import near_duplicates as module
from aifactory.ingest.minhash import NUM_BANDS, ROWS_PER_BAND, band_keys, signatures
from aifactory.ingest.near_duplicates import THRESHOLD, Standing, near_duplicates, recall, settle, similar_pairs

COMPONENTS = NUM_BANDS * ROWS_PER_BAND


def standing(count, *, priority=None, holdout=(), earlier=()):
    is_holdout, is_earlier = np.zeros(count, bool), np.zeros(count, bool)
    is_holdout[list(holdout)] = True
    is_earlier[list(earlier)] = True
    return Standing(np.arange(count) if priority is None else np.array(priority), is_holdout, is_earlier)


def document(rng, words):
    """Words with frequencies like those of a language."""
    return [f"w{int(10 ** (4.5 * rng.random()))}" for _ in range(words)]


def changed(rng, words, share):
    """The same with a share of the words replaced."""
    words = list(words)
    for i in rng.sample(range(len(words)), round(share * len(words))):
        words[i] = f"v{rng.randrange(10**6)}"
    return words


def unrelated(rng, count):
    return rng.integers(0, 2**32 - 2, (count, COMPONENTS), dtype=np.uint32)


def alike(rng, signature, share):
    """A signature that has this share of another's components, the same for each band but for one component."""
    made = unrelated(rng, 1)[0]
    kept = rng.permutation(COMPONENTS)[: round(share * COMPONENTS)]
    made[kept] = signature[kept]
    return made


def overlapping(signature, start, stop):
    """A signature that equals another in components start to stop."""
    made = unrelated(np.random.default_rng(start + 1000 * stop), 1)[0]
    made[start:stop] = signature[start:stop]
    return made


def shares(found):
    return (found[:, None] == found[None]).mean(axis=2)


def meeting(found):
    """Which pairs of rows share a key."""
    keys = band_keys(found)
    return (keys[:, :, None] == keys[:, None]).any(axis=0) & (keys[0] != 0)[:, None]


def crowd(seed, count=400):
    """Clusters of rows of all degrees of likeness, copies and chains among them, with random standing."""
    rng = np.random.default_rng(seed)
    rows = list(unrelated(rng, count // 8))
    while len(rows) < count:
        rows.append(alike(rng, rows[rng.integers(len(rows))], rng.choice([0.3, 0.42, 0.5, 0.6, 0.8, 1.0])))
    order = rng.permutation(count)
    found = np.array(rows)[order]
    state = Standing(rng.permutation(count), rng.random(count) < 0.15, rng.random(count) < 0.2)
    return found, state


# ── what is found ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_texts_of_which_a_tenth_was_changed_are_found_and_nothing_else():
    rng = random.Random(0)
    documents = [document(rng, rng.randrange(200, 400)) for _ in range(1500)]
    planted = [changed(rng, words, 0.1) for words in documents[:500]]
    texts = pa.array([" ".join(words) for words in documents + planted])
    settled = near_duplicates([signatures(texts)], standing(len(texts)))
    dropped = np.flatnonzero(settled.dropped)
    assert (dropped >= 1500).all()
    assert len(dropped) >= 0.95 * 500
    assert (settled.survivor_N[dropped] == dropped - 1500).all()


def test_copies_are_always_found():
    rng = random.Random(1)
    documents = [" ".join(document(rng, words)) for words in [*range(1, 40), 3000]]
    # One word alone is common to many; a copy differs in case and punctuation.
    documents = [f"d{i} {text}" for i, text in enumerate(documents)]
    texts = documents + [text.upper().replace(" ", ",\n") for text in documents] * 30
    settled = near_duplicates([signatures(pa.array(texts))], standing(len(texts)))
    assert (settled.survivor_N[40:] == np.tile(np.arange(40), 30)).all()
    assert (settled.similarity_N[40:] == 1).all()
    assert not settled.dropped[:40].any()


def test_copies_meet_in_the_last_key_whatever_the_bands_hold():
    # More rows than are compared share each band without being alike; two of the last are copies.
    rng = np.random.default_rng(2)
    found = unrelated(rng, 600)
    found[599] = found[598]
    assert similar_pairs(band_keys(found)[-1], [found], standing(600)).tolist() == [[598, 599]]
    crowded = np.ones(600, np.uint64)
    assert similar_pairs(crowded, [found], standing(600)).tolist() == []


@pytest.mark.parametrize("similarity", [0.2, 0.31, 0.45, 0.56])
@pytest.mark.parametrize(("bands", "rows"), [(NUM_BANDS, ROWS_PER_BAND), (20, 5)])
def test_the_share_of_pairs_that_meet_is_that_of_the_curve(similarity, bands, rows):
    rng = np.random.default_rng(3)
    pairs = 4000
    one = rng.integers(0, 2**32 - 2, (pairs, bands * rows), dtype=np.uint32)
    other = np.where(rng.random(one.shape) < similarity, one, one + np.uint32(1))
    keys = [band_keys(found, num_bands=bands, rows_per_band=rows) for found in (one, other)]
    met = (keys[0] == keys[1]).any(axis=0).mean()
    expected = recall(similarity, bands, rows)
    assert abs(met - expected) < 4 * np.sqrt(expected * (1 - expected) / pairs) + 1 / pairs


def test_the_share_of_texts_that_meet_is_that_of_the_curve():
    rng = random.Random(4)
    pairs, words = 600, 150
    documents = [document(rng, words) for _ in range(pairs)]
    texts = pa.array([" ".join(text) for words in documents for text in (words, changed(rng, words, 0.22))])
    found = signatures(texts)
    keys = band_keys(found)
    met = (keys[:, 0::2] == keys[:, 1::2]).any(axis=0).mean()
    sets = [{tuple(text[i : i + 3]) for i in range(len(text) - 2)} for text in (t.split() for t in texts.to_pylist())]
    expected = np.mean([recall(len(a & b) / len(a | b)) for a, b in zip(sets[0::2], sets[1::2], strict=True)])
    assert 0.2 < expected < 0.8
    assert abs(met - expected) < 4 * np.sqrt(expected * (1 - expected) / pairs)


def test_the_curve_keeps_what_its_documentation_promises():
    for similarity, found in ((0.37, 0.81), (0.45, 0.95), (0.5, 0.987), (0.56, 0.998)):
        assert recall(similarity) == pytest.approx(found, abs=0.004)
    assert 1 - recall(0.76) == pytest.approx(1e-8, rel=0.5)
    assert recall(0) == 0
    assert recall(1) == 1


def test_texts_without_words_and_texts_that_differ_are_no_duplicates():
    texts = pa.array(["", "", " \n", "...", "yes", "no", "yes no", "no yes"])
    assert not near_duplicates([signatures(texts)], standing(len(texts))).dropped.any()


def test_rows_of_no_blocks_and_of_empty_blocks_settle():
    empty = signatures(pa.array([], pa.string()))
    for blocks in ([], [empty], [empty, empty]):
        assert near_duplicates(blocks, standing(0)).survivor_N.shape == (0,)
    one = signatures(pa.array(["a b c d", "a b c d"]))
    settled = near_duplicates([empty, one[:1], empty, one[1:], empty], standing(2))
    assert settled.survivor_N.tolist() == [-1, 0]


# ── who survives ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_lower_priority_survives_and_is_named_with_the_share_of_equal_components():
    rng = np.random.default_rng(5)
    first = unrelated(rng, 1)[0]
    found = np.array([alike(rng, first, 0.75), unrelated(rng, 1)[0], first, first])
    settled = near_duplicates([found], standing(4, priority=[7, 1, 3, 5]))
    assert settled.survivor_N.tolist() == [2, -1, -1, 2]
    assert settled.similarity_N.tolist() == [0.75, 0, 0, 1]
    assert settled.holdout_N.tolist() == [-1] * 4


def test_of_a_chain_only_rows_that_resemble_a_survivor_go():
    rng = np.random.default_rng(6)
    a = unrelated(rng, 1)[0]
    b = overlapping(a, 0, 60)
    c = overlapping(b, 36, 96)  # of which 24 components are those of a
    d = overlapping(c, 0, 48)
    found = np.array([a, b, c, d])
    assert shares(found)[0].round(2).tolist() == [1, 0.62, 0.25, 0.12]
    assert near_duplicates([found], standing(4)).survivor_N.tolist() == [-1, 0, -1, 2]
    # The order decides: here the middle one stays.
    assert near_duplicates([found], standing(4, priority=[1, 0, 2, 3])).survivor_N.tolist() == [1, -1, 1, -1]


@pytest.mark.parametrize("seed", range(5))
def test_every_dropped_row_resembles_the_kept_row_that_is_named(seed):
    found, state = crowd(seed)
    settled = near_duplicates([found], state)
    similar = shares(found)
    dropped = settled.dropped
    before = state.order(np.arange(len(found)), np.zeros(len(found), int)).argsort()
    assert dropped.any()
    assert not dropped[state.is_earlier_N].any()
    for row in np.flatnonzero(settled.survivor_N >= 0):
        survivor = settled.survivor_N[row]
        assert not dropped[survivor]
        assert before[survivor] < before[row]
        assert settled.similarity_N[row] == similar[row, survivor] >= THRESHOLD
    for row in np.flatnonzero(settled.holdout_N >= 0):
        assert state.is_holdout_N[settled.holdout_N[row]]
        assert not state.is_holdout_N[row]
        assert settled.holdout_similarity_N[row] == similar[row, settled.holdout_N[row]] >= THRESHOLD
    for pair_C2 in (similar_pairs(key_N, [found], state) for key_N in band_keys(found)):
        assert (before[pair_C2[:, 0]] < before[pair_C2[:, 1]]).all()
        assert (similar[pair_C2[:, 0], pair_C2[:, 1]] >= THRESHOLD).all()
        assert dropped[pair_C2].any(axis=1).all()


@pytest.mark.parametrize("seed", range(5))
def test_no_row_that_is_like_a_row_of_the_holdout_trains(seed):
    found, state = crowd(seed)
    settled = near_duplicates([found], state)
    near = meeting(found) & (shares(found) >= THRESHOLD)
    trains = ~state.is_holdout_N & ~state.is_earlier_N
    leaks = trains & (near & state.is_holdout_N[None]).any(axis=1)
    assert leaks.any()
    assert (settled.holdout_N[leaks] >= 0).all()
    assert settled.dropped[leaks].all()
    assert (settled.holdout_N[~trains] == -1).all()


@pytest.mark.parametrize("seed", range(5))
def test_no_row_that_is_like_a_row_of_the_holdout_trains_however_many_share_its_band(seed):
    rng = np.random.default_rng(seed)
    found = unrelated(rng, 401)
    found[:, :3] = 7
    found[400, 4::3], found[400, 5::3] = found[399, 4::3], found[399, 5::3]  # no other band is the same
    for flags in ({"holdout": range(400)}, {"holdout": range(400), "earlier": range(400)}, {"earlier": range(400)}):
        settled = near_duplicates([found], standing(401, **flags))
        assert settled.survivor_N[400] == 399
        assert settled.holdout_N[400] == (399 if "holdout" in flags else -1)
        assert not settled.dropped[:400].any()


def test_rows_of_a_pair_are_compared_however_large_their_component():
    found = unrelated(np.random.default_rng(14), 401)
    found[400] = found[399]
    pairs = np.array([[0, i] for i in range(1, 400)] + [[399, 400]])
    settled = settle([pairs], [found], standing(401, holdout=[399]))
    assert np.flatnonzero(settled.dropped).tolist() == [400]
    assert settled.holdout_N[400] == 399


@pytest.mark.parametrize("seed", range(5))
def test_no_row_that_is_like_one_of_an_earlier_corpus_stays_and_earlier_ones_do(seed):
    found, state = crowd(seed)
    settled = near_duplicates([found], state)
    near = meeting(found) & (shares(found) >= THRESHOLD)
    seen = ~state.is_earlier_N & (near & state.is_earlier_N[None]).any(axis=1)
    assert seen.any()
    assert settled.dropped[seen].all()
    assert not settled.dropped[state.is_earlier_N].any()
    assert (settled.survivor_N[state.is_earlier_N] == -1).all()


def test_a_row_that_is_like_a_survivor_and_a_row_of_the_holdout_names_both():
    rng = np.random.default_rng(7)
    train = unrelated(rng, 1)[0]
    middle = overlapping(train, 0, 60)
    held = overlapping(middle, 40, 96)
    found = np.array([train, middle, held])
    settled = near_duplicates([found], standing(3, holdout=[2], earlier=[0]))
    assert settled.survivor_N.tolist() == [-1, 0, -1]
    assert settled.holdout_N.tolist() == [-1, 2, -1]
    assert settled.dropped.tolist() == [False, True, False]


def test_a_row_of_the_holdout_that_is_itself_dropped_still_keeps_its_likes_from_training():
    rng = np.random.default_rng(8)
    seen = unrelated(rng, 1)[0]
    held = overlapping(seen, 0, 60)
    train = overlapping(held, 40, 96)
    settled = near_duplicates([np.array([train, held, seen])], standing(3, holdout=[1], earlier=[2]))
    assert settled.survivor_N.tolist() == [-1, 2, -1]
    assert settled.holdout_N.tolist() == [1, -1, -1]


def test_a_row_that_leaks_is_no_reason_to_drop_another():
    rng = np.random.default_rng(9)
    held = unrelated(rng, 1)[0]
    leak = overlapping(held, 0, 60)
    train = overlapping(leak, 40, 96)
    settled = near_duplicates([np.array([held, leak, train])], standing(3, holdout=[0]))
    assert settled.dropped.tolist() == [False, True, False]


def test_a_holdout_stays_before_what_trains_and_goes_after_what_trained():
    rng = np.random.default_rng(10)
    text = unrelated(rng, 1)[0]
    found = np.array([text, text])
    assert near_duplicates([found], standing(2, holdout=[1])).survivor_N.tolist() == [1, -1]
    assert near_duplicates([found], standing(2, holdout=[1], earlier=[0])).survivor_N.tolist() == [-1, 0]


# ── same ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(3))
def test_neither_blocks_nor_their_order_nor_that_of_pairs_can_be_seen(seed, monkeypatch):
    found, state = crowd(seed)
    expected = near_duplicates([found], state)
    rng = np.random.default_rng(100 + seed)
    for chunk in (1 << 16, 7):
        monkeypatch.setattr(module, "_CHUNK_ROWS", chunk)
        order = rng.permutation(len(found))
        cuts = np.sort(rng.integers(0, len(found), 5))
        blocks = np.split(found[order], cuts)
        moved = Standing(state.priority_N[order], state.is_holdout_N[order], state.is_earlier_N[order])
        key_KN = np.concatenate([band_keys(block) for block in blocks], axis=1)
        pairs = [rng.permutation(similar_pairs(key_N, blocks, moved)) for key_N in rng.permutation(key_KN)]
        settled = settle(pairs, blocks, moved)
        place = np.append(order, -1)  # -1 stays -1
        for name in ("survivor_N", "holdout_N"):
            assert (place[getattr(settled, name)] == getattr(expected, name)[order]).all()
        for name in ("similarity_N", "holdout_similarity_N"):
            assert (getattr(settled, name) == getattr(expected, name)[order]).all()


def test_signatures_may_lie_in_files(tmp_path):
    found, state = crowd(11)
    expected = near_duplicates([found], state)
    np.save(tmp_path / "a.npy", found[:150])
    np.save(tmp_path / "b.npy", found[150:])
    blocks = [np.load(tmp_path / name, mmap_mode="r") for name in ("a.npy", "b.npy")]
    settled = near_duplicates(blocks, state)
    assert (settled.survivor_N == expected.survivor_N).all()
    assert (settled.holdout_N == expected.holdout_N).all()


def test_rows_of_one_priority_settle_by_their_place():
    text = unrelated(np.random.default_rng(12), 1)[0]
    settled = near_duplicates([np.array([text, text])], standing(2, priority=[0, 0]))
    assert settled.survivor_N.tolist() == [-1, 0]


def test_what_does_not_fit_is_said():
    found = unrelated(np.random.default_rng(13), 2)
    with pytest.raises(ValueError, match=r"of the same rows, found \(2, 1, 2\)"):
        Standing(np.arange(2), np.zeros(1, bool), np.zeros(2, bool))
    for threshold in (0, 1.5):
        with pytest.raises(ValueError, match="above 0 and of at most 1"):
            near_duplicates([found], standing(2), threshold=threshold)
