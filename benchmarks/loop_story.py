"""Story: what became of an unattended factory, from its books, its users' log, and a sealed test that only this process sees."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import sqlalchemy as sa
import torch
from clinc import Clinc
from loop_picture import Span
from unattended import Unattended

from aifactory.engine.load import load_model
from aifactory.evaluate.scoring import answer_scores
from aifactory.evaluate.statistics import Interval, ratio_interval
from aifactory.records.artifacts import Model
from aifactory.records.journal import Cycle
from aifactory.text.tasks import Task
from aifactory.text.tokenizer import load_tokenizer

_CONFIDENCE = 0.95
_SAMPLES = 2000
_STAGES = ("ingested", "tokenized", "trained", "evaluated", "promoted", "rejected")
Right = Sequence[bool]


class Story:
    """Told while it happens (`part`), and read when it has ended."""

    def __init__(self, factory: Unattended, clinc: Clinc, sealed: int) -> None:
        self.factory = factory
        self.books = factory.books
        self.clinc = clinc
        pairs = clinc.sealed([*clinc.old, *clinc.new])
        step = max(1, len(pairs) // sealed)
        self._test = {
            "old": [pair for pair in pairs[::step] if pair[1] in set(clinc.old)],
            "new": [pair for pair in pairs[::step] if pair[1] in set(clinc.new)],
        }
        self.spans: list[Span] = []
        self.notes: list[str] = []
        self._begun = time.time()
        self._right: dict[str, dict[str, Right]] = {}

    # ── while it happens ──────────────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of the run."""
        begin = self._since(time.time())
        yield
        self.spans.append(Span(name=name, begin=begin, end=self._since(time.time())))

    def expect(self, came: bool) -> None:
        """Note where something did not come in its time."""
        if not came:
            self.notes.append(f"what was waited for at {self._since(time.time()):.0f} s did not come in its time")

    def is_read(self, number: int) -> bool:
        """Whether a cycle has read the sealed batch of this number."""
        bound = {batch for cycle in self.factory.drifts() for batch in cycle.bound.batches}
        return bool({batch for batch, found in self._batches.items() if found == number} & bound)

    # ── releases ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def releases(self) -> list[dict[str, Any]]:
        """Each release on the sealed test."""
        found = []
        for release in self.books.registry.releases():
            right = self._right_of(release.model)
            found.append(
                {
                    "release": release.name,
                    "model": release.model,
                    "at_s": self._since(self._promoted_at(release.number)),
                    **{name: self._share(right[name], name).to_json() for name in ("old", "new")},
                }
            )
        return found

    def kept_out(self) -> list[dict[str, Any]]:
        """What the gate refused, on the sealed test, beside what was in production."""
        found = []
        for cycle in self.factory.drifts():
            trained = self.books.journal.events(event="trained", cycle=cycle.trigger)
            if cycle.state == "rejected" and trained and cycle.bound.champion is not None:
                production = self.books.registry.release(cycle.bound.champion)
                assert production is not None
                mine, other = self._right_of(str(trained[-1].subject)), self._right_of(production.model)
                found.append(
                    {
                        "cycle": cycle.number,
                        **{
                            f"{name}_change": self._share(mine[name], name, minus=other[name]).to_json()
                            for name in ("old", "new")
                        },
                    }
                )
        return found

    def _right_of(self, model: str) -> dict[str, Right]:
        if model not in self._right:
            folder = self.books.artifacts.fetch(self.books.artifacts.get(Model, model))
            loaded = load_model(folder, device="cpu", dtype=torch.float32)
            tokenizer = load_tokenizer(folder)
            self._right[model] = {
                name: [score.is_exact for score in answer_scores(loaded, tokenizer, [Task(*pair) for pair in pairs])]
                for name, pairs in self._test.items()
            }
        return self._right[model]

    def _share(self, right: Right, name: str, *, minus: Right | None = None) -> Interval:
        return accuracy(right, [intent for _, intent in self._test[name]], minus=minus)

    def _promoted_at(self, number: int) -> float:
        with self.books.database.read() as connection:
            answered = connection.scalar(sa.text(f"SELECT MIN(at) FROM completions WHERE release = {int(number)}"))
        return self._begun if answered is None else float(answered)

    # ── cycles ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def cycles(self) -> list[dict[str, Any]]:
        """Each cycle that the factory began by itself: what was decided and why, what it took and cost."""
        return [self._cycle(cycle) for cycle in self.factory.drifts()]

    def _cycle(self, cycle: Cycle) -> dict[str, Any]:
        events = self.books.journal.events(cycle=cycle.trigger)
        made = [event for event in events if event.event in _STAGES and event.joules is not None]
        release = next((r for r in self.books.registry.releases() if r.trigger == cycle.trigger), None)
        answered = None if release is None else self._first_answer(release.number)
        trained = next((e for e in events if e.event == "trained"), None)
        decided = [e for e in self.books.journal.events(event="decided") if e.at <= cycle.opened_at]
        return {
            "cycle": cycle.number,
            "begun_s": self._since(cycle.opened_at),
            "ended_s": None if cycle.closed_at is None else self._since(cycle.closed_at),
            "state": cycle.state,
            "attempts": cycle.attempt,
            "triggered_by": decided[-1].detail["reasons"] if decided else [],
            "decision": (cycle.decision or {}).get("reasons", []),
            "refused_batches": (cycle.decision or {}).get("refused", []),
            "batches": len(cycle.bound.batches),
            "release": None if release is None else release.name,
            "trigger_to_answer_s": None if answered is None else answered - cycle.opened_at,
            "training_s": None if trained is None else float(trained.detail["seconds"]),
            "laps_s": _laps(cycle, [(event.event, event.at) for event in events if event.event in _STAGES], answered),
            "seconds": sum(event.seconds or 0.0 for event in made),
            "joules": sum(event.joules or 0.0 for event in made),
            "joules_source": sorted({str(event.joules_source) for event in made}),
            "was_disturbed": was_disturbed(
                cycle.opened_at,
                answered or cycle.closed_at or time.time(),
                [float(str(kill["at"])) for kill in self.factory.killed],
            ),
        }

    def laps(self, cycles: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """What the time from trigger to answer is made of, seconds: means over cycles."""
        sums: Counter[str] = Counter()
        for cycle in cycles:
            sums.update(cycle["laps_s"])
        if cycles:
            sums["of that steps"] = sum(cycle["training_s"] for cycle in cycles)  # type: ignore[assignment]
        return {name: round(value / len(cycles), 2) for name, value in sums.items()}

    def _first_answer(self, number: int) -> float | None:
        with self.books.database.read() as connection:
            answered = connection.scalar(sa.text(f"SELECT MIN(at) FROM completions WHERE release = {int(number)}"))
        return None if answered is None else float(answered)

    # ── what users saw ────────────────────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def _asked(self) -> list[dict[str, Any]]:
        return self.factory.asked()

    def seen(self) -> dict[str, dict[str, Any]]:
        """By part: answers, how many of them were right on old and new intents, what failed, what was said."""
        return {
            span.name: told([line for line in self._asked if line["phase"] == span.name], self.clinc)
            for span in self.spans
        }

    def killed(self) -> list[dict[str, Any]]:
        return [{"at_s": self._since(float(str(kill["at"]))), "what": kill["what"]} for kill in self.factory.killed]

    # ── the figures ───────────────────────────────────────────────────────────────────────────────────────────────────

    def figures(
        self, cycles: Sequence[Mapping[str, Any]], releases: Sequence[Mapping[str, Any]]
    ) -> dict[str, float | None]:
        """Those that are no times."""
        first, last = releases[0], releases[-1]
        end_of_first = self.spans[0].end
        by_then = [release for release in releases if release["at_s"] <= end_of_first][-1]
        keys = {row["key"] for row in self._asked if "key" in row}
        kept = self._keys()
        triggers = Counter(release.trigger for release in self.books.registry.releases())
        liars = next((span for span in self.spans if span.name == "liars"), None)
        figures: dict[str, float | None] = {
            "new_intents_gain": _points(by_then, first, "new"),
            "old_intents_change": _points(by_then, first, "old"),
            "new_intents_gain_end": _points(last, first, "new"),
            "old_intents_change_end": _points(last, first, "old"),
            "cycles": sum(cycle["ended_s"] is not None for cycle in cycles),
            "promotions": sum(cycle["state"] == "promoted" for cycle in cycles),
            "rejections": sum(cycle["state"] == "rejected" for cycle in cycles),
            "kills": len(self.factory.killed),
            "lost": len(keys - set(kept)),
            "doubled": sum(number - 1 for number in (*kept.values(), *triggers.values())),
            "joules": round(sum(cycle["joules"] for cycle in cycles), 1),
        }
        if liars is not None:
            bad = self._bad_batches()
            refused = self.books.journal.refused_batches()
            before = [release for release in releases if release["at_s"] <= liars.begin][-1]
            after = [release for release in releases if release["at_s"] <= liars.end][-1]
            figures |= {
                "bad_batches": len(bad),
                "bad_refused": sum(batch in refused for batch in bad),
                "bad_change": round((2 * _points(after, before, "old") + _points(after, before, "new")) / 3, 2),
            }
        if (back := self._live("they come back")) is not None and (
            before_it := self._live("all 150 intents")
        ) is not None:
            figures["returned_change"] = round(100 * (back - before_it), 2)
        return figures

    def points(self, releases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What is drawn."""
        return [
            {
                "at_s": release["at_s"],
                "label": str(release["release"]).rpartition("-")[2],
                **{name: tuple(release[name][key] for key in ("low", "estimate", "high")) for name in ("old", "new")},
            }
            for release in releases
        ]

    def _live(self, part: str) -> float | None:
        """Share of the last answers in a part that were right, of those about the intents that went away."""
        gone = set(self.clinc.new[: len(self.clinc.new) // 2])
        lines = [line for line in self._asked if line["phase"] == part and line["intent"] in gone and "answer" in line]
        last = lines if part != "all 150 intents" else lines[-200:]
        return sum(line["answer"] == line["intent"] for line in last) / len(last) if last else None

    def _bad_batches(self) -> list[str]:
        """Ids of the batches most of whose rows liars have said."""
        lies = {row["key"] for row in self._asked if "key" in row and row["phase"] == "liars"}
        with self.books.database.read() as connection:
            rows = connection.execute(
                sa.text("SELECT batch, idempotency_key FROM feedback WHERE batch IS NOT NULL")
            ).all()
        by_batch: dict[int, list[bool]] = {}
        for number, key in rows:
            by_batch.setdefault(number, []).append(key in lies)
        return [batch for batch, number in self._batches.items() if sum(by_batch[number]) * 2 > len(by_batch[number])]

    @property
    def _batches(self) -> dict[str, int]:
        """Sealed batches by id: their numbers."""
        from aifactory.improve.evaluation import published_batches

        return {batch.id: int(batch.record.figures["number"]) for batch in published_batches(self.books)}

    def _keys(self) -> Counter[str]:
        with self.books.database.read() as connection:
            return Counter(connection.scalars(sa.text("SELECT idempotency_key FROM feedback")))

    def _since(self, at: float) -> float:
        return round(at - self._begun, 1)


def accuracy(right: Right, intents: Sequence[str], *, minus: Right | None = None) -> Interval:
    """The share that is right, or how much larger it is than another on the same queries; resampled by intents."""
    before = minus if minus is not None else [False] * len(right)
    return ratio_interval(
        [float(mine) - float(other) for mine, other in zip(right, before, strict=True)],
        [1.0] * len(right),
        intents,
        confidence=_CONFIDENCE,
        samples=_SAMPLES,
    )


def told(lines: Sequence[Mapping[str, Any]], clinc: Clinc) -> dict[str, Any]:
    """What users saw and said, in numbers."""
    answers = [line for line in lines if "answer" in line]
    new = set(clinc.new)
    said = [line for line in answers if "key" in line]

    def share(which: Callable[[str], bool]) -> float | None:
        of = [line["answer"] == line["intent"] for line in answers if which(line["intent"])]
        return round(sum(of) / len(of), 4) if of else None

    return {
        "requests": len(lines),
        "failed": sum("failed" in line for line in lines),
        "failures": dict(Counter(str(line["failed"])[:60] for line in lines if "failed" in line).most_common(5)),
        "right_old": share(lambda intent: intent not in new),
        "right_new": share(lambda intent: intent in new),
        "said": len(said),
        "said_wrongly": sum(line["said"] != line["intent"] for line in said),
    }


def was_disturbed(begun: float, ended: float, kills: Sequence[float]) -> bool:
    """Whether a process was killed between the beginning of a cycle and its end, which is its first answer where it has one."""
    return any(begun <= kill <= ended for kill in kills)


def _laps(cycle: Cycle, events: Sequence[tuple[str, float]], answered: float | None) -> dict[str, float]:
    """Seconds until each line of the journal, from the one before."""
    found: dict[str, float] = {}
    at = cycle.opened_at
    for name, when in [*events, *([("answered", answered)] if answered is not None else [])]:
        found[name] = round(found.get(name, 0.0) + when - at, 2)
        at = when
    return found


def _points(last: Mapping[str, Any], first: Mapping[str, Any], name: str) -> float:
    return round(100 * (last[name]["estimate"] - first[name]["estimate"]), 2)
