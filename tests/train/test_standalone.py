"""Laws of the pure rooms: the trainer and the engine run on any machine with torch, without the factory around them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BLOCKED = ["ray", "pydantic", "sqlalchemy", "alembic"]
PURE = [
    "aifactory.train.base",
    "aifactory.train.checkpoint",
    "aifactory.train.guard",
    "aifactory.train.loop",
    "aifactory.train.lora",
    "aifactory.train.objectives",
    "aifactory.train.parallel",
    "aifactory.train.room",
    "aifactory.train.sampler",
    "aifactory.train.schedule",
    "aifactory.train.step",
    "aifactory.train.worker",
    "aifactory.evaluate.gate",
    "aifactory.evaluate.scoring",
    "aifactory.evaluate.statistics",
    "aifactory.train.attention",
    "aifactory.train.base",
    "aifactory.train.checkpoint",
    "aifactory.train.cross_entropy",
    "aifactory.train.execution",
    "aifactory.train.float8",
    "aifactory.train.flops",
    "aifactory.train.guard",
    "aifactory.train.loop",
    "aifactory.train.loss_chart",
    "aifactory.train.memory",
    "aifactory.train.parallel",
    "aifactory.train.parity",
    "aifactory.train.pieces",
    "aifactory.train.room",
    "aifactory.train.run_log",
    "aifactory.train.sampler",
    "aifactory.train.schedule",
    "aifactory.train.step",
    "aifactory.train.trackers",
    "aifactory.train.validation",
    "aifactory.train.watch",
    "aifactory.train.worker",
]
SCRIPT = """
import importlib, pkgutil, sys
for name in {blocked}:
    sys.modules[name] = None
import aifactory.engine, aifactory.text
pure = {pure}
for room in (aifactory.engine, aifactory.text):
    pure += [room.__name__ + "." + module.name for module in pkgutil.iter_modules(room.__path__)]
for name in pure:
    importlib.import_module(name)
print(len(pure))
"""


def test_the_step_and_the_engine_are_imported_without_ray_pydantic_and_sqlalchemy():
    script = SCRIPT.format(blocked=BLOCKED, pure=PURE)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)

    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > len(PURE) + 10


def test_the_benchmark_of_a_gpu_runs_on_torch_transformers_and_numpy_alone():
    blocked = [*BLOCKED, "pyarrow", "aiohttp", "numba"]
    file = Path(__file__).parents[2] / "benchmarks" / "train_gpu.py"
    script = (
        f"import runpy, sys\nfor name in {blocked}: sys.modules[name] = None\n"
        f"sys.argv = ['train_gpu.py', '--quick', '--ablation']\nrunpy.run_path({str(file)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["as meant"]["tokens_per_s"] > 0
    assert {name for name, each in found.items() if "failed" in each} == {"fp8"}
