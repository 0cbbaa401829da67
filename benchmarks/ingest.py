"""The data plane's speed and memory, beside datatrove and datasets and beside what the encoder alone could do.

Keys     end_to_end_over_datatrove   time of datatrove for the same work on the same data, over ours
         tokenize_over_datasets      time of `datasets.map(num_proc=2)` to tokenize the corpus, over ours, which packs it too
         end_to_end_over_limit       end_to_end_mb_s over two times what the fastest encoder does in one thread, alone
         end_to_end_mb_s             from Parquet to packed shards, MB of UTF-8 read in a second
         peak_memory_10x_ratio       peak memory of ten times the data over that of the data
         peak_memory_bytes           of the larger: driver, Ray's processes and workers, the sum of their PSS
         near_dedup_s                `ingest` of 100,000 documents with the step `near_duplicates`
         near_dedup_recall           share of the planted copies, exact and near, of which one alone is kept
         near_dedup_precision        share of the rows rejected as near-duplicates whose exact Jaccard similarity of runs
                                     of three words with the row that the ledger names is at least 0.4
         fixed_cost_s                `aifactory tokenize` as a command on 1 MB, everything included
Each is the median of its raw numbers; a ratio is that of two neighbours in time. 1 MB is 10^6 bytes. Two processes of one
thread each, here and in the peers. The peers want `make peers`; without them their keys are null.

End to end is: read Parquet, Unicode NFC, the rules of Gopher (quality, repetition) and C4, exact deduplication,
tokenize with a byte-level BPE of 16,384 entries, which is given as a folder, pack (ours alone), write.

Clock    ours from the call of `Factory.tokenize` to its return, in a Ray session that is connected and has done such work
         once; the configuration is read and the books are opened before it. Each time in a storage root of its own, so
         nothing is there to be taken over. The peers from their first step to their last; their imports are before it.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from documents import Planted, write_documents
from runner import Measured, main

from aifactory import Factory

_HERE = Path(__file__).resolve().parent
_PEERS = _HERE.parent / ".peers"
_WORKERS = 2
_RULES: list[dict[str, object]] = [
    # The normal form alone, as the peer has it: mending mojibake would change a text in 20,000.
    {"step": "unicode", "form": "nfc", "mojibake": False, "line_ends": False, "controls": False},
    {"step": "gopher_quality"},
    {"step": "gopher_repetition"},
    {"step": "c4"},
]
_NEAR_DUPLICATES = [{"step": "near_duplicates"}]
_LEAST_JACCARD = 0.4
_SAMPLE_S = 0.25
_FIGURES = (
    "end_to_end_over_datatrove",
    "tokenize_over_datasets",
    "end_to_end_over_limit",
    "end_to_end_mb_s",
    "peak_memory_10x_ratio",
    "peak_memory_bytes",
    "near_dedup_s",
    "near_dedup_recall",
    "near_dedup_precision",
    "fixed_cost_s",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is measured."""

    rounds: int
    end_to_end_bytes: int
    memory_bytes: int
    """And ten times as many."""
    peer_bytes: int
    near_documents: int
    num_sentences: int
    peer_timeout_s: float


FULL = Sizes(
    rounds=3,
    end_to_end_bytes=2_000_000_000,
    memory_bytes=200_000_000,
    peer_bytes=100_000_000,
    near_documents=100_000,
    num_sentences=200_000,
    peer_timeout_s=300,
)
# The same path, for the proof that it runs. More than the driver works on by itself, so that Ray has a part in it.
QUICK = Sizes(
    rounds=1,
    end_to_end_bytes=20_000_000,
    memory_bytes=1_000_000,
    peer_bytes=4_000_000,
    near_documents=5_000,
    num_sentences=5_000,
    peer_timeout_s=12,
)


def measure(quick: bool, rounds: int | None) -> Measured:
    """Measure all of it."""
    sizes = QUICK if quick else FULL
    with tempfile.TemporaryDirectory(prefix="aifactory-benchmark-") as folder:
        bench = _Bench(Path(folder), replace(sizes, rounds=rounds or sizes.rounds))
        bench.prepare()
        bench.fixed_cost()
        bench.peak_memory()
        with _session():
            bench.warm_up()
            bench.end_to_end()
            bench.beside_datatrove()
            bench.beside_datasets()
            bench.near_duplicates()
        return bench.measured()


