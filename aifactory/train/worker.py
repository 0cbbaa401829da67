"""One training worker: load, train, export. Pure torch; the process group is set up by whoever starts it.

Writes   runs/train-<fp>/step-*/          checkpoints
         model/<fp>/{config.json, model.safetensors, tokenizer files, golden.json}; with `train.lora` also adapter/
         runs/train-<fp>/validated-*      losses on held-out rows (see `validation`)
         runs/train-<fp>/exported.json    last: the names and hashes of the exported files, and what was counted
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from aifactory.engine.golden import GOLDEN_NAME, golden_answers
from aifactory.errors import StorageError
from aifactory.text.shards import TokenRows
from aifactory.text.tokenizer import load_tokenizer
from aifactory.train.base import model_from_folder, model_from_scratch, require_fit
from aifactory.train.checkpoint import Checkpoints
from aifactory.train.loop import TrainingRun, train_model
from aifactory.train.lora import ADAPTER_FOLDER, adapters_off, merged, with_adapters, write_adapter
from aifactory.train.objectives import objective_of
from aifactory.train.parity import write_probe
from aifactory.train.room import NoRoomError
from aifactory.train.run_log import RunLog
from aifactory.train.step import count_parameters
from aifactory.train.trackers import make_trackers
from aifactory.train.validation import Holdout, Validations, holdout_loss
from aifactory.train.watch import HangWatch
from aifactory.train.work import EXPORTED, Stored, Work, holdout_losses

if TYPE_CHECKING:
    from aifactory.text.tokenizer import TextTokenizer


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
            with _log(task) if rank == 0 else nullcontext() as log:
                _work(task, rank=rank, world_size=world_size, device=device, after_step=after_step, log=log)
            return
        except NoRoomError:
            if world_size > 1:
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _work(
    task: Work,
    *,
    rank: int,
    world_size: int,
    device: torch.device | None,
    after_step: Callable[[int], None] | None,
    log: RunLog | None,
) -> None:
    torch.set_num_threads(task.num_threads)
    device = device or _device()
    storage = task.storage
    rows = tuple(TokenRows(s.shards.fetch(storage), s.shards.names) for s in task.row_sets)
    tokenizer_folder, tokenizer = _tokenizer(task)
    model = _model(task, tokenizer, row_len=rows[0].row_len)
    kind, config = type(model), model.config
    num_trained = count_parameters(model.parameters())
    with (
        HangWatch(task.hang_timeout_s) as alive,
        Checkpoints(storage, *task.run_folder, keep=task.keep_checkpoints) as checkpoints,
    ):
        holdout = _holdout(task, checkpoints, device=device, rank=rank)
        figures, weights = train_model(
            model,
            TrainingRun(
                recipe=task.recipe,
                rows=rows,
                shares=tuple(s.share for s in task.row_sets),
                micro_batch_rows=task.micro_batch_rows,
                checkpoint_every_steps=task.checkpoint_every_steps,
                checkpoints=checkpoints,
                parallel=task.parallel,
                shard_workers=task.shard_workers,
                execution=task.execution,
                log=log,
                holdout=holdout,
                alive=alive,
                after_step=after_step,
            ),
            device=device,
            rank=rank,
            world_size=world_size,
        )
    if log is not None:
        log.close(is_finished=True)
        adapter = None
        whole: nn.Module
        if task.recipe.lora:
            again = _model(task, tokenizer, row_len=rows[0].row_len)
            whole, adapter = merged(again, weights)
        else:
            whole = kind(config)
            whole.load_state_dict(weights, strict=False)
            whole.tie_weights()  # type: ignore[operator]
        counted = asdict(figures) | log.figures() | {"parameters": _count(whole), "trained": num_trained}
        if task.held_out is not None:
            counted["holdout_loss"] = holdout_losses(task)
        _export(task, whole, tokenizer_folder, rows, counted, adapter)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _log(task: Work) -> RunLog:
    for name, value in task.environment.items():
        os.environ.setdefault(name, value)
    return RunLog(task.storage, *task.run_folder, name=task.factory, trackers=make_trackers(task.trackers))


def _tokenizer(task: Work) -> tuple[Path, TextTokenizer]:
    """The tokenizer, and the local folder of its files."""
    folder = task.tokenizer.fetch(task.storage) / Path(task.tokenizer.names[0]).parent
    return folder, load_tokenizer(folder)


def _model(task: Work, tokenizer: TextTokenizer, *, row_len: int) -> nn.Module:
    """The model that training starts from, with the adapters that are to be trained."""
    if task.base is not None:
        model = model_from_folder(task.base.fetch(task.storage) if isinstance(task.base, Stored) else task.base)
        require_fit(model, vocab_size=tokenizer.vocab_size, row_len=row_len)
        lora = task.recipe.lora
        return with_adapters(model, lora, seed=task.recipe.seed) if lora else model
    assert task.recipe.lora is None, "adapters stand beside the weights of a base"
    return model_from_scratch(
        task.architecture,
        vocab_size=tokenizer.vocab_size,
        end_id=tokenizer.eos_id,
        row_len=row_len,
        seed=task.recipe.seed,
    )


def _holdout(task: Work, checkpoints: Checkpoints, *, device: torch.device, rank: int) -> Holdout | None:
    if task.held_out is None:
        return None
    here = rank == 0 and task.validates_itself
    holdout = Holdout(
        task.schedule,
        checkpoints,
        stopping=task.recipe.early_stopping,
        validate=(lambda step: validate(task, step, device=device)) if here else None,
    )
    checkpoints.spared = holdout.spared
    return holdout


def validate(task: Work, step: int, *, device: torch.device | None = None) -> float:
    """The loss on the held-out rows of the checkpoint after `step` steps: nats a token, or that of the recipe's objective."""
    assert task.held_out is not None
    torch.set_num_threads(task.num_threads)
    rows = TokenRows(task.held_out.fetch(task.storage), task.held_out.names)
    device = device or _device()
    model = _model(task, _tokenizer(task)[1], row_len=rows.row_len).to(device)
    preference = objective_of(task.recipe, model, partial(adapters_off, model) if task.recipe.lora else None)
    Checkpoints(task.storage, *task.run_folder).load(step, model)
    return holdout_loss(
        model,
        rows,
        micro_batch_rows=task.recipe.micro_batch_rows or task.micro_batch_rows,
        precision=task.recipe.precision,
        device=device,
        preference=preference,
    )


def validate_committed(task: Work, step: int) -> None:
    """Note the loss on the held-out rows of a committed checkpoint; nothing where it has been deleted meanwhile."""
    checkpoints = Checkpoints(task.storage, *task.run_folder)
    try:
        loss = validate(task, step)
    except StorageError:
        if step in checkpoints.committed():
            raise
        return
    Validations(task.storage, *task.run_folder).write(step, loss)


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
    rows: Sequence[TokenRows],
    figures: dict[str, Any],
    adapter: Mapping[str, Any] | None,
) -> None:
    """Write the model's folder, with the adapter that is merged in it; what is compared with it (`parity`); then the list of
    its files."""
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
    write_probe(task, model, tokenizer, rows)
    exported = {"files": [asdict(file) for file in files], "figures": figures}
    task.storage.write_bytes(json.dumps(exported).encode(), *task.run_folder, EXPORTED)
