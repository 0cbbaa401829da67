"""One training worker: load, train, export. Pure torch; the process group is set up by whoever starts it.

Writes   runs/train-<fp>/step-*/          checkpoints
         model/<fp>/{config.json, model.safetensors, tokenizer files, golden.json}; with `train.lora` also adapter/
         runs/train-<fp>/exported.json    last: the names and hashes of the exported files, and what was counted
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from aifactory.engine.golden import GOLDEN_NAME, golden_answers
from aifactory.records.storage import Storage
from aifactory.text.shards import TokenRows
from aifactory.text.tokenizer import load_tokenizer
from aifactory.train.base import model_from_folder, model_from_scratch, require_fit
from aifactory.train.checkpoint import Checkpoints
from aifactory.train.loop import TrainingRun, train_model
from aifactory.train.lora import ADAPTER_FOLDER, merged, with_adapters, write_adapter
from aifactory.train.room import NoRoomError
from aifactory.train.step import count_parameters

if TYPE_CHECKING:
    from aifactory.config import Architecture, Train

EXPORTED = "exported.json"
PROGRESS = "progress.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """Files of one directory below the storage root."""

    folder: tuple[str, ...]
    names: tuple[str, ...]

    def fetch(self, storage: Storage) -> Path:
        """A local folder that holds them."""
        return storage.fetch(list(self.names), *self.folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSet:
    """The shards of one token set, and its share of a batch."""

    shards: Stored
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """All that a worker needs; plain values, so that it can be pickled."""

    storage: Storage
    run_folder: tuple[str, ...]
    model_folder: tuple[str, ...]
    recipe: Train
    architecture: Architecture
    base: Path | Stored | None
    """The model that training starts from; none for one from scratch."""
    tokenizer: Stored
    """The tokenizer's files in the folder of a token set."""
    row_sets: tuple[RowSet, ...]
    micro_batch_rows: int
    checkpoint_every_steps: int
    num_threads: int
    parallel: str = "ddp"
    """How several workers share the model."""
    shard_workers: int | None = None
    """Of `fsdp`: so many workers hold one copy of the model between them."""


def work(
    task: Work,
    *,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Take one worker's part in the run; rank 0 exports the model. Alone, it goes on where a micro-batch was too large.

    Raises   TrainingError; NoRoomError where other workers must begin again as well.
    """
    while True:
        try:
            _work(task, rank=rank, world_size=world_size, device=device, after_step=after_step)
            return
        except NoRoomError:
            if world_size > 1:
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _work(
    task: Work, *, rank: int, world_size: int, device: torch.device | None, after_step: Callable[[int], None] | None
) -> None:
    torch.set_num_threads(task.num_threads)
    device = device or _device()
    storage = task.storage
    rows = tuple(TokenRows(s.shards.fetch(storage), s.shards.names) for s in task.row_sets)
    tokenizer_folder = task.tokenizer.fetch(storage) / Path(task.tokenizer.names[0]).parent
    tokenizer = load_tokenizer(tokenizer_folder)
    start = task.base.fetch(storage) if isinstance(task.base, Stored) else task.base
    model: nn.Module
    if start is not None:
        model = model_from_folder(start)
        require_fit(model, vocab_size=tokenizer.vocab_size, row_len=rows[0].row_len)
    else:
        model = model_from_scratch(
            task.architecture,
            vocab_size=tokenizer.vocab_size,
            end_id=tokenizer.eos_id,
            row_len=rows[0].row_len,
            seed=task.recipe.seed,
        )
    kind, config = type(model), model.config
    if task.recipe.lora:
        model = with_adapters(model, task.recipe.lora, seed=task.recipe.seed)
    trained = count_parameters(model.parameters())
    figures, weights = train_model(
        model,
        TrainingRun(
            recipe=task.recipe,
            rows=rows,
            shares=tuple(s.share for s in task.row_sets),
            micro_batch_rows=task.micro_batch_rows,
            checkpoint_every_steps=task.checkpoint_every_steps,
            checkpoints=Checkpoints(storage, *task.run_folder),
            parallel=task.parallel,
            shard_workers=task.shard_workers,
            progress_file=Path(storage.make_folder(*task.run_folder)) / PROGRESS if storage.is_local else None,
            after_step=after_step,
        ),
        device=device,
        rank=rank,
        world_size=world_size,
    )
    if rank == 0:
        adapter = None
        if task.recipe.lora:
            assert start is not None, "adapters stand beside the weights of a base"
            again = with_adapters(model_from_folder(start), task.recipe.lora, seed=task.recipe.seed)
            whole, adapter = merged(again, weights)
        else:
            whole = kind(config)
            whole.load_state_dict(weights, strict=False)
            whole.tie_weights()
        counted = asdict(figures) | {"parameters": sum(p.numel() for p in whole.parameters()), "trained": trained}
        _export(task, whole, tokenizer_folder, counted, adapter)


def _device() -> torch.device:
    # Ray and torchrun show each worker its own GPU, or let it choose by its local rank.
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _export(
    task: Work,
    model: nn.Module,
    tokenizer_folder: Path,
    figures: dict[str, Any],
    adapter: Mapping[str, Any] | None = None,
) -> None:
    """Write the model's folder, with the adapter that is merged in it, then the list of its files."""
    assert isinstance(model, PreTrainedModel)
    nn.Module.to(model, "cpu", torch.float32)
    model.train(False)
    tokenizer = load_tokenizer(tokenizer_folder)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model.save_pretrained(folder)
        for name in (Path(name).name for name in task.tokenizer.names):
            (folder / name).write_bytes((tokenizer_folder / name).read_bytes())
        (folder / GOLDEN_NAME).write_bytes(golden_answers(model, tokenizer))
        if adapter:
            write_adapter(adapter, folder / ADAPTER_FOLDER)
        files = task.storage.upload(folder, *task.model_folder)
    exported = {"files": [asdict(file) for file in files], "figures": figures}
    task.storage.write_bytes(json.dumps(exported).encode(), *task.run_folder, EXPORTED)


def exported(storage: Storage, run_folder: Sequence[str]) -> dict[str, Any] | None:
    """What a finished run exported; None while there is nothing."""
    data = storage.read_bytes(*run_folder, EXPORTED)
    return None if data is None else dict(json.loads(data))
