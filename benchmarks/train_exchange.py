"""Where the time of two workers goes: steps with each way to bring gradients together, beside two that exchange nothing.

Two processes of one thread hold a model for each variant and turn them one after another, in another order each round; a
step is one row of 512 tokens a worker and AdamW. Runs torch alone, without Ray.

Keys     none_s          a step of two workers that exchange nothing, which is what there is to win
         over_none_X     a step of X over that
         cpu_over_none_X its CPU time over that
Variants ddp             as the project has it; ddp_1mb, ddp_25mb, ddp_100mb: buckets of that size; ddp_static: a static graph;
                         ddp_bf16: gradients cross in bf16
         fsdp            as the project has it; fsdp_torch: by torch's own collectives; fsdp_kept: what was gathered for the
                         forward pass is kept for the backward pass
         sum_s, gather_s, scatter_s, direct_s   one all_reduce, all_gather and reduce_scatter of all gradients by torch, and half
                         of them sent while the other half is taken
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from runner import Measured, main
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from aifactory.train.parallel import Alone, share

_CPU = torch.device("cpu")
_VARIANTS = (
    "none",
    "ddp",
    "ddp_1mb",
    "ddp_25mb",
    "ddp_100mb",
    "ddp_static",
    "ddp_bf16",
    "fsdp",
    "fsdp_torch",
    "fsdp_kept",
)


def measure(quick: bool, rounds: int | None) -> Measured:
    """Start two processes and take what the first one tells."""
    with tempfile.TemporaryDirectory() as folder:
        options = [folder, "quick" if quick else "full", str(rounds or (1 if quick else 6))]
        commands = [[sys.executable, __file__, "--worker", str(rank), *options] for rank in (0, 1)]
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"}
        workers = [subprocess.Popen(each, stdout=subprocess.PIPE, text=True, env=environment) for each in commands]
        told = [worker.communicate()[0] for worker in workers]
        if any(worker.returncode for worker in workers):
            raise RuntimeError(f"expected both workers to end, found {[worker.returncode for worker in workers]}")
    raw: dict[str, list[float]] = json.loads(told[0].splitlines()[-1])
    for name in _VARIANTS[1:]:
        for figure, of in (("over_none", "seconds"), ("cpu_over_none", "cpu")):
            raw[f"{figure}_{name}"] = [x / y for x, y in zip(raw[f"{of}_{name}"], raw[f"{of}_none"], strict=True)]
    raw["none_s"] = raw["seconds_none"]
    shown = [key for key in raw if not key.startswith(("seconds_", "cpu_")) or key.startswith("cpu_over")]
    return Measured(figures={key: round(statistics.median(raw[key]), 4) for key in shown}, raw=raw)


def _work(rank: int, folder: str, size: str, rounds: int) -> dict[str, list[float]]:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    config = LlamaConfig(
        **(
            {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6}
            if size == "full"
            else {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
        ),
        vocab_size=16_384 if size == "full" else 512,
        tie_word_embeddings=True,
        max_position_embeddings=512,
    )
    length, steps = (512, 3) if size == "full" else (64, 1)
    ids_BT = torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(rank))
    variants = {name: _step(name, _model(config), ids_BT) for name in _VARIANTS}
    for step in variants.values():
        step()
        step()
    num_parameters = sum(p.numel() for p in _model(config).parameters())
    raw: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds):
        for name in _VARIANTS if number % 2 == 0 else reversed(_VARIANTS):
            distributed.barrier()
            begun, cpu = time.perf_counter(), time.process_time()
            for _ in range(steps):
                variants[name]()
            distributed.barrier()
            raw[f"seconds_{name}"].append((time.perf_counter() - begun) / steps)
            raw[f"cpu_{name}"].append((time.process_time() - cpu) / steps)
        _collectives(num_parameters, raw)
    distributed.destroy_process_group()
    return raw


def _model(config: LlamaConfig) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(config).train()


def _step(name: str, model: nn.Module, ids_BT: torch.Tensor) -> Callable[[], None]:
    how, _, kind = name.partition("_")
    options: dict[str, Any] = {"shard_workers": None, "num_micro_batches": None, "world_size": 2}
    if how == "none":
        shared: Any = Alone(model, _CPU, "fp32").forward
    elif kind in ("", "bf16"):
        shared = share(how, model, _CPU, "fp32", gradients=kind or "fp32", **options).forward
    elif how == "ddp":
        changed = {"static_graph": True} if kind == "static" else {"bucket_cap_mb": int(kind.removesuffix("mb"))}
        shared = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False, **changed)
    elif kind == "kept":
        shared = share(how, model, _CPU, "fp32", gradients="fp32", **options).forward
        shared.set_reshard_after_forward(False)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for module in [m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer"]:
            fully_shard(module, mesh=mesh)
        shared = fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        logits_BTV = shared(input_ids=ids_BT, use_cache=False).logits
        nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _collectives(num_parameters: int, raw: dict[str, list[float]]) -> None:
    """Over the gradients of a model of this size."""
    half_S = torch.ones(num_parameters // 2)
    all_N = torch.ones(2 * len(half_S))
    other = 1 - distributed.get_rank()

    def directly() -> None:
        for transfer in (distributed.isend(half_S, other), distributed.irecv(all_N[: len(half_S)], other)):
            transfer.wait()

    for name, collective in (
        ("sum_s", lambda: distributed.all_reduce(all_N)),
        ("gather_s", lambda: distributed.all_gather_into_tensor(all_N, half_S)),
        ("scatter_s", lambda: distributed.reduce_scatter_tensor(half_S, all_N)),
        ("direct_s", directly),
    ):
        distributed.barrier()
        begun = time.perf_counter()
        collective()
        raw[name].append(time.perf_counter() - begun)
        all_N.fill_(1.0)
        half_S.fill_(1.0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        rank, folder, size, rounds = sys.argv[2:]
        Path(folder).mkdir(exist_ok=True)
        print(json.dumps(_work(int(rank), folder, size, int(rounds))))
    else:
        main("train_exchange", measure)
