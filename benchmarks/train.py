"""Training beside the bare loop, transformers' Trainer, trl's SFTTrainer and lightning, and what workers, failures and start-up
cost.

Keys     ray_over_bare             tokens/s of the whole path on Ray over that of the plainest torch loop
         over_hf_trainer           over transformers' `Trainer`
         over_trl_sft              over `trl.SFTTrainer` with packing, equal tokens a step
         over_lightning            over lightning's `Trainer`
         ddp2_over_1               two workers of one thread over one worker of one thread, DDP
         fsdp2_over_ddp2           two workers, FSDP2 over DDP
         bare2_over_1              the limit of those two: two bare loops at once that share nothing, over one
         ddp2_over_bare2           what of that limit DDP reaches
         data_wait_share           share of a run in which the step waits for rows
         checkpoint_stall_share    how long the loop stands still for a checkpoint, over the 100 steps that it protects
         fit_to_first_step_s       from the call that begins a run to its first finished step
         worker_kill_to_step_s     from the kill of a worker to the next finished step
         node_loss_to_step_s       from the loss of a node to the next finished step
         across_workers_cost       how much longer a step takes with `reproducible: across_workers`, two workers (0.1: a tenth)
Of the first four each model and type is measured, and the least of their ratios is the figure; raw numbers have them all
(`<contender>_<parameters>_<type>_tokens_per_s`). A ratio is that of two neighbours in time, a figure the median of
its rounds. 17m: hidden 384, 6 layers; 110m: hidden 768, 14 layers; both with a tied vocabulary of 16,384. fp32, and bf16
where the processor computes in it. A step is two rows of 512 tokens, a micro-batch one row; one thread everywhere.

Clock    from the begin of the first step to the end of the last, the first one included, imports and start-up before it; of
         our runs without the checkpoint at their end, since the others save nothing.
Data     documents of random tokens by Zipf's law, about 330 tokens at the median, packed into rows with two or three pieces of
         documents; the same rows in the same order, and the same weights to begin with, for all but SFTTrainer, which packs
         the same documents by itself. What the others' losses say is compared with the bare loop's.
The peers want `make peers`; without them, and in --quick, their keys are null, and there those of FSDP2, across_workers, checkpoints
and faults too.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from documents import sentences
from runner import Measured, main

from aifactory.cluster.session import connect, disconnect
from aifactory.config import Architecture, Runtime, Train

_HERE = Path(__file__).resolve().parent
_PEERS = _HERE.parent / ".peers"
_INTERVAL = Runtime.model_fields["checkpoint_every_steps"].default
_LEARNING_RATE = 1e-3
_ALONE = {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
_PEER_SCRIPTS = {
    "hf_trainer": ("trl", "hf_trainer.py", ()),
    "trl_sft": ("trl", "hf_trainer.py", ("--trl",)),
    "lightning": ("lightning", "lightning_train.py", ()),
}
_SAME_LOSS = 0.01
_FIGURES = (
    "ray_over_bare",
    "over_hf_trainer",
    "over_trl_sft",
    "over_lightning",
    "ddp2_over_1",
    "fsdp2_over_ddp2",
    "bare2_over_1",
    "ddp2_over_bare2",
    "data_wait_share",
    "checkpoint_stall_share",
    "fit_to_first_step_s",
    "worker_kill_to_step_s",
    "node_loss_to_step_s",
    "across_workers_cost",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is measured."""

    rounds: int
    models: Mapping[str, Architecture]
    """The first one is that of workers, checkpoints and start-up too."""
    vocab_size: int
    row_len: int
    seconds: float
    """Of training in one run; at least `min_steps`."""
    min_steps: int
    max_steps: int
    peers: bool
    workers: tuple[str, ...]
    """Which runs of two workers there are."""
    peer_timeout_s: float


