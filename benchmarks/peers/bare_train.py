"""The bare loop: the plainest torch loop that one would write for this model, batch, dtype and threads, without the factory.

Reads    --data FOLDER with rows.npz (ids, positions, mask: rows of tokens in the order in which they are trained on) and
         model/ in Hugging Face form
Writes   one JSON object on standard output: seconds, cpu_s, tokens, losses, versions
Clock    from the begin of the first step to the end of the last.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM


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
    model = AutoModelForCausalLM.from_pretrained(arguments.data / "model", dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    rows = {name: torch.from_numpy(values) for name, values in np.load(arguments.data / "rows.npz").items()}
    micro = arguments.micro_rows
    losses = []
    start, cpu_start = time.perf_counter(), time.process_time()
    for step in range(arguments.steps):
        total = 0.0
        first = step * arguments.batch_rows
        num_tokens = rows["mask"][first : first + arguments.batch_rows, 1:].sum()
        for at in range(first, first + arguments.batch_rows, micro):
            ids, positions, mask = (rows[name][at : at + micro] for name in ("ids", "positions", "mask"))
            labels = ids.masked_fill(mask == 0, -100)
            with torch.autocast("cpu", torch.bfloat16) if arguments.precision == "bf16" else nullcontext():
                logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].float().reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), reduction="sum"
            )
            loss = loss / num_tokens
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    json.dump(
        {
            "seconds": time.perf_counter() - start,
            "cpu_s": time.process_time() - cpu_start,
            "tokens": arguments.steps * arguments.batch_rows * rows["ids"].shape[1],
            "losses": losses,
            "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
