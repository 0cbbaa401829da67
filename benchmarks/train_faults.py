"""What failures and checkpoints cost a training run. `benchmarks/train.py` takes these figures over.

Keys     fit_to_first_step_s      from `fit()` to the end of the first step, two workers, on a Ray that is there
         worker_kill_to_step_s    a worker is killed with SIGKILL: to the next finished step
         node_loss_to_step_s      of two simulated nodes one is killed, elastic [1, 2]: to the next finished step
         checkpoint_stall_share   of the time between two checkpoints, which of it the steps have waited for them
Each is the median of its raw numbers. The stall is that of a model of 17.8 M parameters on one worker with 1,024 tokens a step, with a checkpoint every
so many steps (CHECKPOINT_EVERY); the times are those of a small one, so that they are starting and finding out alone.
"""

from __future__ import annotations

import json
import pickle
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from runner import Measured, main

from aifactory.config import Architecture, Train
from aifactory.records.storage import Storage
from aifactory.text.shards import shard_bytes
from aifactory.tokens.packing import Document, pack
from aifactory.tokens.vocabulary import train_vocabulary
from aifactory.train.work import RowSet, Stored, Work, exported
from aifactory.train.worker import work

RUN = Path(__file__).parent / "fault_run.py"
CHECKPOINT_EVERY = 20
"""Steps. A run would take more: this is an upper bound."""
_WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "return", "x = 1"]
SMALL = Architecture(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, context_length=64)
LARGE = Architecture(hidden_size=384, num_layers=10, num_heads=6, context_length=512)
"""17.8 M parameters, with 300 tokens."""


def measure_faults(quick: bool, rounds: int | None) -> Measured:
    """Lose workers and nodes of small runs, and measure the stall of a larger one."""
    raw: dict[str, list[float]] = {
        "fit_to_first_step_s": [],
        "worker_kill_to_step_s": [],
        "node_loss_to_step_s": [],
        "checkpoint_stall_share": [],
    }
    for number in range(rounds or (1 if quick else 3)):
        with tempfile.TemporaryDirectory() as folder:
            small = _task(Path(folder), "small", SMALL, row_len=32, max_steps=400, every=10)
            found = _lose(small, {"workers": 2}, "--kill", "worker", "--at", "40", "--seed", str(number))
            raw["fit_to_first_step_s"].append(found["first_step_s"])
            raw["worker_kill_to_step_s"] += [s for s in found["back_s"] if s is not None]
        with tempfile.TemporaryDirectory() as folder:
            shape, row_len = (SMALL, 32) if quick else (LARGE, 512)
            large = _task(Path(folder), "large", shape, row_len=row_len, max_steps=2 * CHECKPOINT_EVERY)
            work(large)
            finished = exported(large.storage, large.run_folder)
            assert finished is not None
            raw["checkpoint_stall_share"].append(finished["figures"]["checkpoint_stall_share"])
        if quick:
            continue  # a cluster of two nodes takes too long for a proof that it runs
        with tempfile.TemporaryDirectory() as folder:
            small = _task(Path(folder), "node", SMALL, row_len=32, max_steps=1000, every=10)
            found = _lose(small, {"workers": [1, 2]}, "--nodes", "2", "--kill", "node", "--at", "40")
            raw["node_loss_to_step_s"] += [s for s in found["back_s"] if s is not None]
    figures = {key: round(statistics.median(values), 4) if values else None for key, values in raw.items()}
    return Measured(figures=figures, raw=raw)


def _lose(task: Work, runtime: dict[str, object], *options: str) -> dict[str, list[float]]:
    folder = Path(task.storage.root)
    (folder / "task").write_bytes(pickle.dumps(task))
    (folder / "runtime").write_text(json.dumps({"cpus_per_worker": 0.8, **runtime}), encoding="utf-8")
    command = [sys.executable, RUN, folder / "task", folder / "runtime", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _task(
    root: Path, name: str, architecture: Architecture, *, row_len: int, max_steps: int, every: int = CHECKPOINT_EVERY
) -> Work:
    """A run over rows of random tokens, below a root of its own."""
    storage = Storage(str(root))
    rng = random.Random(11)
    files = train_vocabulary([" ".join(rng.choices(_WORDS, k=30)) for _ in range(50)], vocab_size=300)
    for file, data in files.items():
        storage.write_bytes(data, "tokens", "tokenizer", file)
    ids = np.random.default_rng(1).integers(0, 256, (64, row_len)).tolist()
    documents = [Document(row=str(i), ids=row, loss_mask=[True] * row_len) for i, row in enumerate(ids)]
    rows = pack(documents, row_len=row_len, vocab_size=300, pad_id=0)
    shard = storage.write_bytes(shard_bytes(rows), "tokens", "shard-00000.arrow").name
    tokenizer = tuple(f"tokenizer/{file}" for file in sorted(files))
    return Work(
        storage=storage,
        run_folder=("runs", name),
        model_folder=("model", name),
        recipe=Train(max_steps=max_steps, global_batch_rows=2, warmup_steps=2),
        architecture=architecture,
        base=None,
        tokenizer=Stored(folder=("tokens",), names=tokenizer),
        row_sets=(RowSet(shards=Stored(folder=("tokens",), names=(shard,)), share=1.0),),
        micro_batch_rows=1,
        checkpoint_every_steps=every,
        num_threads=1,
    )


if __name__ == "__main__":
    main("train_faults", measure_faults)
