"""The loop, unattended, on real data: what it learns from users, what it refuses, and how long it takes.

A first release is taught 100 intents of clinc150; users ask about all 150 over HTTP and correct a share of the answers that
are wrong; the factory decides, retrains, judges and swaps by itself. Then some users' questions go away and come back, a batch
of feedback is all lies, and processes are killed at random moments. Accuracy is the share of a sealed test that a release
answers to the letter, by greedy decoding; intervals are a bootstrap over intents.

Keys     new_intents_gain        points gained on intents that the first release was not taught, by the end of the first part
         old_intents_change      points gained or lost on those that it was, by then
         new_intents_gain_end    the same over all parts
         old_intents_change_end
         cycles                  that the factory began by itself and that ended
         promotions              of them
         rejections              of them
         returned_change         points by which live answers about intents that went away were better when they came back
         bad_batches             batches that users filled with lies
         bad_refused             of them kept out by the gate
         bad_change              points that production lost or gained on all intents while they came
         kills                   processes that SIGKILL ended
         lost                    acknowledged feedback that is not in the books
         doubled                 feedback that is there twice, and triggers that gave two releases
         trigger_to_answer_s     from the journal's line that begins a cycle to the first answer by its release; median, without
                                 the part in which processes are killed
         training_s              of that, the steps of training themselves
         beyond_training_s       the rest: start-up, data, evaluation, gate, swap
         joules                  of all cycles: counted where the machine has counters, else estimated
         help_s                  `aifactory --help`
         unchanged_run_s         `aifactory run` again, when nothing has changed
"""

from __future__ import annotations

import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from clinc import ABOUT, Clinc, write_lines
from loop_picture import Point, picture
from loop_story import Story
from loop_users import Phase
from runner import Measured, main
from unattended import Unattended