class _Bench:
    """Raw numbers, as they come in."""

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        self._folder = folder
        self._sizes = sizes
        self._raw: dict[str, list[float]] = defaultdict(list)
        self._notes: list[str] = []
        self._peers: dict[str, dict[str, object]] = {}
        self._planted: list[Planted] = []
        self._tokenizer = folder / "tokenizer"

    def measured(self) -> Measured:
        figures = {name: _median(self._raw.get(name, [])) for name in _FIGURES}
        return Measured(figures=figures, raw=dict(self._raw), notes=self._notes, peers=self._peers)

    # ── what is measured ──────────────────────────────────────────────────────────────────────────────────────────────

    def prepare(self) -> None:
        """Documents, and the tokenizer for all of it."""
        sizes, data = self._sizes, self._folder / "data"
        for name, num_bytes in (
            ("tiny", 1_000_000),
            ("peer", sizes.peer_bytes),
            ("memory", sizes.memory_bytes),
            ("memory-10x", 10 * sizes.memory_bytes),
            ("end-to-end", sizes.end_to_end_bytes),
        ):
            if name == "end-to-end" and sizes.end_to_end_bytes == 10 * sizes.memory_bytes:
                (data / name).symlink_to(data / "memory-10x")
                continue
            self._write(name, num_bytes)
        # Documents are 2,000 characters and half a sentence long, in bytes a little more.
        self._planted = self._write("near", 2_120 * sizes.near_documents, spoilt_share=0.0)
        _say("a tokenizer")
        from aifactory.tokens.vocabulary import train_vocabulary

        texts = pq.read_table(sorted((data / "end-to-end").glob("*.parquet"))[0], columns=["text"])["text"][:10_000]
        self._tokenizer.mkdir()
        for name, content in train_vocabulary(texts.to_pylist(), vocab_size=16_384).items():
            (self._tokenizer / name).write_bytes(content)

    def fixed_cost(self) -> None:
        """The command on 1 MB."""
        for _ in range(self._sizes.rounds):
            config = self._config("tiny", _RULES)
            _say("the command on 1 MB")
            start = time.perf_counter()
            done = subprocess.run(_command(config), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            _require(done.returncode == 0, done.args, done.stderr)
            self._raw["fixed_cost_s"].append(time.perf_counter() - start)
            self._clear(config)

    def peak_memory(self) -> None:
        """The command, watched; for speed it runs again without a watcher."""
        for name in ("memory", "memory-10x"):
            config = self._config(name, _RULES)
            _say(f"peak memory on {_text_bytes(self._data(name)) / 1e6:.0f} MB")
            with tempfile.TemporaryFile() as errors:
                command = subprocess.Popen(_command(config), stdout=subprocess.DEVNULL, stderr=errors)
                peak = _watch(command.pid)
                succeeded = command.wait() == 0
                errors.seek(0)
                _require(succeeded, command.args, errors.read().decode())
            self._raw[f"{name}_peak_bytes"].append(float(peak))
            self._clear(config)
        small, large = self._raw["memory_peak_bytes"][0], self._raw["memory-10x_peak_bytes"][0]
        self._raw["peak_memory_bytes"].append(large)
        self._raw["peak_memory_10x_ratio"].append(large / small)

    def warm_up(self) -> None:
        """Once, so that no round pays for workers that start and for what they import."""
        config = self._config("peer", _RULES)
        with Factory.from_yaml(config) as factory:
            factory.tokenize()
        self._clear(config)

    def end_to_end(self) -> None:
        """Ours and the limit, in turns."""
        data = self._data("end-to-end")
        size = _text_bytes(data)
        for _ in range(self._sizes.rounds):
            config = self._config("end-to-end", _RULES)
            _say(f"end to end on {size / 1e6:.0f} MB")
            with Factory.from_yaml(config) as factory:
                seconds = _seconds(factory.tokenize)
            self._clear(config)
            _say("the encoders alone")
            speeds = _alone(encoder_speeds, data, self._tokenizer)
            speed, limit = size / seconds / 1e6, _WORKERS * max(speeds.values())
            for name, found in speeds.items():
                self._raw[f"{name}_mb_s"].append(found)
            self._raw["end_to_end_mb_s"].append(speed)
            self._raw["end_to_end_over_limit"].append(speed / limit)

    def beside_datatrove(self) -> None:
        """Ours and datatrove, in turns; that both keep the same texts and find the same tokens."""
        size = _text_bytes(self._data("peer"))
        for round_ in range(self._sizes.rounds):
            config = self._config("peer", _RULES)
            _say("end to end, beside datatrove")
            with Factory.from_yaml(config) as factory:
                seconds = _seconds(factory.tokenize)
                if not round_:
                    ours = _counts(factory)
            self._clear(config)
            self._raw["end_to_end_peer_data_mb_s"].append(size / seconds / 1e6)
            found = self._run_peer("datatrove", "datatrove_ingest.py", self._data("peer"))
            if found is None:
                return
            self._raw["datatrove_mb_s"].append(size / found["seconds"] / 1e6)
            self._raw["end_to_end_over_datatrove"].append(found["seconds"] / seconds)
        theirs = {name: found[name] for name in ours}
        self._notes.append(
            f"beside datatrove, {size / 1e6:.0f} MB: ours kept {ours['documents']:,} documents of {ours['tokens']:,} tokens, "
            f"datatrove {theirs['documents']:,} of {theirs['tokens']:,}, without those that begin and end a document; "
            f"the texts that were kept are {'the same' if ours == theirs else 'NOT the same'}"
        )

    def beside_datasets(self) -> None:
        """Tokenizing alone, of the corpus that ours has made."""
        for _ in range(self._sizes.rounds):
            config = self._config("peer", _RULES)
            _say("tokenizing alone, beside datasets")
            with Factory.from_yaml(config) as factory:
                corpus = factory.ingest()
                seconds = _seconds(factory.tokenize)
                size, ours = corpus.figures["bytes_kept"], _counts(factory)
                folder = self._folder / "corpus"
                folder.mkdir()
                for file in Path(corpus.uri).glob("train-*.parquet"):
                    os.link(file, folder / file.name)
            self._clear(config)
            found = self._run_peer("datasets", "datasets_tokenize.py", folder)
            shutil.rmtree(folder)
            self._raw["tokenize_mb_s"].append(size / seconds / 1e6)
            if found is None:
                return
            self._raw["datasets_mb_s"].append(size / found["seconds"] / 1e6)
            self._raw["tokenize_over_datasets"].append(found["seconds"] / seconds)
        self._notes.append(
            f"beside datasets, {size / 1e6:.0f} MB: ours found {ours['tokens']:,} tokens in {ours['documents']:,} documents, "
            f"datasets {found['tokens']:,} in {found['documents']:,}"
        )

    def near_duplicates(self) -> None:
        """`ingest` with the step and without any, in turns; what it found of what was planted."""
        for round_ in range(self._sizes.rounds):
            for key, steps in (("near_dedup_s", _NEAR_DUPLICATES), ("ingest_without_steps_s", [])):
                config = self._config("near", steps)
                _say(
                    f"ingest of {self._sizes.near_documents:,} documents, {'with' if steps else 'without'} near_duplicates"
                )
                with Factory.from_yaml(config) as factory:
                    self._raw[key].append(_seconds(factory.ingest))
                    if steps and not round_:
                        self._judge(Path(factory.ingest().uri))
                self._clear(config)

    def _judge(self, corpus: Path) -> None:
        """Recall and precision, from the corpus and its ledger."""
        kept = _read(corpus, ("train", "holdout"), ["id", "text"])
        gone = _read(corpus, ("rejected",), ["id", "rule", "detail", "text"])
        # By their texts, which nothing has changed: of equal ones it is all the same which of them stay.
        left, stays = Counter(kept["text"].to_pylist()), set()
        for row in _read(self._data("near"), ("documents",), ["id", "text"]).to_pylist():
            if left[row["text"]]:
                left[row["text"]] -= 1
                stays.add(row["id"])
        near, exact = recalls(self._planted, stays)
        num_exact = sum(planted.is_exact for planted in self._planted)
        num_near = len(self._planted) - num_exact
        self._raw["near_dedup_recall_of_near"].append(near)
        self._raw["near_dedup_recall_of_exact"].append(exact)
        self._raw["near_dedup_recall"].append((near * num_near + exact * num_exact) / len(self._planted))
        named = gone.filter(pc.equal(gone["rule"], "near_duplicate"))
        texts = dict(
            zip(
                kept["id"].to_pylist() + gone["id"].to_pylist(),
                kept["text"].to_pylist() + gone["text"].to_pylist(),
                strict=True,
            )
        )
        pairs = [
            (text, texts[detail.removeprefix("like ")])
            for text, detail in zip(named["text"].to_pylist(), named["detail"].to_pylist(), strict=True)
        ]
        found = [jaccard(one, other) for one, other in pairs]
        if found:
            self._raw["near_dedup_precision"].append(float(np.mean(np.array(found) >= _LEAST_JACCARD)))
        self._notes.append(
            f"near-duplicates: {kept.num_rows + gone.num_rows:,} documents with {num_near:,} near and {num_exact:,} exact "
            f"copies; {len(found):,} rows rejected as near_duplicate, {gone.num_rows - len(found):,} by other rules"
        )

    # ── how ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _data(self, name: str) -> Path:
        return self._folder / "data" / name

    def _write(self, name: str, num_bytes: int, **options: float) -> list[Planted]:
        _say(f"{num_bytes / 1e6:.0f} MB of documents")
        # At least two files for each worker: the peers take whole files.
        return write_documents(
            self._data(name),
            num_bytes,
            file_bytes=min(64_000_000, 1 + num_bytes // (2 * _WORKERS)),
            num_sentences=self._sizes.num_sentences,
            **options,
        )

    def _config(self, data: str, steps: Sequence[Mapping[str, object]]) -> Path:
        """A configuration with a storage root that nobody has used."""
        storage = Path(tempfile.mkdtemp(prefix="storage-", dir=self._folder))
        config = {
            "name": "benchmark",
            "ingest": {
                "sources": [{"name": "documents", "kind": "parquet", "path": str(self._data(data).resolve())}],
                "steps": [dict(step) for step in steps],
                "holdout_share": 1e-9,  # so that every document is tokenized, as the peers do
            },
            "tokenize": {"tokenizer": str(self._tokenizer), "row_len": 1024},
            "runtime": {"storage": str(storage), "data_tasks": _WORKERS, "cpus_per_worker": 1.0},
        }
        file = storage / "config.yaml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        return file

    def _clear(self, config: Path) -> None:
        shutil.rmtree(config.parent)

    def _run_peer(self, name: str, script: str, data: Path) -> dict[str, Any] | None:
        """What a peer prints; None where it isn't installed or takes too long."""
        python = _PEERS / name / "bin" / "python"
        if not python.exists():
            self._notes.append(f"{name} is not installed: make peers")
            return None
        out = self._folder / "out"
        command = [python, _HERE / "peers" / script, "--data", data, "--tokenizer", self._tokenizer]
        command += ["--out", out, "--workers", str(_WORKERS)]
        alone = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        try:
            done = subprocess.run(
                [str(word) for word in command],
                capture_output=True,
                text=True,
                env={**os.environ, **alone},
                timeout=self._sizes.peer_timeout_s,
            )
        except subprocess.TimeoutExpired:
            self._notes.append(f"{name} took more than {self._sizes.peer_timeout_s:g} s")
            return None
        finally:
            shutil.rmtree(out, ignore_errors=True)
        _require(done.returncode == 0, done.args, done.stderr)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        shown = [f".peers/{name}/bin/python", f"benchmarks/peers/{script}", "--workers", str(_WORKERS)]
        self._peers[name] = {"command": shlex.join(shown), "environment": alone, "versions": found["versions"]}
        return found


# ── the limit ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def encoder_speeds(data: Path, tokenizer_folder: Path) -> dict[str, float]:
    """MB/s of the project's encoder and of the library below it, on one thread of this process, which does nothing else.

    The texts lie in memory when the clock starts.
    """
    from aifactory.text.encoder import open_encoder
    from aifactory.text.tokenizer import load_tokenizer

    encoder = open_encoder(load_tokenizer(tokenizer_folder))
    encode: dict[str, Callable[[pa.Array], object]] = {"encoder": encoder.encode_texts}
    if encoder.library == "gigatoken":
        encode["gigatoken"] = _gigatoken(tokenizer_folder)
    seconds = dict.fromkeys(encode, 0.0)
    num_bytes = 0
    for file in sorted(data.glob("*.parquet")):
        texts = pq.read_table(file, columns=["text"])["text"].combine_chunks()
        num_bytes += pc.sum(pc.binary_length(texts)).as_py()
        for name, function in encode.items():
            start = time.perf_counter()
            function(texts)
            seconds[name] += time.perf_counter() - start
    return {name: num_bytes / spent / 1e6 for name, spent in seconds.items()}


def _gigatoken(tokenizer_folder: Path) -> Callable[[pa.Array], object]:
    """gigatoken itself, without what the project's encoder checks and bounds."""
    import awkward
    from gigatoken.gigatoken_rs import load_hf_json

    from aifactory.text.buffers import text_buffers

    opened = load_hf_json((tokenizer_folder / "tokenizer.json").read_bytes())

    def encode(texts: pa.Array) -> object:
        data, offsets = text_buffers(texts)
        strings = awkward.contents.ListOffsetArray(
            awkward.index.Index64(offsets),
            awkward.contents.NumpyArray(data, parameters={"__array__": "char"}),
            parameters={"__array__": "string"},
        )
        return opened.encode_batch(awkward.Array(strings), parallel=False)

    return encode


def _alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


# ── memory ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _watch(pid: int) -> int:
    """The most bytes that a process and its descendants have had at once, until it ends."""
    peak = 0
    root = psutil.Process(pid)
    while root.is_running() and root.status() != psutil.STATUS_ZOMBIE:
        peak = max(peak, sum(_pss(process) for process in [root, *root.children(recursive=True)]))
        time.sleep(_SAMPLE_S)
    return peak


def _pss(process: psutil.Process) -> int:
    """Bytes of a process, of what is shared its part alone. 0 for one that is gone."""
    try:
        return int(process.memory_full_info().pss)
    except (psutil.Error, OSError):
        return 0


# ── copies ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def recalls(planted: Sequence[Planted], stays: set[int]) -> tuple[float, float]:
    """Of the near copies, and of the exact ones, the share that was found.

    An original, its near copies and its exact copies are a family: of the different texts in it one should stay, and of
    equal texts one. What stays beyond that was not found, whichever of them it is.
    """
    near_of: dict[int, list[int]] = defaultdict(list)
    equal_to: dict[int, list[int]] = defaultdict(list)
    for each in planted:
        (equal_to if each.is_exact else near_of)[each.original].append(each.copy)
    missed_near = missed_exact = 0
    for original in near_of.keys() | equal_to.keys():
        equal = sum(number in stays for number in (original, *equal_to[original]))
        missed_exact += max(0, equal - 1)
        texts = min(1, equal) + sum(number in stays for number in near_of[original])
        missed_near += max(0, texts - 1)
    num_exact = sum(each.is_exact for each in planted)
    num_near = len(planted) - num_exact
    return 1 - missed_near / max(1, num_near), 1 - missed_exact / max(1, num_exact)


def jaccard(one: str, other: str) -> float:
    """The Jaccard similarity of the runs of three words of two texts."""
    left, right = _runs(one), _runs(other)
    return len(left & right) / max(1, len(left | right))


def _runs(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return set(zip(words, words[1:], words[2:], strict=False)) or {tuple(words)}


# ── ours ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _session() -> Iterator[None]:
    """A Ray session in which several factories are opened one after another."""
    from aifactory.cluster.session import connect, disconnect

    _say("a Ray session")
    connect("benchmark")
    try:
        yield
    finally:
        disconnect()


def _command(config: Path) -> list[str]:
    return [sys.executable, "-m", "aifactory", "tokenize", str(config)]


def _counts(factory: Factory) -> dict[str, object]:
    """What to compare with a peer: documents, tokens of their texts, and the texts."""
    tokens, corpus = factory.tokenize(), Path(factory.ingest().uri)
    documents = int(tokens.figures["documents"])
    texts = _read(corpus, ("train", "holdout"), ["text"])["text"]
    digests = sorted({hashlib.sha256(text.encode()).digest() for text in texts.to_pylist()})
    return {
        "documents": documents,
        "tokens": tokens.num_tokens - 2 * documents,
        "texts_digest": hashlib.sha256(b"".join(digests)).hexdigest(),
    }


def _require(succeeded: bool, command: object, errors: str) -> None:
    if not succeeded:
        raise RuntimeError(f"expected {command} to succeed, found:\n{errors[-4000:]}")


def _read(corpus: Path, names: Sequence[str], columns: list[str]) -> pa.Table:
    files = [file for name in names for file in sorted(corpus.glob(f"{name}-*.parquet"))]
    return pa.concat_tables([pq.read_table(file, columns=columns) for file in files])


def _text_bytes(data: Path) -> int:
    """UTF-8 in the column of texts."""
    return sum(
        pc.sum(pc.binary_length(batch["text"])).as_py()
        for file in data.glob("*.parquet")
        for batch in pq.ParquetFile(file).iter_batches(columns=["text"])
    )


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _median(values: Sequence[float]) -> float | None:
    return round(statistics.median(values), 4) if values else None


def _say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main("ingest", measure)
