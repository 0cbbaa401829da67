"""What the installation compiles."""

from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from numba.core.dispatcher import Dispatcher

import aifactory.engine
import aifactory.ingest
import aifactory.tokens


def _kernels() -> set[str]:
    """All kernels, as numba names what it keeps of them."""
    found = set()
    for room in (aifactory.engine, aifactory.ingest, aifactory.tokens):
        for module in pkgutil.walk_packages(room.__path__, f"{room.__name__}."):
            for value in vars(importlib.import_module(module.name)).values():
                if isinstance(value, Dispatcher):
                    found.add(f"{value.py_func.__module__.rpartition('.')[2]}.{value.py_func.__name__}")
    return found


@pytest.mark.slow
def test_no_kernel_is_left_for_the_first_run_to_compile(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-m", "aifactory.kernels"], check=True, env=environment, timeout=600)
    kept = {file.name.partition("-")[0] for file in tmp_path.rglob("*.nbi")}
    assert kept == _kernels()
    assert len(kept) > 50
