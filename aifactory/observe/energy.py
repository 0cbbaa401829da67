"""Joules of a block: read from counters where there are any, else estimated, and it says which.

Counters   NVML's total energy of the visible GPUs (Volta and later), and RAPL's package domains (Linux powercap).
Estimate   CPUs x seconds x watts per CPU, by configuration. It is an upper bound where the CPUs were idle.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from aifactory.observe.events import Timer

EnergySource = Literal["nvml", "rapl", "estimate"]
_POWERCAP = Path("/sys/class/powercap")


@dataclass(slots=True)
class Energy:
    """What a block used; complete when the block has ended."""

    joules: float = 0.0
    source: EnergySource = "estimate"
    seconds: float = 0.0


@contextmanager
def measured(*, num_cpus: float, watts_per_cpu: float) -> Iterator[Energy]:
    """Measure a block on this node.

    Units   joules, seconds. Counters cover this node alone and all that ran on it meanwhile.
    """
    energy = Energy()
    timer = Timer()
    before = _counters()
    try:
        yield energy
    finally:
        timer.stop()
        energy.seconds = timer.seconds
        after = _counters()
        if before is not None and after is not None:
            energy.source = after[0]
            energy.joules = max(0.0, after[1] - before[1])
        else:
            energy.joules = num_cpus * watts_per_cpu * timer.seconds


def _counters() -> tuple[EnergySource, float] | None:
    gpu = _nvml_joules()
    if gpu is not None:
        return "nvml", gpu + (_rapl_joules() or 0.0)
    rapl = _rapl_joules()
    return None if rapl is None else ("rapl", rapl)


def _rapl_joules() -> float | None:
    try:
        # Package domains only (`intel-rapl:0`): their sub-domains are counted in them.
        files = [f for f in _POWERCAP.glob("*-rapl:*/energy_uj") if f.parent.name.count(":") == 1]
        return sum(int(file.read_text()) for file in files) / 1e6 if files else None
    except (OSError, ValueError):
        return None


def _nvml_joules() -> float | None:
    try:
        import pynvml  # only where the NVIDIA extra is installed
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return float(sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles)) / 1e3
    except pynvml.NVMLError:
        return None
