"""Rows: what a corpus is made of, and the ids that follow each of them.

key      names a row for good: the file that it is (code, text), or its content (records, feedback). A hash of the key
         decides whether it trains or is held out, so an edited file never changes its side.
id       names one text: the hash of the key and the content.
cluster  rows that are not independent of one another share it (a user, a file): intervals resample clusters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from aifactory.errors import StorageError
from aifactory.records.artifacts import Artifact
from aifactory.records.identity import hash_parts
from aifactory.records.storage import Storage

CORPUS_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("key", pa.string()),
        ("cluster", pa.string()),
        ("source", pa.string()),
        ("origin", pa.string()),
        ("position", pa.int64()),
        ("side", pa.string()),
        ("content_hash", pa.string()),
        ("prompt", pa.string()),
        ("text", pa.string()),
        ("messages", pa.string()),
        ("rejected", pa.string()),
        ("label", pa.string()),
        ("language", pa.string()),
        ("user", pa.string()),
        ("timestamp", pa.string()),
        ("weight", pa.float64()),
    ]
)
"""A row of a corpus; no value is null, and what a source does not say is "" (weight: 1).

origin     the file it came from, below the source's path; the table; or the completion that was corrected
position   line, record or row in the file, from 0
side       train or holdout
prompt     "" for plain text
text       the text, the answer, or of two answers the one that was preferred
messages   the turns before the answer as JSON [{"role": ..., "content": ...}]
rejected   of two answers the other one
"""
LEDGER_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("key", pa.string()),
        ("source", pa.string()),
        ("origin", pa.string()),
        ("position", pa.int64()),
        ("rule", pa.string()),
        ("score", pa.float64()),
        ("detail", pa.string()),
        ("prompt", pa.string()),
        ("text", pa.string()),
        ("user", pa.string()),
        ("label", pa.string()),
    ]
)
_ID_DIGITS = 32
_PAGE_BYTES = 8 << 20
_UNLIKE = frozenset(
    {"id", "key", "cluster", "position", "content_hash", "prompt", "text", "messages", "rejected", "detail"}
)
"""Columns of which hardly two values are equal: a dictionary would be no shorter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A line of the ledger: a row that was not kept, why, and all that it takes to bring it back."""

    source: str
    origin: str
    position: int
    rule: str
    score: float
    """What the rule measured; its unit is the rule's."""
    detail: str
    text: str
    prompt: str = ""
    id: str = ""
    """The row's id; derived where the row never became one."""
    key: str = ""
    """What names the row for good; "" where it never became one, and so can't be restored."""
    user: str = ""
    label: str = ""

    def to_ledger(self) -> dict[str, object]:
        values = asdict(self)
        values["id"] = self.id or hash_parts(self.source, self.origin, str(self.position), self.text)[:_ID_DIGITS]
        return values


def assign_keys(
    block: pa.Table, *, source: str, keyed_by_file: bool, holdout_share: float | npt.NDArray[np.float64]
) -> pa.Table:
    """What a source says (N rows), with what names each row for good: source, key, cluster, side.

    keyed_by_file   a file is a row, and its name below the source names it for good; else the content does, as the
                    source has it: what the steps make of it changes no side.
    holdout_share   of all rows, or of each: the chance that its key holds it out
    """
    keys_N2 = (
        _file_keys(source, block["origin"])
        if keyed_by_file
        else _mixed(_content_keys(block), _lanes(hashlib.sha256(source.encode()).digest()))
    )
    keys, users = hex_of(keys_N2), one_array(block["user"])
    named = {
        "source": pa.array([source] * block.num_rows, pa.string()),
        "key": keys,
        "cluster": pc.if_else(pc.equal(users, ""), keys, users),
        "side": pc.if_else(pa.array(shares_of(keys_N2) < holdout_share), "holdout", "train"),
        "language": pa.array([""] * block.num_rows, pa.string()),
    }
    for name, column in named.items():
        block = block.append_column(name, column)
    return block


def assign_ids(rows: pa.Table) -> pa.Table:
    """Rows of CORPUS_SCHEMA: each with the hash of its content as it is now, and the id of its key and that."""
    keys_N2, contents_N2 = hash_lanes(rows["key"]), _content_hashes(rows)
    ids_N2 = _mixed(keys_N2 ^ contents_N2[:, ::-1], keys_N2)
    for name, hashes_N2 in (("content_hash", contents_N2), ("id", ids_N2)):
        rows = rows.append_column(name, hex_of(hashes_N2))
    return rows.select(CORPUS_SCHEMA.names)


