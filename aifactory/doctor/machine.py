"""Checks of the machine: what Python, Ray and torch need of it."""

from __future__ import annotations

import os
import re
import resource
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from aifactory.doctor.check import Check, ok, wrong

_GIB = 1024**3
_SHARED_LEAST = 2 * _GIB
_FILES_LEAST = 4096
_RAY = ((2, 60), (2, 62))


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What there is."""

    cpus: int
    memory_bytes: int
    available_bytes: int
    shared_bytes: int
    """Of /dev/shm; 0 where there is none."""
    open_files: int
    ray: str | None
    torch_cuda: str | None
    """The CUDA that torch was built for; None: for CPUs alone."""
    has_torch: bool
    driver: str | None
    """The version of NVIDIA's driver."""
    gpus: int
    """Device files of GPUs."""


def look() -> Machine:
    """This machine."""
    memory = _memory(Path("/proc/meminfo"))
    cuda = _torch_cuda()
    return Machine(
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=memory.get("MemTotal", 0),
        available_bytes=memory.get("MemAvailable", 0),
        shared_bytes=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        ray=_version("ray"),
        torch_cuda=cuda,
        has_torch=find_spec("torch") is not None,
        driver=_driver(Path("/proc/driver/nvidia/version")),
        gpus=len(list(Path("/dev").glob("nvidia[0-9]*"))),
    )


def checks(machine: Machine, *, gpus_asked: float = 0.0) -> Iterator[Check]:
    """`gpus_asked`: of the configuration, for a worker or a replica."""
    yield ok("CPUs", f"{machine.cpus}")
    yield _of_memory(machine)
    yield _of_shared_memory(machine)
    if machine.open_files != resource.RLIM_INFINITY and machine.open_files < _FILES_LEAST:
        yield wrong(
            "open files",
            f"{machine.open_files} for a process",
            expected=f"{_FILES_LEAST} at least: Ray opens one for each of its workers' connections",
            remedy="ulimit -n 65536, or LimitNOFILE= of the systemd unit.",
        )
    else:
        yield ok("open files", f"{machine.open_files} for a process")
    yield _of_ray(machine)
    yield _of_gpu(machine, gpus_asked)


def _of_memory(machine: Machine) -> Check:
    found = f"{machine.available_bytes / _GIB:.1f} of {machine.memory_bytes / _GIB:.1f} GiB are free"
    if machine.available_bytes < _GIB:
        return wrong(
            "memory",
            found,
            expected="1 GiB at least, beyond which Ray kills workers",
            remedy="End what else runs here, or take a larger machine.",
        )
    return ok("memory", found)


def _of_shared_memory(machine: Machine) -> Check:
    found = f"/dev/shm has {machine.shared_bytes / _GIB:.2f} GiB"
    if machine.shared_bytes < min(_SHARED_LEAST, 0.3 * machine.memory_bytes):
        return wrong(
            "shared memory",
            found,
            expected="30 % of the memory, or 2 GiB at least: Ray keeps objects there, and else in files of /tmp, which is slow",
            remedy="docker run --shm-size=8g, or an emptyDir with medium: Memory at /dev/shm.",
        )
    return ok("shared memory", found)


def _of_ray(machine: Machine) -> Check:
    low, high = (".".join(map(str, each)) for each in _RAY)
    expected = f"ray from {low} on and before {high}"
    if machine.ray is None:
        return wrong(
            "Ray", "not installed", expected=expected, remedy="pip install aifactory brings it.", is_error=True
        )
    if not _RAY[0] <= tuple(int(part) for part in machine.ray.split(".")[:2]) < _RAY[1]:
        remedy = f"pip install 'ray[data,default,serve,train]>={low},<{high}'."
        return wrong("Ray", f"ray {machine.ray}", expected=expected, remedy=remedy, is_error=True)
    return ok("Ray", f"ray {machine.ray}")


def _of_gpu(machine: Machine, asked: float) -> Check:
    if asked and machine.driver is None:
        return wrong(
            "GPU",
            f"no NVIDIA driver, and {asked:g} GPU(s) for a worker or a replica are asked for",
            expected="a driver, where runtime.gpus_per_worker or endpoint.gpus_per_replica is above 0",
            remedy="Install the driver (nvidia-smi tells that it works), or run where there is a GPU, or set both to 0.",
            is_error=True,
        )
    if asked and machine.torch_cuda is None:
        return wrong(
            "GPU",
            "torch was built for CPUs alone, and GPUs are asked for",
            expected="torch with CUDA",
            remedy="pip install torch from PyPI, or from the index of your CUDA version.",
            is_error=True,
        )
    if machine.driver is None and machine.gpus:
        return wrong(
            "GPU",
            f"{machine.gpus} device file(s), and no driver",
            expected="/proc/driver/nvidia/version",
            remedy="Load the kernel module (modprobe nvidia), or give the container the driver (--gpus all).",
        )
    if machine.driver is None and machine.torch_cuda is not None:
        return wrong(
            "GPU",
            f"torch for CUDA {machine.torch_cuda}, and no NVIDIA driver",
            expected="a driver, or torch for CPUs",
            remedy="Nothing, if this machine has no GPU: it works, and takes 5 GB of disk more than torch for CPUs does.",
        )
    if machine.driver is not None and machine.torch_cuda is None and machine.has_torch:
        return wrong(
            "GPU",
            f"driver {machine.driver}, and torch was built for CPUs alone: the GPU is used by nothing",
            expected="torch with CUDA",
            remedy="pip install torch from PyPI, or from the index of your CUDA version.",
        )
    if machine.driver is None:
        return ok("GPU", "none, and none is asked for")
    return ok("GPU", f"driver {machine.driver}, torch for CUDA {machine.torch_cuda}")


def _memory(file: Path) -> Mapping[str, int]:
    """Bytes by name."""
    try:
        pairs = re.findall(r"^(\w+):\s+(\d+) kB$", file.read_text(), re.MULTILINE)
    except OSError:
        return {}
    return {name: int(number) * 1024 for name, number in pairs}


def _driver(file: Path) -> str | None:
    try:
        found = re.search(r"Module\s+(?:for \w+\s+)?([\d.]+)", file.read_text())
    except OSError:
        return None
    return found[1] if found else "of an unknown version"


def _torch_cuda() -> str | None:
    """What torch says in its version.py, without loading it."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^cuda(?:: [^=]+)? = ['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return None if found is None else found[1]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
