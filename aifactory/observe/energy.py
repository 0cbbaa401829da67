"""Joules of a block: read from counters where there are any, else estimated, and it says which.

Counters   NVML's total energy of this node's GPUs (Volta and later), of those that this process may use where
           CUDA_VISIBLE_DEVICES names some, and RAPL's package domains (Linux powercap).
Estimate   CPUs x seconds x watts per CPU, by configuration. It is an upper bound where the CPUs were idle.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from aifactory.observe import metrics
from aifactory.observe.events import Timer

if TYPE_CHECKING:
    from aifactory.config import Site

EnergySource = Literal["nvml", "rapl", "estimate"]
POWERCAP = Path("/sys/class/powercap")
_NVML = "nvml"
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_JOULES_PER_KWH = 3.6e6


@dataclass(slots=True)
class Energy:
    """What a block used; complete when the block has ended."""

    joules: float = 0.0
    source: EnergySource = "estimate"
    seconds: float = 0.0


class Meter:
    """What this node has used since the meter was made; it may be read again and again.

    share   of what the counters say: they cover all that ran on this node meanwhile, so of blocks that run side by side
            each is given its part
    package_share  beyond that, of what the processors' packages say: what a process that lives long is given of them
    """

    def __init__(
        self,
        *,
        num_cpus: float,
        watts_per_cpu: float,
        powercap: Path = POWERCAP,
        share: float = 1.0,
        package_share: float = 1.0,
    ) -> None:
        self._watts = num_cpus * watts_per_cpu
        self._powercap = powercap
        self._share = share
        self._package_share = package_share
        self._timer = Timer()
        self._before = _counters(powercap)

    def read(self) -> Energy:
        """Joules and seconds up to now."""
        seconds, after = self._timer.seconds, _counters(self._powercap)
        # A counter that came or went in between says nothing of the block.
        if not self._before or self._before.keys() != after.keys():
            return Energy(joules=self._watts * seconds, source="estimate", seconds=seconds)
        spent = sum(
            _spent(name, self._before[name], after[name], self._powercap)
            * (1.0 if name == _NVML else self._package_share)
            for name in after
        )
        return Energy(joules=self._share * spent, source="nvml" if _NVML in after else "rapl", seconds=seconds)


@contextmanager
def measured(
    *, num_cpus: float, watts_per_cpu: float, powercap: Path = POWERCAP, share: float = 1.0
) -> Iterator[Energy]:
    """Measure a block on this node, as a `Meter` does.

    Units   joules, seconds. Counters cover this node alone and all that ran on it meanwhile.
    """
    energy = Energy()
    meter = Meter(num_cpus=num_cpus, watts_per_cpu=watts_per_cpu, powercap=powercap, share=share)
    try:
        yield energy
    finally:
        found = meter.read()
        energy.joules, energy.source, energy.seconds = found.joules, found.source, found.seconds


def count_joules(energy: Energy, site: Site, *, stage: str, busy_share: float = 1.0) -> None:
    """Count what a stage has used, and what that costs where the site has a price for it, in the meters of this process."""
    for state, share in (("busy", busy_share), ("idle", 1.0 - busy_share)):
        metrics.ENERGY.add(share * energy.joules, stage=stage, source=energy.source, state=state)
    if site.price_per_kwh:
        money = energy.joules / _JOULES_PER_KWH * site.pue * site.price_per_kwh
        metrics.MONEY.add(money, stage=stage, currency=site.currency)


def _counters(powercap: Path) -> dict[str, float]:
    """Joules by counter; none where none can be read."""
    gpus = _nvml_joules()
    return _rapl_joules(powercap) | ({} if gpus is None else {_NVML: gpus})


def _spent(name: str, before: float, after: float, powercap: Path) -> float:
    if after >= before:
        return after - before
    # RAPL's counters begin again at zero after some 262 kJ; a block in which one does so twice is counted too low.
    return after - before + int((powercap / name / "max_energy_range_uj").read_text()) / 1e6


def _rapl_joules(powercap: Path) -> dict[str, float]:
    try:
        # Package domains only (`intel-rapl:0`): their sub-domains are counted in them.
        files = [f for f in powercap.glob("*-rapl:*/energy_uj") if f.parent.name.count(":") == 1]
        return {file.parent.name: int(file.read_text()) / 1e6 for file in files}
    except (OSError, ValueError):
        return {}


def _nvml_joules() -> float | None:
    try:
        import pynvml  # only where the NVIDIA extra is installed
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        visible = os.environ.get(_VISIBLE)
        if visible is None:
            handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        else:
            named = [name.strip() for name in visible.split(",") if name.strip()]
            handles = [
                pynvml.nvmlDeviceGetHandleByIndex(int(name))
                if name.isdecimal()
                else pynvml.nvmlDeviceGetHandleByUUID(name)
                for name in named
            ]
            if not handles:
                return None
        return float(sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles)) / 1e3
    except pynvml.NVMLError:
        return None