def one_array(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array; pyarrow's `combine_chunks` copies it also where it is one already."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def shares_of(keys_N2: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """N numbers in [0, 1) that depend on the keys alone; rows with less than x of it are a share of x."""
    mixed = _mixed(keys_N2, _lanes(hashlib.sha256(b"holdout").digest()))
    shares: npt.NDArray[np.float64] = (mixed[:, 0] >> np.uint64(11)).astype(np.float64) / 2.0**53
    return shares


def hash_lanes(hashes: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    """N hashes of 32 hexadecimal digits (ids, keys, content hashes) as two 64-bit numbers each, N x 2."""
    text = "".join(hashes.to_pylist())
    return np.frombuffer(bytes.fromhex(text), ">u8").astype(np.uint64).reshape(-1, 2)


def _content_hashes(block: pa.Table) -> npt.NDArray[np.uint64]:
    """The first 128 bits of SHA-256 over prompt and text, and over turns and the rejected answer where there are any.

    What is equal by it is taken for equal, whoever wrote it.
    """
    return _hashes(block, hashlib.sha256)


def _content_keys(block: pa.Table) -> npt.NDArray[np.uint64]:
    """The same by XXH3 with 128 bits (Collet 2019), which takes no time and keeps no one from making two rows share a name."""
    return _hashes(block, xxhash.xxh3_128)


def _hashes(block: pa.Table, new: Callable[[bytes], Any]) -> npt.NDArray[np.uint64]:
    columns = [one_array(block[name]) for name in ("prompt", "text", "messages", "rejected")]
    has_prompts, has_messages, has_rejected = (_total_bytes(columns[i]) > 0 for i in (0, 2, 3))
    has_more = has_messages or has_rejected
    digests: list[bytes] = []
    if not has_prompts and not has_more:
        for text in _views(columns[1]):
            state = new(b"0:%d:" % len(text))
            state.update(text)
            digests.append(state.digest()[:16])
    else:
        for parts in zip(*map(_views, columns if has_more else columns[:2]), strict=True):
            state = new(b"")
            for part in parts if any(map(len, parts[2:])) else parts[:2]:
                state.update(b"%d:" % len(part))
                state.update(part)
            digests.append(state.digest()[:16])
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64).reshape(-1, 2)


def _total_bytes(texts: pa.Array) -> int:
    return int(pc.sum(pc.binary_length(texts)).as_py() or 0)


def _views(texts: pa.Array) -> Iterator[memoryview]:
    """Each text's bytes where they lie."""
    _, offsets, data = texts.buffers()
    whole = memoryview(b"" if data is None else data)
    ends = [0] * (len(texts) + 1)
    if data is not None:
        ends = np.frombuffer(offsets, np.int32, len(texts) + 1, texts.offset * 4).tolist()
    for start, end in pairwise(ends):
        yield whole[start:end]


def _file_keys(source: str, origins: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    digests = b"".join(bytes.fromhex(hash_parts(source, origin)[:32]) for origin in origins.to_pylist())
    return np.frombuffer(digests, ">u8").astype(np.uint64).reshape(-1, 2)


def _lanes(digest: bytes) -> npt.NDArray[np.uint64]:
    return np.frombuffer(digest[:16], ">u8").astype(np.uint64)


def _mixed(lanes_N2: npt.NDArray[np.uint64], salt: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A permutation of 128-bit numbers for every salt, of which each bit depends on all bits.

    Source   the finaliser of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators",
             section 4), over two lanes in four Feistel rounds.
    """
    left, right = lanes_N2[:, 0] ^ salt[..., 0], lanes_N2[:, 1] ^ salt[..., 1]
    for _ in range(2):
        left = left ^ _finalised(right)
        right = right ^ _finalised(left)
    return np.stack([left, right], axis=-1)


def _finalised(lane: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    lane = lane + np.uint64(0x9E3779B97F4A7C15)
    lane = (lane ^ (lane >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    lane = (lane ^ (lane >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return lane ^ (lane >> np.uint64(31))


def hex_of(lanes_N2: npt.NDArray[np.uint64]) -> pa.Array:
    """N hashes of two 64-bit numbers each as 32 hexadecimal digits: the inverse of `hash_lanes`."""
    digits = lanes_N2.astype(">u8").tobytes().hex().encode()
    offsets = np.arange(0, len(digits) + 1, _ID_DIGITS, dtype=np.int32)
    return pa.StringArray.from_buffers(len(lanes_N2), pa.py_buffer(offsets), pa.py_buffer(digits))


def read_corpus(
    storage: Storage, corpus: Artifact, *, columns: Sequence[str], side: str | None = None
) -> Iterator[tuple[str, pa.Table]]:
    """The kept rows of a corpus, of one side or of both, part by part: the part's name and its table."""
    for name in part_names(corpus, side=side):
        yield name, _read(storage, corpus, name, columns)


def part_names(corpus: Artifact, *, side: str | None = None) -> list[str]:
    """The files of a corpus that hold its kept rows, in order: of one side, or of both."""
    sides = ("train", "holdout") if side is None else (side,)
    return [name for s in sides for name in sorted(f.name for f in corpus.record.files if f.name.startswith(f"{s}-"))]


def index_names(corpus: Artifact) -> list[str]:
    """The files of a corpus with the index of its rows, in order."""
    return sorted(file.name for file in corpus.record.files if file.name.startswith("index-"))


def read_part(storage: Storage, corpus: Artifact, index_name: str) -> pa.Table:
    """The rows that an index is of, in its order: those that train, then those that are held out."""
    number = index_name.removeprefix("index-").removesuffix(".arrow")
    names = {file.name for file in corpus.record.files}
    sides = [name for side in ("train", "holdout") if (name := f"{side}-{number}.parquet") in names]
    tables = [_read(storage, corpus, name, None) for name in sides]
    return pa.concat_tables([CORPUS_SCHEMA.empty_table(), *tables])


def read_ledger(storage: Storage, corpus: Artifact, *, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The ledger of a corpus, part by part."""
    for name in sorted(file.name for file in corpus.record.files if file.name.startswith("rejected-")):
        yield _read(storage, corpus, name, columns)


def _read(storage: Storage, corpus: Artifact, name: str, columns: Sequence[str] | None) -> pa.Table:
    data = storage.read_bytes(corpus.kind, corpus.fingerprint[:16], name)
    if data is None:
        raise StorageError(f"expected {corpus.uri}/{name}, found no such file; move the corpus away and ingest again.")
    return from_parquet(data, columns)


class _Pieces:
    """A file that keeps what is written to it as it is: nothing is copied, and no buffer grows."""

    closed = False

    def __init__(self) -> None:
        self.found: list[bytes | memoryview] = []

    def write(self, data: Any) -> int:
        piece = memoryview(data).cast("B")
        self.found.append(piece)
        return piece.nbytes

    def writable(self) -> bool:
        return True

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def to_parquet(rows: pa.Table) -> list[bytes | memoryview]:
    """Rows as the bytes of a Parquet file, which depend on the rows alone, in pieces that follow one another."""
    sink = _Pieces()
    names = [name for name in rows.column_names if name not in _UNLIKE]
    # Large pages: a page of the default size holds few documents, and each costs as much as some more of them.
    pq.write_table(
        rows,
        pa.PythonFile(sink, mode="w"),
        use_dictionary=names,
        write_statistics=False,
        compression="zstd",
        compression_level=1,
        data_page_size=_PAGE_BYTES,
    )
    return sink.found


def from_parquet(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows, or some of their columns, of a Parquet file's bytes."""
    return pq.read_table(pa.BufferReader(data), columns=None if columns is None else list(columns), use_threads=False)


def to_ipc(rows: pa.Table) -> list[bytes | memoryview]:
    """Rows as the bytes of an Arrow IPC file, in pieces that follow one another: for what is read again at once, by which
    it takes no time. The texts are not copied: what they lie in must stay as it is until all is written."""
    sink = _Pieces()
    with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), rows.schema) as writer:
        writer.write_table(rows)
    return sink.found


def from_ipc(data: bytes | pa.Buffer, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows, or some of their columns, of an Arrow IPC file's bytes, where they lie."""
    rows = pa.ipc.open_file(pa.BufferReader(data)).read_all()
    return rows if columns is None else rows.select(list(columns))
