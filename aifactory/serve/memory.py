"""Memory: whether another release fits beside the one that is served. Asked before it is loaded: afterwards it is too late."""

from __future__ import annotations

import math
from pathlib import Path

from aifactory.errors import CapacityError

_BYTES_PER_WEIGHT = 4
"""Releases are served in fp32."""
_COPIES = 2
"""While a release is loaded: as it is read, and as the engine keeps it."""
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
        "total_inactive_file",
    ),
)
"""Limit, use, and what of the use is given back when it is wanted; version 2 and version 1."""


def require_memory(folder: Path, *, device: str = "cpu") -> None:
    """Raise CapacityError unless the model of `folder` can be loaded into memory that is free now.

    Where nobody says how much is free, nothing is refused.
    """
    needed, free = needed_bytes(folder), free_bytes(device)
    if free is not None and needed > free:
        raise CapacityError(
            f"expected {needed / 1e9:.2f} GB of memory to load the release beside the one in production, found "
            f"{free / 1e9:.2f} GB free on {device}. Serve it from larger machines, or promote it without a trial."
        )


def needed_bytes(folder: Path) -> int:
    """What the weights of a folder come to while they are loaded."""
    from safetensors import safe_open

    count = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as weights:
            count += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return count * _BYTES_PER_WEIGHT * _COPIES


def free_bytes(device: str) -> int | None:
    """What this process may still take; None where that can't be found out."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    found = [each for each in (_machine(), *(_container(*files) for files in _CGROUPS)) if each is not None]
    return min(found, default=None)


def _machine() -> int | None:
    for line in _text("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _container(limit: str, used: str, stat: str, cache: str) -> int | None:
    most, now = _text(limit).strip(), _text(used).strip()
    if not most.isdecimal() or not now.isdecimal():
        return None
    cached = next((int(line.split()[1]) for line in _text(stat).splitlines() if line.split()[0] == cache), 0)
    return max(0, int(most) - int(now) + cached)


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
