"""Accelerators: what each is capable of, by its maker, and the CPU by this project's own measurements.

A maker's gigabytes are counted as 10^9 bytes. Cards hold up to 7 % more, which the driver's own context takes.
Networks are what the makers' reference machines have for each accelerator; others are asked for by `replace`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from aifactory.errors import ConfigError
from aifactory.plan import calibration


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """One device that computes."""

    name: str
    tflops: float
    """Dense products in bf16 with sums in fp32, 10^12 operations a second. Of a CPU what training in fp32 sustains."""
    memory_gb: float
    """10^9 bytes."""
    bandwidth_gb_s: float
    """Of its memory. Of a CPU what decoding sustains."""
    watts: float
    """Most that it draws."""
    host_watts: float
    """Its share of what the rest of the machine draws: processors, fans, network."""
    link_gb_s: float
    """To the others of its node, in one direction."""
    network_gb_s: float
    """To other nodes, in one direction."""
    per_node: int
    """Devices of a node."""
    power_limit_watts: float | None = None
    """Where it is held below `watts`."""
    products_share: float = calibration.PRODUCTS_SHARE
    """Of `tflops`, what large products reach in training; fitted on Hopper, and taken to be the same where nothing was measured."""
    crowded_share: float = 1.0
    """What each reaches of its rate when all of its node compute."""
    kind: Literal["gpu", "cpu"] = "gpu"
    source: str

    @property
    def memory_bytes(self) -> float:
        return self.memory_gb * 1e9

    @property
    def drawn_watts(self) -> float:
        """Of the device and its share of the machine: an upper bound, as if it were busy all the time."""
        return (self.power_limit_watts or self.watts) + self.host_watts

    @property
    def clock_share(self) -> float:
        """What a power limit leaves of the rate of products.

        Source   dynamic power goes with voltage squared times clock, and voltage with the clock: the third root.
        """
        return float(min(1.0, (self.power_limit_watts or self.watts) / self.watts) ** (1 / 3))


def accelerator(name: str) -> Accelerator:
    """The one of this name.

    Raises   ConfigError with the names that there are.
    """
    found = ACCELERATORS.get(name.lower())
    if found is None:
        raise ConfigError(
            f"expected an accelerator of {', '.join(ACCELERATORS)}, found {name!r}; `aifactory plan --list` tells what each is."
        )
    return found


_ALL = (
    Accelerator(
        name="h100",
        tflops=989.4,
        memory_gb=80,
        bandwidth_gb_s=3350,
        watts=700,
        host_watts=(10_200 - 8 * 700) / 8,
        link_gb_s=450,
        network_gb_s=50,
        per_node=8,
        source="NVIDIA H100 SXM5 data sheet; DGX H100 data sheet (10.2 kW, 400 Gb/s for each GPU)",
    ),
    Accelerator(
        name="h200",
        tflops=989.4,
        memory_gb=141,
        bandwidth_gb_s=4800,
        watts=700,
        host_watts=(10_200 - 8 * 700) / 8,
        link_gb_s=450,
        network_gb_s=50,
        per_node=8,
        source="NVIDIA H200 SXM data sheet; DGX H200 data sheet (10.2 kW, 400 Gb/s for each GPU)",
    ),
    Accelerator(
        name="a100",
        tflops=312,
        memory_gb=80,
        bandwidth_gb_s=2039,
        watts=400,
        host_watts=(6_500 - 8 * 400) / 8,
        link_gb_s=300,
        network_gb_s=25,
        per_node=8,
        products_share=calibration.A100_PRODUCTS_SHARE,
        source="NVIDIA A100 80GB SXM data sheet; DGX A100 data sheet (6.5 kW, 200 Gb/s for each GPU)",
    ),
    Accelerator(
        name="b200",
        tflops=2250,
        memory_gb=180,
        bandwidth_gb_s=8000,
        watts=1000,
        host_watts=(14_300 - 8 * 1000) / 8,
        link_gb_s=900,
        network_gb_s=50,
        per_node=8,
        source="NVIDIA Blackwell architecture brief (HGX B200, 1,000 W); DGX B200 data sheet (14.3 kW, 1,440 GB, 400 Gb/s)",
    ),
    Accelerator(
        name="l40s",
        tflops=362.05,
        memory_gb=48,
        bandwidth_gb_s=864,
        watts=350,
        host_watts=(6_500 - 8 * 400) / 8,
        link_gb_s=32,
        network_gb_s=12.5,
        per_node=8,
        source="NVIDIA L40S data sheet (PCIe 4 x16); the rest of the machine as DGX A100's and 100 Gb/s for each GPU: assumed",
    ),
    Accelerator(
        name="mi300x",
        tflops=1307.4,
        memory_gb=192,
        bandwidth_gb_s=5300,
        watts=750,
        host_watts=(10_200 - 8 * 700) / 8,
        link_gb_s=448,
        network_gb_s=50,
        per_node=8,
        source="AMD Instinct MI300X data sheet (7 links of 64 GB/s); the rest of the machine as DGX H100's: assumed",
    ),
    Accelerator(
        name="cpu",
        tflops=0.0467,
        memory_gb=12.6,
        bandwidth_gb_s=6.1,
        watts=10,
        host_watts=0,
        link_gb_s=0.79,
        network_gb_s=0.125,
        per_node=2,
        products_share=1.0,
        crowded_share=0.771,
        kind="cpu",
        source=(
            "one CPU of an AMD EPYC without bf16, fp32: benchmarks/results/train-2026-11-26.json (rate, memory, two at once); "
            "DECISIONS.md 2026-11-26 (decoding 110 M parameters, gloo); watts: runtime.watts_per_cpu, an estimate; 1 Gb/s: assumed"
        ),
    ),
)
ACCELERATORS = {each.name: each for each in _ALL}
