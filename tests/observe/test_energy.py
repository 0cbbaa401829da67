"""Joules: from counters where there are any, else estimated, and it says which."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from aifactory.observe.energy import Meter, measured


def set_counter(powercap: Path, domain: str, joules: float, *, most: float = 1000) -> None:
    folder = powercap / domain
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "energy_uj").write_text(f"{int(joules * 1e6)}\n")
    (folder / "max_energy_range_uj").write_text(f"{int(most * 1e6)}\n")


def test_without_counters_it_is_an_estimate_of_cpus_seconds_and_watts(tmp_path: Path) -> None:
    with measured(num_cpus=2, watts_per_cpu=10, powercap=tmp_path / "none") as energy:
        time.sleep(0.02)

    assert energy.source == "estimate"
    assert energy.seconds >= 0.02
    assert energy.joules == pytest.approx(2 * 10 * energy.seconds)


def test_packages_are_summed_and_their_sub_domains_are_not_counted_twice(tmp_path: Path) -> None:
    for domain in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
        set_counter(tmp_path, domain, 100)

    with measured(num_cpus=2, watts_per_cpu=10, powercap=tmp_path) as energy:
        set_counter(tmp_path, "intel-rapl:0", 107)
        set_counter(tmp_path, "intel-rapl:1", 101)
        set_counter(tmp_path, "intel-rapl:0:0", 105)

    assert (energy.source, energy.joules) == ("rapl", pytest.approx(8.0))


def test_a_counter_that_begins_again_at_zero_is_continued(tmp_path: Path) -> None:
    set_counter(tmp_path, "intel-rapl:0", 990)

    with measured(num_cpus=2, watts_per_cpu=10, powercap=tmp_path) as energy:
        set_counter(tmp_path, "intel-rapl:0", 5)

    assert (energy.source, energy.joules) == ("rapl", pytest.approx(15.0))


def test_counters_that_come_or_go_or_are_no_numbers_make_it_an_estimate(tmp_path: Path) -> None:
    set_counter(tmp_path, "intel-rapl:0", 100)
    with measured(num_cpus=1, watts_per_cpu=10, powercap=tmp_path) as comes:
        set_counter(tmp_path, "intel-rapl:1", 100)
    with measured(num_cpus=1, watts_per_cpu=10, powercap=tmp_path) as broken:
        (tmp_path / "intel-rapl:1" / "energy_uj").write_text("?")

    assert (comes.source, broken.source) == ("estimate", "estimate")


def test_a_block_that_fails_is_measured_too(tmp_path: Path) -> None:
    with pytest.raises(KeyError), measured(num_cpus=1, watts_per_cpu=10, powercap=tmp_path) as energy:
        raise KeyError
    assert energy.joules > 0


def test_a_meter_is_read_while_the_block_runs(tmp_path: Path) -> None:
    set_counter(tmp_path, "intel-rapl:0", 100)
    meter = Meter(num_cpus=1, watts_per_cpu=10, powercap=tmp_path)
    read = []
    for joules in (101, 104):
        set_counter(tmp_path, "intel-rapl:0", joules)
        read.append(meter.read().joules)

    assert read == [pytest.approx(1), pytest.approx(4)]


def test_blocks_that_run_side_by_side_are_given_their_parts_of_what_was_counted(tmp_path: Path) -> None:
    set_counter(tmp_path, "intel-rapl:0", 100)
    with measured(num_cpus=1, watts_per_cpu=10, powercap=tmp_path, share=0.25) as counted:
        set_counter(tmp_path, "intel-rapl:0", 108)
    with measured(num_cpus=1, watts_per_cpu=10, powercap=tmp_path / "none", share=0.25) as estimated:
        time.sleep(0.01)

    assert (counted.source, counted.joules) == ("rapl", pytest.approx(2.0))
    # An estimate is of the block's own CPUs alone.
    assert estimated.joules == pytest.approx(10 * estimated.seconds)


def test_a_process_is_given_its_part_of_the_packages(tmp_path: Path) -> None:
    set_counter(tmp_path, "intel-rapl:0", 100)
    meter = Meter(num_cpus=1, watts_per_cpu=10, powercap=tmp_path, package_share=0.25)
    set_counter(tmp_path, "intel-rapl:0", 108)

    assert meter.read().joules == pytest.approx(2.0)


class FakeNvml:
    """NVML with three devices, each with a counter of millijoules."""

    NVMLError = RuntimeError

    def __init__(self) -> None:
        self.counters = {"0": 1000, "1": 20_000, "2": 300_000}

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.counters)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        return str(index)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if not uuid.startswith("GPU-"):
            raise RuntimeError("no such device")
        return uuid.removeprefix("GPU-")

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        return self.counters[handle]


@pytest.mark.parametrize(
    ("visible", "joules"), [(None, 3.0), ("0,2", 2.0), ("GPU-1", 1.0), ("", None), ("MIG-7", None)]
)
def test_devices_that_a_process_may_not_use_are_not_counted(
    visible: str | None, joules: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    meter = Meter(num_cpus=1, watts_per_cpu=0, powercap=tmp_path, package_share=0.5)
    for device in nvml.counters:
        nvml.counters[device] += 1000

    read = meter.read()
    assert read.source == ("estimate" if joules is None else "nvml")
    assert read.joules == pytest.approx(joules or 0.0)
