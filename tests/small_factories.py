"""Configurations of small factories: a whole loop in seconds of work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from corpora import write_topics

KNOWN = range(0, 6)
"""Topics that a small factory is taught."""
UNKNOWN = range(6, 14)
"""Topics that it hears of from its users alone."""


def small_config(folder: Path, *, name: str = "small", **sections: Any) -> dict[str, Any]:
    """A configuration whose whole loop takes seconds of work: a two-layer model of texts about six topics."""
    corpus = folder / "corpus"
    if not corpus.exists():
        write_topics(corpus, KNOWN, documents=14)
    values: dict[str, Any] = {
        "name": name,
        "ingest": {
            "sources": [{"name": "topics", "kind": "text", "path": str(corpus)}],
            "holdout_share": 0.2,
            # Documents of one topic resemble one another, and all of these few are to train.
            "quarantine_similarity": None,
        },
        "tokenize": {"vocab_size": 512, "row_len": 128},
        "model": {"architecture": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "context_length": 512}},
        "train": {"max_steps": 60, "global_batch_rows": 8, "learning_rate": 0.01, "warmup_steps": 5},
        "evaluate": {"prompt_bytes": 150, "answer_bytes": 300, "max_tasks": 80, "bootstrap_samples": 500},
        "promote": {"min_tasks": 10, "min_clusters": 4},
        "improve": {
            "min_scored": 50,
            "batch_rows": 150,
            "retrain": {"max_steps": 60, "learning_rate": 0.01},
        },
        "runtime": {
            "storage": str(folder / "storage"),
            "workers": 1,
            "cpus_per_worker": 0.8,
            "data_tasks": 2,
            "checkpoint_every_steps": 10,
            "tick_s": 0.3,
            "endpoint": {"port": 0, "poll_s": 0.2},
        },
    }
    return merged(values, sections)


def unknown_traffic(folder: Path, **values: Any) -> dict[str, Any]:
    """Simulated users who ask about topics that the factory was not taught."""
    source = folder / "unknown"
    if not source.exists():
        write_topics(source, UNKNOWN, documents=8)
    traffic = {
        "source": {"name": "unknown", "kind": "text", "path": str(source)},
        "requests": 150,
        "max_tokens": 8,
        "timeout_s": 900,
    }
    return merged(traffic, values)


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` put over it, section by section."""
    result = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if nested else value
    return result
