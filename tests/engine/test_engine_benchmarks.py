"""The engine's benchmarks: their arithmetic is right, and --quick proves that all of it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("name", ["serve", "serve_gpu"])
def test_quick_runs_without_ray_and_gives_every_key_of_the_docstring(name):
    program = f"import sys, runpy; sys.modules['ray'] = None; sys.argv = ['{name}.py', '--quick']; "
    program += f"sys.path.insert(0, 'benchmarks'); runpy.run_path('benchmarks/{name}.py', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert all(value > 0 for value in figures.values())
    kinds = ("plain", "float32", "bfloat16", "int8") if name == "serve" else ()
    counts = ("c1", "c4") if name == "serve" else ("b1", "b4")
    documented = (ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8").split('"""')[1]
    for figure in figures:
        pattern = figure
        for kind in kinds if not figure.startswith("over_") else ():
            pattern = pattern.replace(kind, "KIND")
        for count in counts:
            pattern = (
                pattern.replace(f"_{count}", f"_{count[0]}{count[0].upper()}") if "share_c1" not in pattern else pattern
            )
        assert pattern.replace("_p99", "_p50") in documented, figure


def test_percentiles_and_rates_are_what_they_are_called():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from closed_loop import Seen, percentile

    values = [float(value) for value in range(1, 101)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile(values[:3], 0.99)) == (50, 99, 3)
    assert Seen(num_tokens=30, seconds=2.0).tokens_per_s == 15
