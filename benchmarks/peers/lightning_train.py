"""A peer: the same training by lightning, in a process and an environment of its own (`make peers`).

Reads    as bare_train.py
Writes   one JSON object on standard output: seconds, cpu_s, tokens, losses, versions
Clock    from the begin of the first batch to the end of the last.

It is tuned as its documentation says: no logger, no checkpoints, no bar, no summary, no sanity check, fused AdamW, and the
loss is not logged but kept. Gradients are accumulated and clipped by the trainer.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from transformers import AutoModelForCausalLM


class Rows(torch.utils.data.Dataset):
    """Rows and, of each, how many tokens with loss its global batch has."""

    def __init__(self, folder: Path, batch_rows: int) -> None:
        self._rows = {name: torch.from_numpy(values) for name, values in np.load(folder / "rows.npz").items()}
        self._batch_rows = batch_rows

    def __len__(self) -> int:
        return len(self._rows["ids"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        first = index // self._batch_rows * self._batch_rows
        num_tokens = self._rows["mask"][first : first + self._batch_rows, 1:].sum()
        return {name: values[index] for name, values in self._rows.items()} | {"num_tokens": num_tokens}


class Module(lightning.LightningModule):
    """The model, its loss, its optimiser."""

    def __init__(self, folder: Path, learning_rate: float, accumulate: int) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).train()
        self._learning_rate = learning_rate
        self._accumulate = accumulate
        self.losses: list[torch.Tensor] = []

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        logits = self.model(input_ids=batch["ids"], position_ids=batch["positions"], use_cache=False).logits
        labels = batch["ids"].masked_fill(batch["mask"] == 0, -100)
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), reduction="sum"
        )
        loss = loss / batch["num_tokens"][0]
        self.losses.append(loss.detach())
        return loss * self._accumulate  # the trainer divides by it

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.model.parameters(), lr=self._learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )


class Clock(lightning.Callback):
    """When the first batch began and the last one ended."""

    start = end = cpu_start = cpu_end = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        if not self.start:
            self.start, self.cpu_start = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        self.end, self.cpu_end = time.perf_counter(), time.process_time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch-rows", type=int, required=True)
    parser.add_argument("--micro-rows", type=int, required=True)
    parser.add_argument("--precision", choices=["fp32", "bf16"], required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    accumulate = arguments.batch_rows // arguments.micro_rows
    rows = Rows(arguments.data, arguments.batch_rows)
    module, clock = Module(arguments.data, arguments.learning_rate, accumulate), Clock()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        precision="bf16-mixed" if arguments.precision == "bf16" else "32-true",
        max_steps=arguments.steps,
        accumulate_grad_batches=accumulate,
        # Its clipping does not know the fused optimiser; the loop's own call is the same.
        gradient_clip_val=None,
        callbacks=[clock, _Clip()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=arguments.micro_rows, shuffle=False))
    losses = torch.stack(module.losses).view(-1, accumulate).sum(1)
    json.dump(
        {
            "seconds": clock.end - clock.start,
            "cpu_s": clock.cpu_end - clock.cpu_start,
            "tokens": arguments.steps * arguments.batch_rows * rows[0]["ids"].shape[0],
            "losses": losses.tolist(),
            "versions": {name: version(name) for name in ("lightning", "torch", "transformers", "numpy")},
        },
        sys.stdout,
    )


class _Clip(lightning.Callback):
    """Clips all gradients together to a norm of 1."""

    def on_before_optimizer_step(self, _: Any, module: lightning.LightningModule, __: Any) -> None:
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)


if __name__ == "__main__":
    main()
