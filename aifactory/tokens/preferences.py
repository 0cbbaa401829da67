"""Preferences: from rows of a corpus to documents that were preferred or not.

    dpo   a pair: the prompt with the chosen answer, and with the rejected one. A row without `rejected` is refused.
    kto   a prompt with an answer that is labelled `true` or `false` (or 1 or 0, in any case). Another label is refused.

What is longer than a row is refused too: of a document that is cut, or of half a pair, nothing can be learnt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from aifactory.text.documents import EncodedDocuments, encode_documents
from aifactory.text.encoder import Encoder
from aifactory.text.tokenizer import TextTokenizer

LIKELIHOOD = "likelihood"
"""The objective for which documents are packed as they are."""
LABELS = {"true": 1, "1": 1, "false": -1, "0": -1}
"""What a label says of an answer."""
DISLIKED = frozenset(label for label, mark in LABELS.items() if mark < 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preferences:
    """U units of K documents each, of which none is learnt without the others. Document k of unit u is
    ids_N[begins_UK[u, k] :][: lengths_UK[u, k]], of which the first prompt_lengths_UK[u, k] are its prompt."""

    ids_N: npt.NDArray[np.unsignedinteger]
    begins_UK: npt.NDArray[np.int64]
    lengths_UK: npt.NDArray[np.int64]
    prompt_lengths_UK: npt.NDArray[np.int64]
    marks_UK: npt.NDArray[np.int8]
    """+1 for a document that was preferred, -1 for one that was not."""
    refused: Mapping[int, str]
    """The units without any token, and why."""


def encode_preferences(
    tokenizer: TextTokenizer,
    encoder: Encoder,
    table: Mapping[str, pa.Array],
    *,
    objective: str,
    row_len: int,
    fallback: str,
) -> Preferences:
    """The documents of rows with the columns prompt, text, messages, rejected and label, for `objective` (dpo, kto)."""
    count = len(table["text"])

    def encoded(name: str) -> EncodedDocuments:
        return encode_documents(
            tokenizer,
            encoder,
            prompts=table["prompt"],
            texts=table[name],
            messages=table.get("messages"),
            fallback=fallback,
        )

    if objective == "dpo":
        halves = [encoded("text"), encoded("rejected")]
        marks_UK = np.tile(np.array([1, -1], np.int8), (count, 1))
        others = table["rejected"].to_pylist()
        refused = {i: "expected a preference pair, found no rejected answer" for i in range(count) if not others[i]}
    else:
        halves = [encoded("text")]
        labels = table["label"].to_pylist()
        marks_UK = np.array([[LABELS.get(label.lower(), 0)] for label in labels], np.int8).reshape(count, 1)
        refused = {
            i: f"expected the label true or false of an answer, found {labels[i]!r}"
            for i in np.flatnonzero(marks_UK[:, 0] == 0).tolist()
        }
    refused |= halves[0].refused
    lengths_UK = np.stack([np.diff(half.offsets_D1) for half in halves], axis=1)
    for i in np.flatnonzero(lengths_UK.sum(1) > row_len).tolist():
        refused.setdefault(i, f"expected at most tokenize.row_len tokens, {row_len}, found {lengths_UK[i].sum()}")
    lengths_UK[list(refused)] = 0
    shifts = np.cumsum([0, *(len(half.ids_N) for half in halves[:-1])])
    return Preferences(
        ids_N=np.concatenate([half.ids_N for half in halves]),
        begins_UK=np.stack([half.offsets_D1[:-1] + shift for half, shift in zip(halves, shifts, strict=True)], axis=1),
        lengths_UK=lengths_UK,
        prompt_lengths_UK=np.stack([half.prompt_lengths_D for half in halves], axis=1),
        marks_UK=marks_UK,
        refused=refused,
    )
