"""From text back to rows: what the index costs and how long a search takes, over 100 million tokens in 250 shards.

Keys     trace_s                    in a fresh process, from its first import to the rows, for the text `mixed`
         trace_build_tokens_per_s   tokens of a shard over the time to make its index, one thread; after the first one, which
                                    loads what numba has compiled
         trace_index_over_tokens    bytes of the indexes over bytes of the shards
Each is the median of its raw numbers. Raw are also the other texts, the search alone (`search_`: without imports), the same
text again in that process (`warm_`), and the most memory of such a process (`peak_bytes_`: with the pages of the files that
it has mapped). Nothing empties the system's cache of files before it.

Texts    mixed         280 tokens of a document, 200 new ones, and the boilerplate
         row           all 3,000 tokens of a long document
         boilerplate   60 tokens that one document in twenty holds
         new           600 tokens that are in no document as they are
The shards are made here: a vocabulary of 16,384 of which token n is drawn with a weight of 1 / n (Zipf 1949, "Human Behavior
and the Principle of Least Effort"), half of all tokens in phrases of 25 out of 50,000 that come again and again.
It isn't called trace.py: a script's folder comes first where Python looks for modules, and the standard library has one of
that name.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from runner import Measured, main

from aifactory.text.documents import EncodedDocuments
from aifactory.text.shards import shard_bytes
from aifactory.tokens.packing import pack_documents
from aifactory.tokens.runs import index_bytes
from aifactory.tokens.spans import index_name

_VOCABULARY = 16_384
_PHRASE = 25
_BOILERPLATE_SHARE = 0.05
_FIGURES = ("trace_s", "trace_build_tokens_per_s", "trace_index_over_tokens")
_FRESH = """
import time
start = time.perf_counter()
import json, sys
from pathlib import Path
from aifactory.tokens.spans import find_rows
folder, ids = Path(sys.argv[1]), json.load(open(sys.argv[2]))
names = sorted(path.name for path in folder.iterdir())
shards = [name for name in names if name.startswith("shard-")]
times = [time.perf_counter()]
for _ in range(2):
    found = find_rows(ids, shards, set(names), lambda _: folder, limit=10)
    times.append(time.perf_counter())
