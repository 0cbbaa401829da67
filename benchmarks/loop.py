"""The loop's times: from the decision to retrain to the first answer of the new release, and of that what is training.

Keys     trigger_to_answer_s   from the journal's line that begins the cycle to the first answer by its release
         training_s            of that, the steps of training themselves
         beyond_training_s     the rest: start-up, data, evaluation, gate, swap
         help_s                `aifactory --help`
         unchanged_run_s       `aifactory run` again, when nothing has changed
Each time is the median of its raw numbers. The run is the quickstart's, in a storage root of its own.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import sqlalchemy as sa
from runner import Measured, main

from aifactory import Factory

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
# A smaller model on a tenth of the steps: the same path, for the proof that it runs.
QUICK = (
    "train.max_steps=20",
    "improve.retrain.max_steps=10",
    "model.architecture.hidden_size=64",
    "model.architecture.num_layers=1",
    "model.architecture.num_heads=1",
    "evaluate.max_tasks=40",
    "traffic.requests=60",
    "improve.batch_rows=60",
    "improve.min_scored=40",
    "promote.min_tasks=5",
    "promote.min_clusters=2",
    "runtime.endpoint.port=0",
)


def measure(quick: bool, rounds: int | None) -> Measured:
    """Run the loop and read its journal."""
    raw: dict[str, list[float]] = {
        "trigger_to_answer_s": [],
        "training_s": [],
        "beyond_training_s": [],
        "unchanged_run_s": [],
        "help_s": [_seconds("--help") for _ in range(3 if quick else 9)],
    }
    notes = []
    for _ in range(rounds or (1 if quick else 3)):
        with tempfile.TemporaryDirectory() as folder:
            overrides = (f"runtime.storage={folder}", "runtime.endpoint.port=0", *(QUICK if quick else ()))
            arguments = [str(CONFIG), *(f"--set={override}" for override in overrides)]
            _seconds("run", *arguments)
            found = _from_journal(overrides)
            if found is None:
                notes.append("no second cycle gave a release, so nothing was measured from trigger to answer")
            else:
                for key, value in found.items():
                    raw[key].append(value)
            raw["unchanged_run_s"] += [_seconds("run", *arguments) for _ in range(1 if quick else 3)]
    return Measured(
        figures={key: round(statistics.median(values), 3) if values else None for key, values in raw.items()},
        raw=raw,
        notes=notes,
    )


def _seconds(*arguments: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "aifactory", *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def _from_journal(overrides: tuple[str, ...]) -> dict[str, float] | None:
    with Factory.from_yaml(CONFIG, overrides) as factory:
        cycle = next((cycle for cycle in factory.books.journal.cycles() if cycle.bound.kind == "drift"), None)
        if cycle is None:
            return None  # so small a model knows nothing better than what it is asked: there is no trigger
        (trained,) = factory.books.journal.events(event="trained", cycle=cycle.trigger)
        with factory.books.database.read() as connection:
            answered = connection.scalar(sa.text("SELECT MIN(at) FROM completions WHERE release = 2"))
    if answered is None:
        return None
    whole, training = float(answered) - cycle.opened_at, float(trained.detail["seconds"])
    return {"trigger_to_answer_s": whole, "training_s": training, "beyond_training_s": whole - training}


if __name__ == "__main__":
    main("loop", measure)
