"""Leaks: rows that would train and hold passages of what is held out, in this corpus or in an earlier one.

Three passes over parts, each of which is found again where it was made before: the n-grams of the holdouts; which rows that
train have any of them; and, of those rows alone, how much, without the n-grams that many rows have in common.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from aifactory.cluster.tasks import RunTasks
from aifactory.config import DecontaminateStep
from aifactory.ingest.duplicates import Drops
from aifactory.ingest.index import Index
from aifactory.records.artifacts import Corpus
from aifactory.records.identity import fingerprint
from aifactory.records.parts import Part, PartStore, made
from aifactory.records.rows import from_ipc, from_parquet, one_array, part_names
from aifactory.records.storage import Storage

if TYPE_CHECKING:
    from aifactory.ingest.contamination import ContaminationIndex

LEAK = "contaminated"
_CODE_VERSION = 2
_TRAIN, _HOLDOUT = "train.arrow", "holdout.arrow"
_SAID = ("prompt", "messages", "text")
# What every conversation begins with is nobody's passage.
_INSTRUCTING = frozenset({"system", "developer"})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Looked:
    """What every pass needs; pickled into every task."""

    storage: Storage
    step: DecontaminateStep


def leaked_drops(
    parts: Sequence[Part],
    indexes: Sequence[Index],
    stays: Sequence[npt.NDArray[np.bool_]],
    *,
    holdouts: Sequence[Corpus],
    step: DecontaminateStep,
    storage: Storage,
    run: RunTasks,
) -> Drops:
    """The rows that train of those that stay, and hold too much of a holdout.

    stays      for each part which of its rows are still there
    holdouts   corpora of earlier cycles; what they hold out is looked for too
    """
    looked = _Looked(storage=storage, step=step)
    store = PartStore(storage)
    recipe = step.model_dump(mode="json")
    borders = [int((~index.is_holdout_N).sum()) for index in indexes]

    def identity(stage: str, *inputs: str) -> str:
        return fingerprint(stage=stage, code_version=_CODE_VERSION, recipe=recipe, inputs=inputs)

    own = [
        (identity("leaks-holdout", part.fingerprint, _digest(mask[border:])), (looked, part, mask[border:]))
        for part, mask, border in zip(parts, stays, borders, strict=True)
        if _HOLDOUT in part.files
    ]
    earlier = [
        (identity("leaks-earlier", corpus.digest, name), (looked, corpus, name))
        for corpus in holdouts
        for name in part_names(corpus, side="holdout")
    ]
    found = made(store, run, _ngrams_of_part, own) + made(store, run, _ngrams_of_corpus, earlier)
    places: list[int] = []
    scores: list[float] = []
    details: list[str] = []
    if found:
        whole = _publish_index(store, identity, found, step)
        wanted = [
            (
                identity("leaks-match", part.fingerprint, whole.fingerprint, _digest(mask[:border])),
                (looked, part, mask[:border], whole),
            )
            for part, mask, border in zip(parts, stays, borders, strict=True)
        ]
        matches = [_arrays(store, part) for part in made(store, run, _match, wanted)]
        rare = _publish_rare(store, identity, whole, matches, step)
        measured = made(
            store,
            run,
            _measure,
            [
                (
                    identity("leaks-measure", part.fingerprint, rare.fingerprint, _digest(match["rows"])),
                    (looked, part, match["rows"], rare),
                )
                for part, match in zip(parts, matches, strict=True)
            ],
        )
        start = 0
        for index, part in zip(indexes, measured, strict=True):
            arrays = _arrays(store, part)
            places += (arrays["rows"] + start).tolist()
            scores += arrays["share"].tolist()
            details += [
                f"{share:.0%} of its runs of {step.ngram_words} words are in a holdout, its longest passage has {words} words"
                for share, words in zip(arrays["share"].tolist(), arrays["words"].tolist(), strict=True)
            ]
            start += len(index)
    return Drops(
        places_D=np.array(places, np.int64),
        rules=[LEAK] * len(places),
        scores_D=np.array(scores, np.float64),
        details=details,
    )


# ── the passes ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _ngrams_of_part(identity: str, looked: _Looked, part: Part, stays: npt.NDArray[np.bool_]) -> None:
    rows = from_ipc(PartStore(looked.storage).map(part, _HOLDOUT), _SAID).filter(pa.array(stays))
    _publish(looked, identity, keys=_built(rows, looked.step).keys_K)


def _ngrams_of_corpus(identity: str, looked: _Looked, corpus: Corpus, name: str) -> None:
    data = looked.storage.read_bytes(corpus.kind, corpus.fingerprint[:16], name)
    assert data is not None, name
    _publish(looked, identity, keys=_built(from_parquet(data, _SAID), looked.step).keys_K)


def _match(identity: str, looked: _Looked, part: Part, stays: npt.NDArray[np.bool_], whole: Part) -> None:
    """Which rows have any n-gram of the holdouts, and in how many rows each of those n-grams is."""
    index = _index(looked, whole)
    texts = _training_texts(looked, part)
    rows = np.flatnonzero(stays)
    overlaps = index.overlaps(texts.take(pa.array(rows)))
    rows = rows[overlaps.share_N > 0]
    places, counts = index.document_counts(texts.take(pa.array(rows)))
    _publish(looked, identity, rows=rows, places=places, counts=counts)


def _measure(identity: str, looked: _Looked, part: Part, rows: npt.NDArray[np.int64], rare: Part) -> None:
    """Which of these rows hold too much."""
    overlaps = _index(looked, rare).overlaps(_training_texts(looked, part).take(pa.array(rows)))
    leaks = overlaps.leaks(max_share=looked.step.max_share, max_passage_words=looked.step.max_passage_words)
    _publish(looked, identity, rows=rows[leaks], share=overlaps.share_N[leaks], words=overlaps.passage_words_N[leaks])


# ── what they hand on ─────────────────────────────────────────────────────────────────────────────────────────────────


def _publish_index(store: PartStore, identity: Any, found: Sequence[Part], step: DecontaminateStep) -> Part:
    from aifactory.ingest.contamination import ContaminationIndex

    name = identity("leaks-index", *sorted({part.fingerprint for part in found}))
    existing = store.find(name)
    if existing is not None:
        return existing
    merged = ContaminationIndex.merge(
        [ContaminationIndex(_arrays(store, part)["keys"], step.ngram_words, step.min_words) for part in found]
    )
    return store.publish(name, {"arrays.npz": _packed(keys=merged.keys_K)}, {})


def _publish_rare(
    store: PartStore, identity: Any, whole: Part, matches: Sequence[dict[str, Any]], step: DecontaminateStep
) -> Part:
    """The index without what many rows have in common."""
    from aifactory.ingest.contamination import ContaminationIndex

    index = ContaminationIndex(_arrays(store, whole)["keys"], step.ngram_words, step.min_words)
    count_K = np.zeros(len(index.keys_K), np.int64)
    for match in matches:
        np.add.at(count_K, match["places"], match["counts"])
    rare = index.without(count_K, max_documents=step.max_documents)
    name = identity("leaks-rare", whole.fingerprint, rare.digest)
    return store.find(name) or store.publish(name, {"arrays.npz": _packed(keys=rare.keys_K)}, {})


def _index(looked: _Looked, part: Part) -> ContaminationIndex:
    from aifactory.ingest.contamination import ContaminationIndex

    keys = _arrays(PartStore(looked.storage), part)["keys"]
    return ContaminationIndex(keys, looked.step.ngram_words, looked.step.min_words)


def _built(rows: pa.Table, step: DecontaminateStep) -> ContaminationIndex:
    from aifactory.ingest.contamination import ContaminationIndex

    # Apart: a run of words that spans a prompt and its answer, or two turns, is nobody's quotation.
    turns = [text for said in _turns(rows) for text in said]
    texts = [*(one_array(rows[name]) for name in ("prompt", "text")), pa.array(turns, pa.string())]
    return ContaminationIndex.build(pa.concat_arrays(texts), ngram_words=step.ngram_words, min_words=step.min_words)


def _training_texts(looked: _Looked, part: Part) -> pa.Array:
    """What rows that train were asked and answer, as one text each."""
    if _TRAIN not in part.files:
        return pa.array([], pa.string())
    rows = from_ipc(PartStore(looked.storage).map(part, _TRAIN), _SAID)
    turns = pa.array(["\n".join(said) for said in _turns(rows)], pa.string())
    prompts, answers = (one_array(rows[name]) for name in ("prompt", "text"))
    return pc.binary_join_element_wise(prompts, turns, answers, "\n")


def _turns(rows: pa.Table) -> list[list[str]]:
    """What was said before the answer of each row, turn by turn, as it was said: JSON would glue words together."""
    return [
        [turn["content"] for turn in orjson.loads(turns) if turn["role"] not in _INSTRUCTING] if turns else []
        for turns in rows["messages"].to_pylist()
    ]


def _publish(looked: _Looked, identity: str, **arrays: npt.NDArray[Any]) -> None:
    PartStore(looked.storage).publish(identity, {"arrays.npz": _packed(**arrays)}, {})


def _packed(**arrays: npt.NDArray[Any]) -> bytes:
    sink = io.BytesIO()
    np.savez(sink, **arrays)  # type: ignore[arg-type]
    return sink.getvalue()


def _arrays(store: PartStore, part: Part) -> dict[str, npt.NDArray[Any]]:
    with np.load(io.BytesIO(store.read(part, "arrays.npz")), allow_pickle=False) as loaded:
        return dict(loaded)


def _digest(values: npt.NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