# Not ru_maxrss: a process inherits that from the one that starts it.
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(json.dumps({
    "fresh_s": times[1] - start, "search_s": times[1] - times[0], "warm_s": times[2] - times[1],
    "peak_bytes": int(status["VmHWM"].split()[0]) * 1024,
    "rows": found.num_rows, "left_out": found.left_out, "best": [found.rows[0].row, found.rows[0].length] if found.rows else None,
}))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is measured."""

    shards: int
    shard_tokens: int
    rounds: int


FULL = Sizes(shards=250, shard_tokens=400_000, rounds=5)
QUICK = Sizes(shards=10, shard_tokens=50_000, rounds=1)


def measure(quick: bool, rounds: int | None) -> Measured:
    """Make the shards, then search them."""
    sizes = QUICK if quick else FULL
    raw: dict[str, list[float]] = defaultdict(list)
    notes = []
    with tempfile.TemporaryDirectory(prefix="aifactory-benchmark-") as folder:
        shards = Path(folder, "shards")
        texts = _write(shards, sizes, raw)
        for _ in range(rounds or sizes.rounds):
            for name, ids in texts.items():
                file = Path(folder, f"{name}.json")
                file.write_text(json.dumps(ids), encoding="utf-8")
                done = subprocess.run(
                    [sys.executable, "-c", _FRESH, str(shards), str(file)], check=True, capture_output=True, text=True
                )
                found = json.loads(done.stdout)
                for key in ("fresh_s", "search_s", "warm_s", "peak_bytes"):
                    raw[f"{key.removesuffix('_s')}_{name}{'_s' if key.endswith('_s') else ''}"].append(found[key])
                note = (
                    f"{name}: {len(ids):,} tokens, {found['rows']:,} rows found, the best {found['best']}, "
                    f"{found['left_out']:,} places left out"
                )
                if note not in notes:
                    notes.append(note)
    raw["trace_s"] = raw["fresh_mixed_s"]
    return Measured(
        figures={name: round(statistics.median(raw[name]), 4) for name in _FIGURES}, raw=dict(raw), notes=notes
    )


def _write(folder: Path, sizes: Sizes, raw: dict[str, list[float]]) -> dict[str, list[int]]:
    """Write the shards and their indexes; return texts to be traced."""
    rng = np.random.default_rng(1)
    weights = np.cumsum(1 / np.arange(1, _VOCABULARY))
    weights /= weights[-1]
    phrases = _draw(rng, weights, 50_000 * _PHRASE).reshape(-1, _PHRASE)
    boilerplate = _draw(rng, weights, 60)
    folder.mkdir()
    index_size = shards_size = 0
    texts: dict[str, list[int]] = {}
    for number in range(sizes.shards):
        documents = _documents(rng, weights, phrases, boilerplate, sizes.shard_tokens)
        names = pa.array([f"{number:08x}{i:024x}" for i in range(len(documents))])
        packed = pack_documents(names, documents, row_len=1024, pad_id=0)
        start = time.perf_counter()
        index = index_bytes(packed)
        if number:
            raw["trace_build_tokens_per_s"].append(len(documents.ids_N) / (time.perf_counter() - start))
        shard = shard_bytes(packed)
        name = f"shard-{number:05d}.arrow"
        (folder / name).write_bytes(shard)
        (folder / index_name(name)).write_bytes(index)
        index_size, shards_size = index_size + len(index), shards_size + len(shard)
        if number == sizes.shards // 2:
            longest = int(np.argmax(np.diff(documents.offsets_D1)))
            row = documents.ids_N[documents.offsets_D1[longest] : documents.offsets_D1[longest + 1]]
            texts = {
                "mixed": [*row[500:780].tolist(), *_draw(rng, weights, 200).tolist(), *boilerplate.tolist()],
                "row": row.tolist(),
                "boilerplate": boilerplate.tolist(),
                "new": _draw(rng, weights, 600).tolist(),
            }
    raw["trace_index_over_tokens"].append(index_size / shards_size)
    return texts


def _draw(rng: np.random.Generator, weights: npt.NDArray[np.float64], number: int) -> npt.NDArray[np.uint16]:
    """Tokens by their weights; 0 is none of them, since it begins and ends documents."""
    return (np.searchsorted(weights, rng.random(number)) + 1).astype(np.uint16)


def _documents(
    rng: np.random.Generator,
    weights: npt.NDArray[np.float64],
    phrases: npt.NDArray[np.uint16],
    boilerplate: npt.NDArray[np.uint16],
    num_tokens: int,
) -> EncodedDocuments:
    """Documents of about 450 tokens, the last one of 3,000."""
    chunks = _draw(rng, weights, num_tokens // _PHRASE * _PHRASE).reshape(-1, _PHRASE)
    known = np.flatnonzero(rng.random(len(chunks)) < 0.5)
    chunks[known] = phrases[rng.integers(len(phrases), size=len(known))]
    ids = chunks.reshape(-1)
    lengths = np.maximum(rng.lognormal(5.8, 0.8, num_tokens // 300).astype(np.int64), 80)
    ends = np.cumsum(lengths)
    ends = ends[ends < len(ids) - 3000]
    offsets = np.concatenate([[0], ends, [len(ids) - 3000, len(ids)]])
    with_it = offsets[:-2][rng.random(len(offsets) - 2) < _BOILERPLATE_SHARE]
    ids[with_it[:, None] + np.arange(1, 61)] = boilerplate
    ids[offsets[:-1]] = 0
    return EncodedDocuments(
        ids_N=ids, offsets_D1=offsets, prompt_lengths_D=np.ones(len(offsets) - 1, np.int64), refused={}
    )


if __name__ == "__main__":
    main("tracing", measure)
