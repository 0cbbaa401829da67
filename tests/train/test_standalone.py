"""The step runs on any machine with torch, without the factory around it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BLOCKED = ["ray", "pydantic", "sqlalchemy", "alembic"]


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