_FIGURES = (
    "new_intents_gain",
    "old_intents_change",
    "new_intents_gain_end",
    "old_intents_change_end",
    "cycles",
    "promotions",
    "rejections",
    "returned_change",
    "bad_batches",
    "bad_refused",
    "bad_change",
    "kills",
    "lost",
    "doubled",
    "trigger_to_answer_s",
    "training_s",
    "beyond_training_s",
    "joules",
    "help_s",
    "unchanged_run_s",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is done."""

    first_steps: int
    retrain_steps: int
    hidden_size: int
    batch_rows: int
    per_s: float
    cycles: int
    """Of the first part."""
    away_cycles: int
    has_liars: bool
    kills: int
    cycles_after: int
    """That are waited for when the last process was killed; without any, that it answers again."""
    longest_s: float
    """That one cycle is waited for."""
    sealed: int
    """Queries of the test, at most."""


FULL = Size(
    first_steps=800,
    retrain_steps=350,
    hidden_size=128,
    batch_rows=300,
    per_s=15,
    cycles=3,
    away_cycles=1,
    has_liars=True,
    kills=6,
    cycles_after=1,
    longest_s=600,
    sealed=10_000,
)
# The same path, for the proof that it runs: a model that knows next to nothing, and one cycle.
QUICK = Size(
    first_steps=100,
    retrain_steps=10,
    hidden_size=64,
    batch_rows=100,
    per_s=15,
    cycles=1,
    away_cycles=0,
    has_liars=False,
    kills=1,
    cycles_after=0,
    longest_s=240,
    sealed=500,
)
CORRECTS = 0.6
MISTAKES = 0.03
_RETURN_S = 45.0
_SEED = 1


def configuration(folder: Path, taught: Path, size: Size) -> dict[str, Any]:
    """The factory: what a user would write for short answers that are right or wrong."""
    return {
        "name": "intents",
        "ingest": {
            "sources": [
                {
                    "name": "taught",
                    "kind": "jsonl",
                    "path": str(taught),
                    "columns": {"prompt": "prompt", "completion": "completion"},
                    "license": "cc-by-3.0",
                }
            ],
            "holdout_share": 0.15,
        },
        "tokenize": {"vocab_size": 3000, "row_len": 128},
        "model": {
            "architecture": {
                "hidden_size": size.hidden_size,
                "num_layers": 2,
                "num_heads": 4,
                "context_length": 256,
            }
        },
        "train": {
            "max_steps": size.first_steps,
            "global_batch_rows": 16,
            "learning_rate": 4e-3,
            "warmup_steps": 20,
            "weight_decay": 0.5,
        },
        "evaluate": {"max_tasks": 1500},
        # What is right or wrong is judged by how many are right; bits tell how sure the model is, which new intents change.
        "promote": {"non_inferiority_margin": 0.3, "exact_margin": 0.03},
        "improve": {
            "min_scored": size.batch_rows // 2,
            "batch_rows": size.batch_rows,
            "retrain": {"max_steps": size.retrain_steps, "learning_rate": 2e-3, "feedback_share": 0.2},
        },
        "runtime": {
            "storage": str(folder / "storage"),
            "workers": 2,
            "cpus_per_worker": 0.9,
            "micro_batch_rows": 8,
            "checkpoint_every_steps": 50,
            "trackers": [],
            "endpoint": {"port": _free_port()},
        },
    }


def measure(quick: bool, rounds: int | None, data: Path) -> Measured:
    """Run all parts once; `rounds` are cycles of the first part."""
    size, clinc = QUICK if quick else FULL, Clinc.read(data)
    cycles = rounds or size.cycles
    raw: dict[str, list[float]] = {"help_s": [_seconds("--help") for _ in range(3 if quick else 9)]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "taught").mkdir()
        write_lines(clinc.taught(), folder / "taught" / "taught.jsonl", answer="completion")
        write_lines(clinc.asked(), folder / "questions.jsonl", answer="intent")
        config = configuration(folder, folder / "taught" / "taught.jsonl", size)
        factory = Unattended(folder, config, folder / "questions.jsonl")
        raw["first_release_s"] = [factory.run()]
        if factory.books.registry.production() is None:
            (cycle,) = factory.books.journal.cycles()
            raise SystemExit(f"loop.py: expected a first release, found: {cycle.decision}")
        story = Story(factory, clinc, size.sealed)
        try:
            _live(factory, story, clinc, size, cycles)
        except BaseException:
            sys.stderr.write((folder / "factory.log").read_text(encoding="utf-8", errors="replace")[-6000:])
            raise
        raw["unchanged_run_s"] = [_seconds("run", str(factory.config_file)) for _ in range(1 if quick else 3)]
        return _measured(story, raw, quick)


def _live(factory: Unattended, story: Story, clinc: Clinc, size: Size, cycles: int) -> None:
    everything = (*clinc.old, *clinc.new)
    normal = partial(Phase, per_s=size.per_s, intents=everything, corrects=CORRECTS, mistakes=MISTAKES)
    with factory.improving():
        with story.part("all 150 intents"):
            factory.behave(normal(name="all 150 intents"))
            for number in range(1, cycles + 1):
                story.expect(factory.watch(lambda: factory.num_ended() >= number, size.longest_s))  # noqa: B023
        if size.away_cycles:
            gone = clinc.new[: len(clinc.new) // 2]
            left = tuple(intent for intent in everything if intent not in gone)
            with story.part("25 new intents go away"):
                factory.behave(normal(name="25 new intents go away", intents=left))
                aim = len(factory.drifts()) + size.away_cycles
                story.expect(factory.watch(lambda: factory.num_ended() >= aim, size.longest_s))
            with story.part("they come back"):
                factory.behave(normal(name="they come back", intents=gone))
                factory.watch(lambda: False, _RETURN_S)
        if size.has_liars:
            with story.part("liars"):
                # A batch that is theirs from its first row to its last, as far as that can be told from outside.
                sealed = factory.books.feedback.counts()["batches"]
                factory.behave(normal(name="liars", are_liars=True))
                story.expect(
                    factory.watch(lambda: factory.books.feedback.counts()["batches"] >= sealed + 2, size.longest_s)
                )
                aim = sealed + 2
                factory.behave(normal(name="after the liars"))
                story.expect(factory.watch(lambda: story.is_read(aim) and factory.is_idle(), size.longest_s))
        if size.kills:
            with story.part("processes are killed"):
                factory.behave(normal(name="processes are killed"))
                aim = factory.num_ended() + size.cycles_after
                factory.kill_some(
                    random.Random(_SEED),
                    size.kills,
                    apart_s=8,
                    until=lambda: len(factory.killed) >= size.kills,
                )
                story.expect(
                    factory.watch(
                        lambda: factory.num_ended() >= aim and (not size.cycles_after or factory.is_idle()),
                        size.longest_s,
                    )
                    and factory.watch(factory.answers, size.longest_s)
                )


def _measured(story: Story, raw: dict[str, list[float]], quick: bool) -> Measured:
    cycles, releases = story.cycles(), story.releases()
    calm = [cycle for cycle in cycles if not cycle["was_disturbed"] and cycle["trigger_to_answer_s"] is not None]
    raw["trigger_to_answer_s"] = [cycle["trigger_to_answer_s"] for cycle in calm]
    raw["training_s"] = [cycle["training_s"] for cycle in calm]
    raw["beyond_training_s"] = [cycle["trigger_to_answer_s"] - cycle["training_s"] for cycle in calm]
    figures = dict.fromkeys(_FIGURES, None) | story.figures(cycles, releases)
    figures |= {key: round(statistics.median(raw[key]), 3) for key in raw if key in _FIGURES and raw[key]}
    details = {
        "users": {
            "corrects": CORRECTS,
            "mistakes": MISTAKES,
            "per_s": (QUICK if quick else FULL).per_s,
            "seen": story.seen(),
        },
        "parts": [{"name": span.name, "begins_s": span.begin, "ends_s": span.end} for span in story.spans],
        "releases": releases,
        "cycles": cycles,
        "kept_out": story.kept_out(),
        "killed": story.killed(),
        "beyond_training": story.laps(calm),
    }
    return Measured(
        figures=figures,
        raw=raw,
        notes=story.notes,
        details=details,
        picture=picture(
            [Point(**point) for point in story.points(releases)],
            story.spans,
            rejected=[cycle["ended_s"] for cycle in cycles if cycle["state"] == "rejected"],
        ),
    )


def _seconds(*arguments: str) -> float:
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "aifactory", *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return time.perf_counter() - start


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main("loop", measure, data=ABOUT)
