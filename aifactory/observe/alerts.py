"""The alert rules: over the list of metrics, as Prometheus loads them. Each says what is wrong, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from aifactory.observe import metrics as m
from aifactory.observe.promql import Query, as_asked, increase, quantile, rate, value


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """One rule: it fires where `of` has been beyond `limit` for so long."""

    name: str
    of: Query
    is_beyond: Literal[">", "<"] = ">"
    limit: float
    lasting: str
    severity: Literal["critical", "warning"] = "warning"
    summary: str
    remedy: str

    @property
    def measured(self) -> str:
        """What is compared, as Prometheus is asked."""
        return as_asked(self.of.text)

    @property
    def expression(self) -> str:
        return f"({self.measured}) {self.is_beyond} {self.limit:g}"


def alerts() -> Sequence[Alert]:
    """All of them."""
    ten, quarter, hour = ({"window": window} for window in ("10m", "15m", "1h"))
    all_requests = rate(m.SERVE_REQUESTS, **ten)
    answering = rate(m.SERVE_ANSWER_TOKENS, **ten)
    running = value(m.SERVE_RUNNING)
    newest, oldest = value(m.SERVE_RELEASE, of="max"), value(m.SERVE_RELEASE, of="min")
    return [
        Alert(
            name="RequestsFail",
            of=rate(m.SERVE_REQUESTS, status="5..", **ten).over(all_requests),
            limit=0.01,
            lasting="5m",
            severity="critical",
            summary="More than 1 % of requests end with a 5xx",
            remedy="Look for `failed request=` in the replicas' logs; `aifactory rollback` where a release is to blame.",
        ),
        Alert(
            name="RequestsRefused",
            of=rate(m.SERVE_REQUESTS, status="429", **ten).over(all_requests),
            limit=0.05,
            lasting="10m",
            summary="More than 5 % of requests are answered 429",
            remedy="Raise runtime.endpoint.replicas or slots; `aifactory status` names the bottleneck.",
        ),
        Alert(
            name="FirstTokenLate",
            of=quantile(0.95, m.SERVE_FIRST_TOKEN, **ten),
            limit=5.0,
            lasting="10m",
            summary="One in twenty answers begins after more than 5 s",
            remedy="`aifactory status` names the bottleneck: the queue, the CPUs, or the GPU.",
        ),
        Alert(
            name="TokensSlow",
            of=quantile(0.95, m.SERVE_BETWEEN_TOKENS, **ten),
            limit=0.5,
            lasting="10m",
            summary="One in twenty tokens comes after more than 0.5 s",
            remedy="Give replicas more CPUs (cpus_per_replica), or lower slots; look at what else runs on the machine.",
        ),
        Alert(
            name="QueueLong",
            of=value(m.SERVE_WAITING).over(value(m.SERVE_SLOTS)),
            limit=1.0,
            lasting="10m",
            summary="More answers wait than can be decoded at once",
            remedy="Raise runtime.endpoint.replicas.",
        ),
        Alert(
            name="CacheFull",
            of=value(m.SERVE_CACHE, state="reserved").over(value(m.SERVE_CACHE, state="most")),
            limit=0.95,
            lasting="15m",
            summary="The memory for keys and values is reserved to its end",
            remedy="Lower serve.max_answer_tokens, or raise runtime.endpoint.replicas.",
        ),
        Alert(
            name="AnswersStandStill",
            of=Query(f"({running.text} > 0) unless on (factory) ({answering.text} > 0)"),
            limit=0.0,
            lasting="5m",
            severity="critical",
            summary="Answers are in the engine, and no token has come for ten minutes",
            remedy="Look at the replicas' logs; a replica that is killed is started again.",
        ),
        Alert(
            name="ReleaseDoesNotLoad",
            of=increase(m.SERVE_SWAPS, outcome="load_failed", **ten),
            limit=0.0,
            lasting="0m",
            summary="A release did not load; the one before it goes on",
            remedy="The journal says why (load_failed); roll back, or mend the storage.",
        ),
        Alert(
            name="ReplicasDisagree",
            of=newest.minus(oldest),
            limit=0.0,
            lasting="15m",
            summary="Replicas have served different releases for a quarter of an hour",
            remedy="Look for load_failed in the log of the one that is behind.",
        ),
        Alert(
            name="ReplicaLost",
            of=increase(m.SERVE_LOST, **ten),
            limit=0.0,
            lasting="0m",
            summary="A replica was lost with a request",
            remedy="Ray's dashboard says how it ended: mostly by the kernel, for memory.",
        ),
        Alert(
            name="StageFails",
            of=increase(m.STAGE_FAILURES, "stage", **quarter),
            limit=0.0,
            lasting="0m",
            summary="The making of an artifact ended by an error",
            remedy="The command or the job that made it says which; the same command goes on from there.",
        ),
        Alert(
            name="TrainingWaitsForData",
            of=rate(m.TRAIN_WAIT, **ten),
            limit=0.3,
            lasting="10m",
            summary="Training steps wait for data for more than 30 % of the time",
            remedy="Put the token sets on a faster disk; `aifactory explain` names the bottleneck.",
        ),
        Alert(
            name="BatchesLeftOut",
            of=increase(m.TRAIN_SKIPPED, **hour),
            limit=3.0,
            lasting="0m",
            summary="More than three batches could not be trained on within an hour",
            remedy="Lower train.learning_rate; the log names the batches (skipped).",
        ),
        Alert(
            name="EvaluatorSilent",
            of=increase(m.IMPROVE_TICKS, outcome="done", **quarter),
            is_beyond="<",
            limit=1.0,
            lasting="5m",
            severity="critical",
            summary="The evaluation actor has not looked for a quarter of an hour",
            remedy="Its log says why (tick_failed); `aifactory improve` starts it where it is gone.",
        ),
        Alert(
            name="AnswersBelowStandard",
            of=value(m.IMPROVE_LIVE, of="max").over(value(m.IMPROVE_STANDARD, of="max")),
            limit=1.1,
            lasting="1h",
            summary="Live answers need a tenth more than the standard, and no retrain has mended that",
            remedy="`aifactory improve --once CONFIG` says what the actor waits for.",
        ),
        Alert(
            name="UsersAskSomethingElse",
            of=value(m.IMPROVE_DRIFT, of="max"),
            limit=0.0,
            lasting="0m",
            summary="Users ask something else than at first",
            remedy="Look at what they ask; improve.prompts.retrain: true retrains by itself.",
        ),
        Alert(
            name="FeedbackUnread",
            of=value(m.IMPROVE_BATCHES, of="max"),
            limit=5.0,
            lasting="1d",
            summary="More than five batches of feedback have waited for a day",
            remedy="`aifactory retrain CONFIG`, or set improve.schedule.",
        ),
    ]


def rules() -> dict[str, Any]:
    """The file of rules, as Prometheus loads it."""
    return {
        "groups": [
            {
                "name": "aifactory",
                "rules": [
                    {
                        "alert": f"AIFactory{alert.name}",
                        "expr": alert.expression,
                        "for": alert.lasting,
                        "labels": {"severity": alert.severity},
                        "annotations": {
                            "summary": f"{{{{ $labels.factory }}}}: {alert.summary} ({{{{ $value }}}})",
                            "remedy": alert.remedy,
                        },
                    }
                    for alert in alerts()
                ],
            }
        ]
    }
