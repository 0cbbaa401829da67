"""Runs a benchmark and writes what it found: date, hardware, versions, command, raw numbers, and the figures by their keys.

A benchmark is a function from `quick` to raw numbers (a list for each key) and figures. The last line on standard output is
the figures as one JSON object; the whole result goes to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
_LIBRARIES = ("ray", "torch", "transformers", "tokenizers", "gigatoken", "numba", "pyarrow", "numpy", "sqlalchemy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a benchmark found."""

    figures: Mapping[str, float | None]
    """By the keys that are promised; None where something could not be measured."""
    raw: Mapping[str, Sequence[float]]
    """Every single measurement behind the figures."""
    notes: Sequence[str] = ()
    peers: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """By peer what ran beside it: its command and its versions."""
    details: Mapping[str, object] = field(default_factory=dict)
    """What is told beyond figures, where something is."""
    picture: str = ""
    """SVG, which lies beside the result in a file of its own."""


def main(name: str, measure: Callable[..., Measured], *, parts: Sequence[str] = (), data: str = "") -> None:
    """Run one benchmark as a program: `measure(quick, rounds)`, or with `parts` `measure(quick, rounds, those asked for)`.

    data   what the file holds that whoever runs it must name; it is handed over as the last argument
    """
    parser = argparse.ArgumentParser(description=f"The benchmark of {name}.")
    parser.add_argument("--quick", action="store_true", help="prove that it runs, in a minute or two; writes no result")
    parser.add_argument("--rounds", type=int, metavar="N", help="so many rounds, where a machine is too slow for all")
    if parts:
        text = "measure nothing else; writes no result"
        parser.add_argument("--only", nargs="+", choices=parts, metavar="PART", help=f"{text}: {', '.join(parts)}")
    if data:
        parser.add_argument("--data", type=Path, required=True, metavar="FILE", help=data)
    arguments = parser.parse_args()
    if arguments.rounds is not None and arguments.rounds < 1:
        parser.error(f"expected at least 1 round, found {arguments.rounds}")
    only = arguments.only if parts else None
    further = [only or parts] if parts else []
    further += [arguments.data] if data else []
    # Also who is told to end ends what it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    found = measure(arguments.quick, arguments.rounds, *further)
    told = {key: value for key, value in asdict(found).items() if key not in ("details", "picture")}
    told |= {"details": found.details} if found.details else {}
    result = {"benchmark": name, "date": datetime.date.today().isoformat(), **_circumstances(), **told}
    if not arguments.quick and only is None:
        RESULTS.mkdir(exist_ok=True)
        file = RESULTS / f"{name}-{result['date']}.json"
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if found.picture:
            file.with_suffix(".svg").write_text(found.picture, encoding="utf-8")
        print(f"written to {file.relative_to(Path(__file__).parent.parent)}", file=sys.stderr)
    print(json.dumps(found.figures))


def _circumstances() -> dict[str, object]:
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
        "hardware": {
            "processor": _processor(),
            "cpus": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "machine": platform.machine(),
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _LIBRARIES}},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip()
