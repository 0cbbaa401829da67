"""Books of a factory that was never run: each line as the stages, the endpoint and the actor would have written it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aifactory.config import Config
from aifactory.records.artifacts import Corpus, Model, Record, Scorecard, TokenSet, digest_of
from aifactory.records.books import Books
from aifactory.records.feedback import Completion, Feedback, Score
from aifactory.records.journal import Bound, Cycle

HOSTILE = '<script>alert("x")</script>\u202e'
"""What users, sources and errors may hold."""
CURVE = [(step, 5.0 - step / 20) for step in range(1, 41)]
NOUNS: Mapping[str, Any] = {"ingested": Corpus, "tokenized": TokenSet, "trained": Model, "evaluated": Scorecard}


class Clock:
    """Time that stands still until it is moved."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def interval(estimate: float, width: float = 0.1, **more: Any) -> dict[str, Any]:
    return {
        "estimate": estimate,
        "low": estimate - width,
        "high": estimate + width,
        "confidence": 0.95,
        "num_examples": 40,
        "num_clusters": 9,
        **more,
    }


class MadeBooks:
    """Books, and what writes into them."""

    def __init__(self, folder: Path, **sections: Any) -> None:
        values: dict[str, Any] = {
            "name": "made",
            "ingest": {"sources": [{"name": "docs", "kind": "text", "path": str(folder / "nowhere")}]},
            "improve": {"min_scored": 20, "batch_rows": 50},
            "runtime": {"storage": str(folder)},
        }
        for name, section in sections.items():
            values[name] = {**values.get(name, {}), **section}
        self.books = Books(Config.model_validate(values))
        self.clock = Clock()
        self.books.journal.clock = self.clock
        # Another instance over a copy goes on where the first one ended.
        self._made = len(self.books.journal.events())
        self._answers = self.books.feedback.counts()["completions"]

    def begin(self, trigger: str, *, champion: int | None = None, kind: str = "run", **bound: Any) -> Cycle:
        self.clock.now += 10
        opened = self.books.journal.open_cycle(
            trigger,
            recipe={},
            bound=Bound(kind=kind, sources_digest="x", champion=champion, **bound),  # type: ignore[arg-type]
        )
        return self.books.journal.claim(opened)

    def make(self, cycle: Cycle, event: str, figures: Mapping[str, Any], *inputs: str) -> str:
        """An artifact as the workshop enters it."""
        self.clock.now += 30
        self._made += 1
        noun = NOUNS[event]
        record = Record(
            kind=noun.kind,
            fingerprint=f"{cycle.number:04x}{self._made:012x}" + "0" * 48,
            digest=digest_of([]),
            code_version=1,
            recipe={},
            inputs=list(inputs),
            files=[],
            figures=dict(figures),
            seconds=20.0,
            joules=200.0,
            joules_source="estimate",
            created_at=self.clock(),
        )
        artifact = self.books.artifacts.publish(noun, record)
        self.books.lineage.add(artifact)
        self.books.journal.write(
            event,
            cycle=cycle.trigger,
            attempt=cycle.attempt,
            subject=artifact.id,
            detail=dict(figures),
            seconds=20.0,
            joules=200.0,
            joules_source="estimate",
        )
        return str(artifact.id)

    def ingested(self, cycle: Cycle, *, attacks: tuple[str, ...] = ()) -> str:
        return self.make(
            cycle,
            "ingested",
            {
                "rows_in": 120,
                "rows_kept": 100,
                "rows_holdout": 20,
                "rows_rejected": 20,
                "rejected_by_rule": {"length": 15, "empty": 5},
                "sources": {f"docs {HOSTILE}": {"kept": 100, "rejected": 20}},
                "steps": [],
                "trust": {"attacks": list(attacks)},
            },
        )

    def trained(self, cycle: Cycle, *inputs: str) -> str:
        tokens = self.make(cycle, "tokenized", {"tokens": 12_345, "packed_rows": 96}, *inputs)
        return self.make(
            cycle,
            "trained",
            {
                "steps": 40,
                "tokens": 40_960,
                "tokens_per_s": 4_567.8,
                "final_loss": 3.1,
                "curve": CURVE,
                "mfu": 0.31,
                "peak_source": "measured",
                "parameters": 1_000_000,
                "precision": "fp32",
                "warnings": [f"it warns {HOSTILE}"],
            },
            tokens,
        )

    def evaluated(self, cycle: Cycle, model: str, *, change: float | None = None) -> str:
        champion = None if change is None else interval(2.0)
        over = None if change is None else interval(change, 0.05)
        figures = {
            "holdout": {"candidate": interval(1.9), "champion": champion, "over_champion": over},
            "target": None,
            "known": {"candidate": interval(1.5), "champion": None, "over_champion": None},
            "unigram_bits_per_byte": 3.0,
            "gzip_bits_per_byte": 2.9,
        }
        return self.make(cycle, "evaluated", figures, model)

    def released(self, trigger: str, *, champion: int | None = None, change: float | None = None) -> int:
        """A whole cycle that is promoted; the number of its release."""
        cycle = self.begin(trigger, champion=champion)
        model = self.trained(cycle, self.ingested(cycle))
        card = self.evaluated(cycle, model, change=change)
        decision = {
            "decision": "promote",
            "reasons": ["passed: parity: it is the same", f"passed: baseline: {HOSTILE}"],
        }
        return self.books.registry.promote(cycle, model=model, scorecard=card, decision=decision).number

    def on_trial(self, trigger: str, *, champion: int, share: float = 0.1) -> int:
        cycle = self.begin(trigger, champion=champion, kind="drift")
        model = self.trained(cycle, self.ingested(cycle))
        card = self.evaluated(cycle, model, change=-0.2)
        decision = {"decision": "promote", "reasons": ["passed: all"]}
        return self.books.registry.begin_trial(
            cycle, "canary", share=share, by="key", model=model, scorecard=card, decision=decision
        ).number

    def rejected(self, trigger: str, *, champion: int) -> None:
        cycle = self.begin(trigger, champion=champion)
        model = self.trained(cycle, self.ingested(cycle))
        card = self.evaluated(cycle, model, change=0.2)
        decision = {"decision": "reject", "reasons": ["passed: parity: same", f"failed: superiority: worse {HOSTILE}"]}
        self.books.registry.reject(cycle, scorecard=card, decision=decision)

    def failed(self, trigger: str, error: str = f"boom {HOSTILE}") -> None:
        cycle = self.begin(trigger)
        self.books.journal.write("attempt_failed", cycle=trigger, attempt=cycle.attempt, detail={"error": error})
        with self.books.database.write(serialize=True) as connection:
            self.books.journal.close_cycle(
                connection, cycle, "failed", decision={"decision": "fail", "reasons": [f"the last: {error}"]}
            )

    def answered(self, release: int, number: int = 1, *, corrected: bool = False, bits: float | None = None) -> None:
        """Answers that a release gave, each a second after the one before."""
        for _ in range(number):
            self.clock.now += 1
            self._answers += 1
            name = f"cmpl-{self._answers}"
            self.books.feedback.log_completion(
                Completion(
                    id=name,
                    release=release,
                    prompt="p",
                    answer="a",
                    request="{}",
                    finish_reason="stop",
                    prompt_tokens=7,
                    answer_tokens=11,
                    user=f"user {HOSTILE}",
                )
            )
            if corrected or bits is not None:
                self.books.feedback.record(
                    Feedback(idempotency_key=name, completion=name, user="u", correction="better", score=0.25)
                )
            if bits is not None:
                row = self.books.feedback.corrections(unscored_by="bits_per_byte")[0].feedback
                scored = {"feedback": row, "release": release, "weight": 6.0}
                self.books.feedback.add_scores(
                    [
                        Score(metric="bits_per_byte", value=bits, **scored),  # type: ignore[arg-type]
                        Score(metric="similarity", value=0.5, **scored),  # type: ignore[arg-type]
                    ]
                )

    def metered(self, release: int, *, requests: int = 10, replica: str = "replica-1") -> None:
        self.books.journal.write(
            "metered",
            detail={
                "replica": replica,
                "node": "node-1",
                "begun": self.clock() - 60,
                "ended": self.clock(),
                "busy_s": 15.0,
                "answers": [
                    {
                        "release": release,
                        "key": "anonymous",
                        "requests": requests,
                        "prompt_tokens": 70,
                        "answer_tokens": 110,
                    }
                ],
            },
            seconds=60.0,
            joules=120.0,
            joules_source="estimate",
        )

    def decided(self, **detail: Any) -> None:
        release = self.books.registry.production()
        self.books.journal.write("decided", subject=None if release is None else release.name, detail=detail)

    def training(self, step: int = 12, steps: int = 40, **told: Any) -> str:
        """A run that goes on, as its log tells of it; the id of the model that it is to make."""
        values: dict[str, Any] = {
            "step": step,
            "steps": steps,
            "at": self.clock(),
            "loss": 3.25,
            "gradient_norm": 0.8,
            "learning_rate": 0.01,
            "tokens_per_s": 512.0,
            "tokens_per_step": 1024,
            "mfu": 0.12,
            "peak_source": "measured",
            "curve": CURVE[:step],
            "warnings": [],
            **told,
        }
        data = json.dumps(values).encode()
        self.books.storage.write_bytes(data, "runs", "train-abcdef0123456789", "progress.json")
        return "model/abcdef0123456789"


def whole(folder: Path, **sections: Any) -> MadeBooks:
    """Two releases, a rejected candidate, a failed cycle, feedback, a decision, a replica and a run that goes on."""
    made = MadeBooks(folder, **sections)
    made.failed("run-0")
    made.released("run-1")
    made.answered(1, 30, bits=1.6)
    assert made.books.feedback.seal(batch_rows=30, batch_after_s=None) == 1
    made.released("drift-2", champion=1, change=-0.2)
    made.rejected("drift-3", champion=2)
    made.answered(2, 12, corrected=True)
    made.answered(2, 25, bits=2.4)
    made.decided(decision="wait", awaited="drift", reasons=["that is not established"])
    made.metered(2)
    made.begin("drift-4", champion=2, kind="drift")
    made.ingested(made.books.journal.cycles()[-1])
    made.training()
    return made