FULL = Sizes(
    rounds=3,
    models={
        "17m": Architecture(hidden_size=384, num_layers=6, num_heads=6),
        "110m": Architecture(hidden_size=768, num_layers=14, num_heads=12),
    },
    vocab_size=16_384,
    row_len=512,
    seconds=18.0,
    min_steps=3,
    max_steps=60,
    peers=True,
    workers=("bare2", "ddp2", "fsdp2", "tree2"),
    peer_timeout_s=180.0,
)
# The same path, for the proof that it runs.
QUICK = Sizes(
    rounds=1,
    models={"tiny": Architecture(hidden_size=64, num_layers=2, num_heads=2)},
    vocab_size=400,
    row_len=128,
    seconds=1.0,
    min_steps=6,
    max_steps=20,
    peers=False,
    workers=("bare2", "ddp2"),
    peer_timeout_s=20.0,
)


def measure(quick: bool, rounds: int | None) -> Measured:
    """Measure all of it."""
    sizes = QUICK if quick else FULL
    precisions = _precisions()
    if len(precisions) > 1:  # twice as many cells, each faster
        sizes = replace(sizes, seconds=sizes.seconds / 2)
    os.environ.update({name: value for name, value in _ALONE.items() if name != "OMP_NUM_THREADS"})
    with tempfile.TemporaryDirectory(prefix="aifactory-benchmark-") as folder:
        bench = _Bench(Path(folder), replace(sizes, rounds=rounds or sizes.rounds), precisions)
        bench.prepare()
        connect("benchmark")
        try:
            bench.rounds()
            if not quick:
                bench.checkpoints()
        finally:
            disconnect()
        bench.faults(quick)
        return bench.measured()


def _precisions() -> tuple[str, ...]:
    import torch

    from aifactory.train.step import resolve_precision

    best = resolve_precision("auto", torch.device("cpu"))
    return ("fp32",) if best == "fp32" else ("fp32", "bf16")


