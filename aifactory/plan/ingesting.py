"""Ingestion: how long text takes from Parquet to packed tokens, by what this project has measured on CPUs.

Fitted    MB_PER_CPU_S to end_to_end_mb_s (2 GB) of benchmarks/results/ingest-2026-11-25.json, FIXED_S to its fixed_cost_s, and
          BYTES_PER_TOKEN to its notes (a byte-level BPE of 16,384 entries)
Left out  what other steps take (near-duplicates, languages, models), and the network to where data lie
"""

from __future__ import annotations

from dataclasses import dataclass

MB_PER_CPU_S = 14.3
"""Read, Unicode, the rules of Gopher and C4, exact duplicates, tokens, packing: 10^6 bytes of text a second on one CPU."""
FIXED_S = 5.39
"""From the command to its end where there is next to nothing to do."""
BYTES_PER_TOKEN = 4.63


@dataclass(frozen=True, slots=True, kw_only=True)
class Ingestion:
    """What so many bytes of text take."""

    num_bytes: float
    cpus: float
    hours: float
    mb_per_s: float
    tokens: float


def ingestion(num_bytes: float, cpus: float) -> Ingestion:
    """On so many CPUs, each as fast as the one that was measured."""
    rate = MB_PER_CPU_S * cpus
    return Ingestion(
        num_bytes=num_bytes,
        cpus=cpus,
        hours=(num_bytes / 1e6 / rate + FIXED_S) / 3600,
        mb_per_s=rate,
        tokens=num_bytes / BYTES_PER_TOKEN,
    )
