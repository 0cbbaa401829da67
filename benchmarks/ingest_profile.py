"""Where the data plane's time goes: CPU of each stage for a byte of text, in one process that does all of it.

    python benchmarks/ingest_profile.py [--megabytes N] [--rounds N] [--holdout-share X] [--also STEP ...] [--no-quarantine]
                                        [--ingest]

The work is that of `end to end` in benchmarks/ingest.py. Each of the functions below is timed without those of them that it
calls; what none of them took is `other`, most of which is there once for a job, whatever its size, as is `_open`. CPU of the
process (user and system), all its threads; medians of the rounds, of which one more runs first and is not counted. Writes no
result: on a machine that others use these numbers are good to a tenth, and are for comparing two trees in turns.
"""

from __future__ import annotations

import argparse
import importlib
import resource
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import update_wrapper
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from documents import write_documents
from ingest import _RULES

from aifactory import Factory
from aifactory.cluster.tasks import run_here
from aifactory.tokens.vocabulary import train_vocabulary
from aifactory.workshop.bench import Bench

_STAGES = {
    "aifactory.factory": ("list_pieces",),
    "aifactory.ingest.parquet_files:_Layout": ("load", "digest", "batches", "_longest_entry"),
    "aifactory.ingest.parquet_files": ("add_table",),
    "aifactory.ingest.pipeline": (
        *("_read_part", "read_piece", "assign_keys", "reject_empty", "apply_steps", "assign_ids", "_ledger_of"),
        *("index_of", "index_bytes", "to_ipc", "from_ipc", "decide_drops", "_write_part", "to_parquet", "_counted"),
    ),
    "aifactory.ingest.index": ("sketch",),
    "aifactory.ingest.decisions": ("_quarantined_drops",),
    "aifactory.ingest.unicode": ("repair",),
    "aifactory.ingest.quality": ("gopher_quality", "gopher_repetition", "c4_quality"),
    "aifactory.records.rows": ("_content_keys", "_content_hashes"),
    "aifactory.records.storage:Storage": ("read_bytes", "map_bytes", "write_bytes", "duplicate"),
    "aifactory.records.storage": ("_write_whole",),
    "aifactory.tokens.pipeline": ("_write_shard", "_open", "_read_part", "encode_documents", "shard_bytes"),
    "aifactory.tokens.packing": ("pack_documents",),
    "aifactory.tokens.runs": ("index_bytes",),
    "aifactory.text.encoder": ("_guarded", "_texts_with_doubtful_characters"),
    "aifactory.text.encoder:GigatokenEncoder": ("encode_texts", "_texts_with_control_ids"),
}
_OTHER = "other"
_OVER_ALL = ("near_duplicates", "decontaminate")


class _Clock:
    """CPU seconds by stage; a stage stops while another one that it calls runs."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._running = [_OTHER]
        self._at = _cpu()

    def turn(self) -> None:
        """Book what was spent since the last turn."""
        now = _cpu()
        self.spent[self._running[-1]] += now - self._at
        self._at = now

    def reset(self) -> None:
        self.turn()
        self.spent.clear()

    def enter(self, stage: str) -> None:
        self.turn()
        self._running.append(stage)

    def leave(self) -> None:
        self.turn()
        self._running.pop()

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed; of a generator each step is."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.enter(stage)
            try:
                made = function(*args, **kwargs)
            finally:
                self.leave()
            return self._steps(stage, made) if isinstance(made, Iterator) else made

        return update_wrapper(call, function)

    def _steps(self, stage: str, steps: Iterator[Any]) -> Iterator[Any]:
        while True:
            self.enter(stage)
            try:
                step = next(steps)
            except StopIteration:
                return
            finally:
                self.leave()
            yield step


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def profile(
    num_bytes: int,
    rounds: int,
    *,
    holdout_share: float,
    also: Sequence[str],
    is_quarantined: bool,
    stops_at_corpus: bool,
) -> list[dict[str, float]]:
    """CPU of each stage in nanoseconds for a byte, round by round.

    also              steps over all rows, by name
    is_quarantined    whether copies of holdouts in which words were changed are looked for
    stops_at_corpus   without tokenizing
    """
    clock = _Clock()
    for place, names in _STAGES.items():
        module, _, owner = place.partition(":")
        where = importlib.import_module(module)
        where = getattr(where, owner) if owner else where
        for name in names:
            if hasattr(where, name):  # an older tree may lack one
                setattr(where, name, clock.timed(f"{module.removeprefix('aifactory.')}.{name}", getattr(where, name)))
    Bench.run_for = lambda self, num_bytes: run_here  # type: ignore[method-assign]
    found = []
    with tempfile.TemporaryDirectory(prefix="aifactory-profile-") as folder:
        data, tokenizer = Path(folder) / "data", Path(folder) / "tokenizer"
        write_documents(data, num_bytes)
        texts = [pq.read_table(file, columns=["text"])["text"] for file in sorted(data.glob("*.parquet"))]
        size = sum(pc.sum(pc.binary_length(column)).as_py() for column in texts)
        tokenizer.mkdir()
        for name, content in train_vocabulary(texts[0][:10_000].to_pylist(), vocab_size=16_384).items():
            (tokenizer / name).write_bytes(content)
        del texts
        for number in range(rounds + 1):
            with tempfile.TemporaryDirectory(dir=folder) as storage:
                config = {
                    "name": "profile",
                    "ingest": {
                        "sources": [{"name": "documents", "kind": "parquet", "path": str(data)}],
                        "steps": [*_RULES, *({"step": step} for step in also)],
                        "holdout_share": holdout_share,
                        **({} if is_quarantined else {"quarantine_similarity": None}),
                    },
                    "tokenize": {"tokenizer": str(tokenizer), "row_len": 1024},
                    "runtime": {"storage": storage},
                }
                file = Path(storage) / "config.yaml"
                file.write_text(yaml.safe_dump(config), encoding="utf-8")
                with Factory.from_yaml(file) as factory:
                    clock.reset()
                    _ = factory.ingest() if stops_at_corpus else factory.tokenize()
                    clock.turn()
            if number:
                found.append({stage: spent / size * 1e9 for stage, spent in clock.spent.items()})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=64, metavar="N", help="text, MB")
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="so many rounds, after one that is not counted"
    )
    parser.add_argument("--holdout-share", type=float, default=1e-9, metavar="X", help="share of the rows held out")
    parser.add_argument("--also", nargs="+", default=[], choices=_OVER_ALL, metavar="STEP", help="steps over all rows")
    parser.add_argument("--no-quarantine", action="store_true", help="look for exact copies of holdouts alone")
    parser.add_argument("--ingest", action="store_true", help="make the corpus, no tokens")
    arguments = parser.parse_args()
    rounds = profile(
        arguments.megabytes * 1_000_000,
        arguments.rounds,
        holdout_share=arguments.holdout_share,
        also=arguments.also,
        is_quarantined=not arguments.no_quarantine,
        stops_at_corpus=arguments.ingest,
    )
    medians = {
        stage: statistics.median(spent.get(stage, 0.0) for spent in rounds)
        for stage in {stage for spent in rounds for stage in spent}
    }
    for stage, spent in sorted(medians.items(), key=lambda item: -item[1]):
        print(f"{spent:7.2f}  {stage}")
    total = statistics.median(sum(spent.values()) for spent in rounds)
    print(f"{total:7.2f}  ns of CPU for a byte of text, median of {len(rounds)} rounds")


if __name__ == "__main__":
    main()