class _Bench:
    """Raw numbers, as they come in."""

    def __init__(self, folder: Path, sizes: Sizes, precisions: Sequence[str]) -> None:
        from aifactory.records.storage import Storage

        self._folder = folder
        self._sizes = sizes
        self._precisions = precisions
        self._storage = Storage(str(folder / "store"))
        self._raw: dict[str, list[float]] = defaultdict(list)
        self._ratios: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._notes: list[str] = []
        self._peers: dict[str, dict[str, object]] = {}
        self._runs = 0
        self._tokenizer: tuple[str, ...] = ()

    def measured(self) -> Measured:
        figures: dict[str, float | None] = dict.fromkeys(_FIGURES)
        for key, cells in self._ratios.items():
            medians = {cell: statistics.median(values) for cell, values in cells.items()}
            figures[key] = min(medians.values())
        for key in _FIGURES:
            if self._raw.get(key):
                figures[key] = statistics.median(self._raw[key])
        for key, cells in self._ratios.items():
            for cell, values in cells.items():
                self._raw[f"{key}_{cell}"] = values
        shown = {key: None if value is None else round(value, 4) for key, value in figures.items()}
        return Measured(figures=shown, raw=dict(self._raw), notes=self._notes, peers=self._peers)

    # ── data ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def prepare(self) -> None:
        """A tokenizer, packed rows, and the weights to begin with."""
        from aifactory.text.shards import TokenRows, shard_bytes
        from aifactory.text.tokenizer import load_tokenizer
        from aifactory.tokens.packing import Document, pack
        from aifactory.tokens.vocabulary import train_vocabulary
        from aifactory.train.base import model_from_scratch
        from aifactory.train.sampler import Sampler

        sizes = self._sizes
        _say("a tokenizer")
        files = train_vocabulary(sentences(3 * sizes.vocab_size), vocab_size=sizes.vocab_size)
        for name, data in files.items():
            self._storage.write_bytes(data, "tokens", "tokenizer", name)
            (self._folder / "peer" / "tokenizer").mkdir(parents=True, exist_ok=True)
            (self._folder / "peer" / "tokenizer" / name).write_bytes(data)
        self._tokenizer = tuple(f"tokenizer/{name}" for name in sorted(files))
        tokenizer = load_tokenizer(self._folder / "peer" / "tokenizer")
        assert tokenizer.vocab_size == sizes.vocab_size, (tokenizer.vocab_size, "a larger text is needed")

        rng = np.random.default_rng(1)
        weights = np.cumsum(1 / np.arange(1, sizes.vocab_size))
        num_rows = 2 * sizes.max_steps + 8
        documents, tokens = [], 0
        while tokens < num_rows * sizes.row_len * 1.2:
            length = int(np.clip(rng.lognormal(5.8, 0.8), 20, 4 * sizes.row_len))
            ids = np.searchsorted(weights / weights[-1], rng.random(length)) + 1
            documents.append(Document(row=f"{len(documents):032x}", ids=ids.tolist(), loss_mask=[True] * length))
            tokens += length
        packed = pack(documents, row_len=sizes.row_len, vocab_size=sizes.vocab_size, pad_id=tokenizer.eos_id)
        shard = self._storage.write_bytes(shard_bytes(packed), "tokens", "shard-00000.arrow").name
        rows = TokenRows(Path(self._storage.path("tokens")), [shard])
        sampler = Sampler(set_sizes=[len(rows)], shares=[1.0], batch_rows=2, seed=Train().seed)
        order = [slot.row for step in range(len(rows) // 2) for slot in sampler.batch(step)]
        ids_NT, positions_NT, mask_NT = rows.read(np.array(order))
        np.savez(self._folder / "peer" / "rows.npz", ids=ids_NT, positions=positions_NT, mask=mask_NT)
        (self._folder / "peer" / "documents.json").write_text(json.dumps([each.ids for each in documents]))
        for name, architecture in sizes.models.items():
            data = self._folder / name
            data.mkdir()
            for shared in ("rows.npz", "documents.json", "tokenizer"):
                (data / shared).symlink_to(self._folder / "peer" / shared)
            model = model_from_scratch(
                architecture,
                vocab_size=sizes.vocab_size,
                end_id=tokenizer.eos_id,
                row_len=sizes.row_len,
                seed=Train().seed,
            )
            model.save_pretrained(data / "model")
            self._raw[f"parameters_{name}"].append(float(sum(p.numel() for p in model.parameters())))

    # ── what is measured ──────────────────────────────────────────────────────────────────────────────────────────────

    def rounds(self) -> None:
        """All contenders, one after another, in another order each round."""
        sizes = self._sizes
        steps = {
            (name, precision): self._steps(name, precision) for name in sizes.models for precision in self._precisions
        }
        for number in range(sizes.rounds):
            for (name, precision), count in steps.items():
                contenders: dict[str, Callable[[], dict[str, Any] | None]] = {
                    "bare": lambda n=name, p=precision, c=count: self._bare(n, p, c),  # type: ignore[misc]
                    "ray": lambda n=name, p=precision, c=count: self._ray(n, p, c),  # type: ignore[misc]
                }
                if sizes.peers:
                    for peer in _PEER_SCRIPTS:
                        contenders[peer] = lambda q=peer, n=name, p=precision, c=count: self._peer(q, n, p, c)  # type: ignore[misc]
                if (name, precision) == next(iter(steps)):
                    for how in sizes.workers:
                        contenders[how] = (
                            (lambda n=name, p=precision, c=count: self._two_bare(n, p, c))  # type: ignore[misc]
                            if how == "bare2"
                            else (lambda h=how, n=name, p=precision, c=count: self._ray(n, p, c, how=h))  # type: ignore[misc]
                        )
                self._round(f"{name}_{precision}", contenders, backwards=number % 2 == 1)

    def _round(
        self, cell: str, contenders: Mapping[str, Callable[[], dict[str, Any] | None]], *, backwards: bool
    ) -> None:
        rates: dict[str, float] = {}
        losses: dict[str, float] = {}
        for name in reversed(contenders) if backwards else contenders:
            _say(f"{name}, {cell}")
            found = contenders[name]()
            if found is None:
                continue
            rates[name] = found["tokens"] / found["seconds"]
            losses[name] = float(np.mean(found["losses"]))
            self._raw[f"{name}_{cell}_tokens_per_s"].append(rates[name])
            if "cpu_s" in found:
                self._raw[f"{name}_{cell}_cpu_s_per_1000_tokens"].append(1000 * found["cpu_s"] / found["tokens"])
        for key, over, under in (
            ("ray_over_bare", "ray", "bare"),
            ("over_hf_trainer", "ray", "hf_trainer"),
            ("over_trl_sft", "ray", "trl_sft"),
            ("over_lightning", "ray", "lightning"),
            ("ddp2_over_1", "ddp2", "ray"),
            ("fsdp2_over_ddp2", "fsdp2", "ddp2"),
            ("bare2_over_1", "bare2", "bare"),
            ("ddp2_over_bare2", "ddp2", "bare2"),
        ):
            if over in rates and under in rates:
                self._ratios[key][cell].append(rates[over] / rates[under])
        if "tree2" in rates:
            self._raw["across_workers_cost"].append(rates["ddp2"] / rates["tree2"] - 1)
        for name in ("hf_trainer", "lightning"):
            if name in losses and abs(losses[name] - losses["bare"]) > _SAME_LOSS * losses["bare"]:
                self._notes.append(
                    f"{name}, {cell}: mean loss {losses[name]:.4f}, the bare loop's {losses['bare']:.4f}"
                )

    def _steps(self, name: str, precision: str) -> int:
        """As many steps as fill the seconds that a run is given."""
        found = self._bare(name, precision, 2)
        wanted = round(self._sizes.seconds / (found["seconds"] / 2))
        return max(self._sizes.min_steps, min(self._sizes.max_steps, wanted))

    def checkpoints(self) -> None:
        """A run that commits several checkpoints: how long each keeps the loop, over the steps that one protects."""
        name, precision = next(iter(self._sizes.models)), self._precisions[0]
        for _ in range(self._sizes.rounds):
            _say(f"checkpoints, {name}_{precision}")
            found = self._ray(name, precision, 9, checkpoint_every_steps=3)
            # After steps 3, 6 and 9, and the last one is waited for to its end: an upper bound.
            of_one = found["figures"]["checkpoint_stall_share"] * found["figures"]["seconds"] / 3
            self._raw["checkpoint_stall_s"].append(of_one)
            self._raw["checkpoint_stall_share"].append(of_one / (_INTERVAL * found["seconds"] / 9))

    def faults(self, quick: bool) -> None:
        """What train_faults.py measures, in a cluster of its own."""
        keys = ("worker_kill_to_step_s", "node_loss_to_step_s")
        if quick:
            self._notes.append(f"{' and '.join(keys)} are not measured in --quick")
            return
        try:
            import train_faults
        except ImportError:
            self._notes.append(f"{' and '.join(keys)}: benchmarks/train_faults.py is not there")
            return
        _say("faults")
        found: Measured = train_faults.measure_faults(quick, 1)
        for key in keys:
            self._raw[key] += list(found.raw.get(key, ()))
        self._notes += list(found.notes)

    # ── contenders ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _arguments(self, name: str, precision: str, steps: int, *, batch_rows: int = 2) -> list[str]:
        data = ["--data", str(self._folder / name), "--steps", str(steps), "--batch-rows", str(batch_rows)]
        return [*data, "--micro-rows", "1", "--precision", precision, "--learning-rate", str(_LEARNING_RATE)]

    def _bare(self, name: str, precision: str, steps: int, *, batch_rows: int = 2) -> dict[str, Any]:
        arguments = self._arguments(name, precision, steps, batch_rows=batch_rows)
        return _json_of([sys.executable, str(_HERE / "peers" / "bare_train.py"), *arguments], timeout=600)

    def _two_bare(self, name: str, precision: str, steps: int) -> dict[str, Any]:
        """Two bare loops that begin together, each with the one row of a step that a worker has."""
        with ThreadPoolExecutor(2) as both:
            begun = [both.submit(self._bare, name, precision, steps, batch_rows=1) for _ in range(2)]
            found = [each.result() for each in begun]
        return {
            "seconds": max(each["seconds"] for each in found),
            "tokens": sum(each["tokens"] for each in found),
            "losses": found[0]["losses"],
        }

    def _peer(self, peer: str, name: str, precision: str, steps: int) -> dict[str, Any] | None:
        """What a peer prints; None where it isn't installed or takes too long."""
        environment, script, options = _PEER_SCRIPTS[peer]
        python = _PEERS / environment / "bin" / "python"
        if not python.exists():
            self._note(f"{peer} is not installed: make peers")
            return None
        arguments = [*self._arguments(name, precision, steps), *options]
        try:
            found = _json_of([str(python), str(_HERE / "peers" / script), *arguments], self._sizes.peer_timeout_s)
        except subprocess.TimeoutExpired:
            self._note(f"{peer}, {name}_{precision}: took more than {self._sizes.peer_timeout_s:g} s")
            return None
        shown = [f".peers/{environment}/bin/python", f"benchmarks/peers/{script}", *options]
        self._peers[peer] = {"command": shlex.join(shown), "environment": _ALONE, "versions": found["versions"]}
        return found

    def _ray(
        self, name: str, precision: str, steps: int, *, how: str = "one", checkpoint_every_steps: int = 10**6
    ) -> dict[str, Any]:
        """The whole path: workers placed by Ray Train, the loop with its guards, progress and export."""
        from aifactory.train.run_log import PROGRESS
        from aifactory.train.trainer import train_on_ray
        from aifactory.train.work import RowSet, Stored, Work

        self._runs += 1
        run = f"run-{self._runs:03d}"
        across = {"reproducible": "across_workers", "micro_batch_rows": 1, "threads": 1} if how == "tree2" else {}
        recipe = Train(
            max_steps=steps,
            global_batch_rows=2,
            learning_rate=_LEARNING_RATE,
            warmup_steps=0,
            final_lr_share=1.0,
            precision=precision,
            **across,
        )
        runtime = Runtime(
            workers=1 if how == "one" else 2,
            # Two workers, the trainer's actor and two CPUs.
            cpus_per_worker=0.9,
            parallel="fsdp" if how == "fsdp2" else "ddp",
            micro_batch_rows=1,
            checkpoint_every_steps=checkpoint_every_steps,
        )
        task = Work(
            storage=self._storage,
            run_folder=("runs", run),
            model_folder=("model", run),
            recipe=recipe,
            architecture=self._sizes.models[name],
            base=None,
            tokenizer=Stored(folder=("tokens",), names=self._tokenizer),
            row_sets=(RowSet(shards=Stored(folder=("tokens",), names=("shard-00000.arrow",)), share=1.0),),
            micro_batch_rows=1,
            checkpoint_every_steps=checkpoint_every_steps,
            num_threads=1,
            parallel=runtime.parallel,
        )
        begun = time.perf_counter()
        with _Seen(Path(self._storage.path("runs", run, PROGRESS))) as seen:
            figures = train_on_ray(task, name=run, runtime=runtime)["figures"]
        self._note(f"ours, {name}_{precision}: {json.dumps(figures['execution'])}")
        if how == "one" and checkpoint_every_steps >= 10**6:
            self._raw["data_wait_share"].append(figures["data_wait_share"])
            self._raw["fit_to_first_step_s"].append(seen.at - begun)
        self._storage.delete("model", run)
        self._storage.delete("runs", run)
        # A run ends with a checkpoint, which it waits for; the others save nothing.
        seconds = figures["seconds"] * (1 - figures["checkpoint_stall_share"])
        losses = [figures["final_loss"]]
        return {"seconds": seconds, "tokens": figures["tokens"], "losses": losses, "figures": figures}

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)


class _Seen:
    """When a file first had something in it."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.at = float("nan")

    def _look(self) -> None:
        while not self._ended.wait(0.02):
            if self._file.exists() and self._file.stat().st_size:
                self.at = time.perf_counter()
                return

    def __enter__(self) -> _Seen:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def _json_of(command: Sequence[str], timeout: float) -> dict[str, Any]:
    """The JSON object that a program prints last. Raises RuntimeError with its errors; TimeoutExpired."""
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **_ALONE}, timeout=timeout)
    if done.returncode:
        raise RuntimeError(f"expected {shlex.join(command)} to succeed, found:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main("train", measure)
