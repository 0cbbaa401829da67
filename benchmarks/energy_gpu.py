"""The GPU's energy counter, which the ledger is made of, against its power, sampled by another process and integrated.

    phase   idle ─▶ busy (matrix products without end) ─▶ bursts (0.3 s busy, 0.3 s idle)

Keys     counter_over_samples_P    joules by the counter over those by the samples, in phase P: idle, busy, bursts, all
         watts_P                   mean power by the counter
         samples_per_s             how often power was read
         counter_step_ms           from one change of the counter to the next, which is how short a block it can tell
Power is NVML's instantaneous field, in milliwatts, integrated by trapezoids between the readings of the counter.
Needs an NVIDIA GPU and nvidia-ml-py; where there is none every figure is null.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runner import Measured, main

from aifactory.observe.energy import Meter

PHASES = ("idle", "busy", "bursts")
KEYS = (
    *(f"counter_over_samples_{phase}" for phase in (*PHASES, "all")),
    *(f"watts_{phase}" for phase in (*PHASES, "all")),
    "samples_per_s",
    "counter_step_ms",
)
_NO_PACKAGES = Path("/nonexistent")
"""In place of the processors' counters: these joules are the GPU's alone."""
_SAMPLER = """
import sys, time
import pynvml
pynvml.nvmlInit()
device = pynvml.nvmlDeviceGetHandleByIndex(0)
field = pynvml.NVML_FI_DEV_POWER_INSTANT
print("ready", flush=True)
stop = time.perf_counter() + float(sys.argv[1])
lines = []
while time.perf_counter() < stop:
    before = time.perf_counter()
    found = pynvml.nvmlDeviceGetFieldValues(device, [field])[0]
    after = time.perf_counter()
    if found.nvmlReturn != 0:
        sys.exit(f"no instantaneous power: error {found.nvmlReturn}")
    lines.append(f"{(before + after) / 2} {found.value.uiVal} {pynvml.nvmlDeviceGetTotalEnergyConsumption(device)}")
    time.sleep(0.005)
print("\\n".join(lines))
"""
"""Seconds of this machine's monotonic clock, which its processes share; milliwatts; millijoules since the driver started."""


def measure(quick: bool, rounds: int | None) -> Measured:
    """The phases in turn, again and again, while one sampler runs."""
    if not torch.cuda.is_available():
        return Measured(figures=dict.fromkeys(KEYS), raw={}, notes=["no NVIDIA GPU"])
    seconds, rounds = (2.0, 1) if quick else (10.0, rounds or 3)
    work = _products()
    work()
    torch.cuda.synchronize()
    total = rounds * len(PHASES) * seconds
    sampler = subprocess.Popen(
        [sys.executable, "-c", _SAMPLER, str(total + 2)], stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert sampler.stdout is not None
    sampler.stdout.readline()
    time.sleep(0.5)
    blocks: list[tuple[str, float, float, float]] = []
    for _ in range(rounds):
        for phase in PHASES:
            meter, begun = Meter(num_cpus=0, watts_per_cpu=0, powercap=_NO_PACKAGES), time.perf_counter()
            _keep(phase, work, begun + seconds)
            found, ended = meter.read(), time.perf_counter()
            assert found.source == "nvml", f"expected the GPU's counter, found {found.source}"
            blocks.append((phase, begun, ended, found.joules))
    out, _ = sampler.communicate()
    if sampler.returncode:
        raise SystemExit(f"expected samples of the GPU's power, found exit status {sampler.returncode}")
    samples = [tuple(map(float, line.split())) for line in out.splitlines() if line]
    times, watts = [each[0] for each in samples], [each[1] / 1e3 for each in samples]
    raw: dict[str, list[float]] = {}
    counted_all = sampled_all = seconds_all = 0.0
    for phase, begun, ended, joules in blocks:
        sampled = _integral(times, watts, begun, ended)
        raw.setdefault(f"counter_over_samples_{phase}", []).append(joules / sampled)
        raw.setdefault(f"watts_{phase}", []).append(joules / (ended - begun))
        counted_all, sampled_all, seconds_all = counted_all + joules, sampled_all + sampled, seconds_all + ended - begun
    changes = [at for at, now, before in zip(times[1:], samples[1:], samples, strict=False) if now[2] != before[2]]
    steps = [1e3 * (later - earlier) for earlier, later in pairwise(changes)]
    figures = {key: statistics.median(values) for key, values in raw.items()} | {
        "counter_over_samples_all": counted_all / sampled_all,
        "watts_all": counted_all / seconds_all,
        "samples_per_s": len(times) / (times[-1] - times[0]),
        "counter_step_ms": statistics.median(steps),
    }
    return Measured(
        figures={key: round(figures[key], 4) for key in KEYS},
        raw=raw,
        notes=[torch.cuda.get_device_name()],
    )


def _products() -> Callable[[], None]:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)

    def work() -> None:
        torch.mm(a, b, out=out)

    return work


def _keep(phase: str, work: Callable[[], None], until: float) -> None:
    while (now := time.perf_counter()) < until:
        if phase == "idle" or (phase == "bursts" and int((until - now) / 0.3) % 2):
            time.sleep(0.01)
        else:
            for _ in range(4):
                work()
            torch.cuda.synchronize()


def _integral(times: Sequence[float], watts: Sequence[float], begun: float, ended: float) -> float:
    """Joules between two moments, by trapezoids; power at a moment between two samples is on the line between them."""

    def at(moment: float) -> float:
        after = bisect_left(times, moment)
        share = (moment - times[after - 1]) / (times[after] - times[after - 1])
        return watts[after - 1] + share * (watts[after] - watts[after - 1])

    inside = slice(bisect_left(times, begun), bisect_left(times, ended))
    points = [(begun, at(begun)), *zip(times[inside], watts[inside], strict=True), (ended, at(ended))]
    return sum((t1 - t0) * (w0 + w1) / 2 for (t0, w0), (t1, w1) in pairwise(points))


if __name__ == "__main__":
    main("energy_gpu", measure)
