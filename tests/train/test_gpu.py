"""The CUDA and NCCL paths of training: the same laws as on a CPU, with bf16's tolerance. Skipped without a GPU (make test-gpu)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from aifactory.train.attention import has_kernel
from aifactory.train.execution import Execution
from aifactory.train.float8 import convert_to_float8
from aifactory.train.flops import peak
from aifactory.train.preparation import prepare
from aifactory.train.step import clip_gradients, make_optimizer, summed_loss, update

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
ROOT = Path(__file__).parents[2]
LENGTH = 256


@pytest.fixture
def device():
    return torch.device("cuda", 0)


def make_model(device):
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=512,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).to(device).train()


@pytest.fixture
def rows(device):
    torch.manual_seed(6)
    ids_BT = torch.randint(1, 1024, (4, LENGTH))
    lengths = ([100, 56, 100], [LENGTH], [1, 2, 200, 53], [128, 128])
    positions_BT = torch.stack([torch.cat([torch.arange(each) for each in row]) for row in lengths])
    return tuple(each.to(device) for each in (ids_BT, positions_BT, (positions_BT > 0).long()))


def loss_and_gradients(model, rows, precision):
    model.zero_grad()
    loss = summed_loss(model, *rows, precision=precision)
    (loss / 1000).backward()
    return float(loss.detach()), {name: p.grad.float().clone() for name, p in model.named_parameters()}


def assert_close(found, exact, tolerance):
    assert found[0] == pytest.approx(exact[0], rel=tolerance)
    for name, gradient in exact[1].items():
        assert float((found[1][name] - gradient).norm() / gradient.norm()) < 5 * tolerance, name


@pytest.mark.parametrize(
    "execution",
    [
        Execution(attention="varlen"),
        Execution(activations="selective"),
        Execution(activations="full"),
        Execution(compile=True),
        Execution(compile=True, activations="full"),
        Execution(compile=True, activations="selective"),
    ],
    ids=lambda execution: "-".join(f"{key}={value}" for key, value in asdict(execution).items()),
)
def test_in_bf16_each_choice_is_near_the_plain_step_in_fp32(device, rows, execution):
    exact = loss_and_gradients(make_model(device), rows, "fp32")
    model = make_model(device)
    prepare(model, execution, device, "bf16")

    assert has_kernel(device)
    assert_close(loss_and_gradients(model, rows, "bf16"), exact, 0.02)


def test_no_gradient_passes_between_documents_of_a_row(device, rows):
    ids_BT, positions_BT, mask_BT = rows
    model = make_model(device)
    prepare(model, Execution(attention="varlen"), device, "bf16")
    embeddings = model.get_input_embeddings()
    kept = {}

    def keep(_, __, output):
        output.retain_grad()
        kept["gradient_of"] = output

    embeddings.register_forward_hook(keep)
    later_BT = mask_BT.clone()
    later_BT[0, :100] = 0
    later_BT[1:] = 0
    summed_loss(model, ids_BT, positions_BT, later_BT, precision="bf16").backward()
    gradient_BTH = kept["gradient_of"].grad

    assert float(gradient_BTH[0, :100].abs().max()) == 0.0
    assert float(gradient_BTH[0, 100:].abs().max()) > 0
    assert float(gradient_BTH[1:].abs().max()) == 0.0


def test_the_loss_in_pieces_needs_less_memory_than_all_logits(device):
    hidden_NH = torch.randn(8192, 64, device=device, requires_grad=True)
    weight_VH = torch.randn(64_000, 64, device=device, requires_grad=True)
    targets_N = torch.randint(0, 64_000, (8192,), device=device)

    def peak_of(run):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        run().backward()
        return torch.cuda.max_memory_allocated(device)

    from aifactory.train.cross_entropy import summed_cross_entropy

    plain = peak_of(lambda: torch.nn.functional.cross_entropy(hidden_NH @ weight_VH.t(), targets_N, reduction="sum"))
    at_N = torch.arange(8192, device=device)
    pieces = peak_of(lambda: summed_cross_entropy(hidden_NH, weight_VH, at_N, targets_N))
    assert pieces < 0.6 * plain


def test_a_model_learns_a_batch_by_heart_with_all_of_it_on(device, rows):
    model = make_model(device)
    prepare(model, Execution(compile=True, activations="selective"), device, "bf16")
    # As a recipe has them, on a machine that has torch and transformers alone.
    recipe = SimpleNamespace(learning_rate=3e-3, weight_decay=0.1, beta1=0.9, beta2=0.95)
    optimizer = make_optimizer(model, recipe)
    losses = []
    for _ in range(60):
        loss = summed_loss(model, *rows, precision="bf16") / int(rows[2].sum())
        loss.backward()
        clip_gradients(model, 1.0)
        update(optimizer, rate=3e-3)
        losses.append(float(loss.detach()))

    assert losses[-1] < 0.5 * losses[0]


def test_fp8_is_near_bf16(device, rows):
    pytest.importorskip("torchao")
    if torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("needs compute capability 8.9")
    exact = loss_and_gradients(make_model(device), rows, "fp32")
    model = make_model(device)
    assert convert_to_float8(model, device) == 14
    prepare(model, Execution(compile=True), device, "bf16")

    assert loss_and_gradients(model, rows, "bf16")[0] == pytest.approx(exact[0], rel=0.05)


def test_the_card_says_of_what_it_is_capable(device):
    found = peak(device, torch.bfloat16)

    assert found.flops_per_s > 1e13
    assert found.source in ("published", "measured")


def test_a_run_on_a_gpu_ends_with_nearly_the_weights_of_a_run_on_a_cpu(runs, largest_difference):
    from aifactory.train.worker import work

    tasks = [runs.work(f"device-{kind}", dropout=0.0) for kind in ("cpu", "cuda")]
    for task, kind in zip(tasks, ("cpu", "cuda"), strict=True):
        work(task, device=torch.device(kind))

    assert largest_difference(*tasks) < 1e-3


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_workers_that_meet_by_nccl_end_with_the_weights_of_one(runs, tmp_path, largest_difference, how):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    import pickle

    from aifactory.train.worker import work

    changes = {"parallel": how, "micro_batch_rows": 1}
    task, alone = (runs.work(f"nccl-{how}-{n}", dropout=0.0, changes=changes) for n in (2, 1))
    (tmp_path / "work").write_bytes(pickle.dumps(task))
    script = (
        "import os, pickle, sys, torch\n"
        "from aifactory.train.worker import work\n"
        "torch.cuda.set_device(int(os.environ['LOCAL_RANK']))\n"
        "torch.distributed.init_process_group('nccl')\n"
        "task = pickle.load(open(sys.argv[1], 'rb'))\n"
        "work(task, rank=torch.distributed.get_rank(), world_size=torch.distributed.get_world_size())\n"
        "torch.distributed.destroy_process_group()\n"
    )
    (tmp_path / "worker.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(tmp_path / "worker.py"), str(tmp_path / "work")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    work(alone, device=torch.device("cuda", 0))

    assert largest_difference(task, alone) < 1e-3


def test_the_benchmark_of_one_gpu_runs(tmp_path):
    file = ROOT / "benchmarks" / "train_gpu.py"
    done = subprocess.run(
        [sys.executable, str(file), "--quick", "--ablation"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])

    assert {name for name, each in found.items() if "failed" in each} <= {"fp8"}
