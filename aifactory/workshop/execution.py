"""Under what a product was made: under the same execution a rebuild gives the same bytes. It is in no fingerprint."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from aifactory.config import Runtime, Train

_LIBRARIES = ("ray", "torch", "transformers", "tokenizers", "pyarrow", "numpy")


def execution_of(runtime: Runtime, train: Train) -> dict[str, Any]:
    """Workers, threads, how a step is computed, instruction set, versions."""
    return {
        "workers": runtime.workers,
        "threads_per_worker": train.threads or max(1, int(runtime.cpus_per_worker)),
        "micro_batch_rows": train.micro_batch_rows or runtime.micro_batch_rows,
        "parallel": "tree" if train.is_across_workers else runtime.parallel,
        "step": runtime.execution.model_dump(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "cpu_flags": _cpu_flags(),
        **{name: version(name) for name in (*_LIBRARIES, *(["peft"] if train.lora else []))},
    }


def _cpu_flags() -> list[str]:
    """Instruction sets that change how sums are made; empty where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return []
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    return sorted(flag for flag in flags if flag.startswith(("avx", "amx", "fma")))
