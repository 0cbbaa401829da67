"""Two peers: the same training by transformers' `Trainer`, or by `trl.SFTTrainer` with packing, in a process and an
environment of their own (`make peers`).

Reads    as bare_train.py; for --trl also documents.json, the token ids of the documents that the rows were packed from, and
         tokenizer/
Writes   one JSON object on standard output: seconds, cpu_s, tokens, losses, versions
Clock    from the begin of the first step to the end of the last.

They are tuned as their documentation says: fused AdamW, no logging, no saving, no bar, rows in memory and as they are
(no column is removed, nothing pinned), one thread. `SFTTrainer` packs the documents itself before the clock starts, by its
strategy `wrapped`: `bfd` wants flash attention, which a CPU does not have. So its rows are full and its documents see one
another, which is less work than ours.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments


class Rows(torch.utils.data.Dataset):
    """Packed rows with their positions and labels."""

    def __init__(self, folder: Path) -> None:
        rows = {name: torch.from_numpy(values) for name, values in np.load(folder / "rows.npz").items()}
        self._ids, self._positions = rows["ids"], rows["positions"]
        self._labels = rows["ids"].masked_fill(rows["mask"] == 0, -100)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._ids[index], "position_ids": self._positions[index], "labels": self._labels[index]}


class Clock(TrainerCallback):
    """When the first step began and the last one ended."""

    start = end = cpu_start = cpu_end = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if not self.start:
            self.start, self.cpu_start = time.perf_counter(), time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.end, self.cpu_end = time.perf_counter(), time.process_time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch-rows", type=int, required=True)
    parser.add_argument("--micro-rows", type=int, required=True)
    parser.add_argument("--precision", choices=["fp32", "bf16"], required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--trl", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(arguments.data / "model", dtype=torch.float32)
    clock = Clock()
    with tempfile.TemporaryDirectory() as scratch:
        options: dict[str, Any] = {
            "output_dir": scratch,
            "max_steps": arguments.steps,
            "per_device_train_batch_size": arguments.micro_rows,
            "gradient_accumulation_steps": arguments.batch_rows // arguments.micro_rows,
            "learning_rate": arguments.learning_rate,
            "lr_scheduler_type": "constant",
            "adam_beta1": 0.9,
            "adam_beta2": 0.95,
            "weight_decay": 0.1,
            "max_grad_norm": 1.0,
            "optim": "adamw_torch_fused",
            "bf16": arguments.precision == "bf16",
            "use_cpu": True,
            "train_sampling_strategy": "sequential",
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "dataloader_pin_memory": False,
            "activation_checkpointing": False,
        }
        if arguments.trl:
            trainer = _sft_trainer(arguments.data, model, options)
        else:
            trainer = Trainer(model=model, args=TrainingArguments(**options), train_dataset=Rows(arguments.data))
        trainer.add_callback(clock)
        found = trainer.train()
    row_len = np.load(arguments.data / "rows.npz")["ids"].shape[1]
    names = ("trl", "accelerate", "transformers", "torch", "datasets", "numpy")
    json.dump(
        {
            "seconds": clock.end - clock.start,
            "cpu_s": clock.cpu_end - clock.cpu_start,
            "tokens": arguments.steps * arguments.batch_rows * row_len,
            "losses": [found.training_loss],
            "versions": {name: version(name) for name in names},
        },
        sys.stdout,
    )


def _sft_trainer(data: Path, model: torch.nn.Module, options: dict[str, Any]) -> Trainer:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    documents = json.loads((data / "documents.json").read_text(encoding="utf-8"))
    row_len = np.load(data / "rows.npz")["ids"].shape[1]
    config = SFTConfig(**options, packing=True, packing_strategy="wrapped", max_length=row_len)
    return SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_dict({"input_ids": documents}),
        processing_class=PreTrainedTokenizerFast.from_pretrained(data / "tokenizer"),
    )


if __name__ == "__main__":
    main()
