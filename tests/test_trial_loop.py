"""Trials by the command and by the loop: real stages in this process, real feedback, a release that is tried first."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from here_loops import NoLauncher, begin_drift, give_corrections, here, tiny_config
from small_factories import small_config

from aifactory import Config, Factory
from aifactory.cli import main
from aifactory.evaluate.pipeline import score_tasks
from aifactory.improve.evaluation import Evaluation
from aifactory.proof.explain import explain_cycle
from aifactory.records.feedback import Completion, Feedback
from aifactory.records.journal import Bound
from aifactory.records.registry import Release
from aifactory.records.trials import Outcome


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    """The configuration of a factory with three releases, of which the first is in production."""
    values = small_config(tmp_path)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    with Factory(Config.model_validate(values)) as factory:
        registry, journal = factory.books.registry, factory.books.journal
        for number in range(3):
            bound = Bound(kind="run", sources_digest="x", champion=number or None)
            cycle = journal.claim(journal.open_cycle(f"cycle-{number}", recipe={}, bound=bound))
            registry.promote(cycle, model=f"model/{number}", scorecard="scorecard/x", decision={"reasons": []})
        registry.rollback(to=1, reason="test")
    return str(file)


def test_a_trial_by_the_command(config_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> Any:
        assert main([*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    assert run("shadow", "2", config_file, "--share", "0.05")["kind"] == "shadow"
    tried = run("canary", "small-r2", config_file, "--share", "0.1", "--by", "request", "--reason", "it is faster")
    assert (tried["release"], tried["share"], tried["by"]) == (2, 0.1, "request")
    report = run("status", config_file)
    assert (report["trial"]["release"], report["trial"]["share"]) == ("small-r2", 0.1)
    assert report["production"] == "small-r1"
    assert run("withdraw", config_file, "--reason", "it swears", "--quarantine")["number"] == 2

    assert main(["status", config_file]) == 0
    assert "small-r2 is in quarantine it swears" in " ".join(capsys.readouterr().out.split())
    assert main(["canary", "2", config_file, "--share", "0.1"]) == 1
    assert "--despite-quarantine" in capsys.readouterr().err
    assert main(["canary", "2", config_file, "--share", "0.1", "--despite-quarantine"]) == 0
    assert "release" in capsys.readouterr().out
    assert main(["status", config_file]) == 0
    assert "small-r2 is on trial beside small-r1: canary, 10.0% of the keys." in " ".join(
        capsys.readouterr().out.split()
    )
    assert run("promote", config_file, "--trial", "--reason", "it does not")["number"] == 2
    assert run("status", config_file)["production"] == "small-r2"
    assert run("rollback", config_file, "--quarantine")["number"] == 1
    assert run("status", config_file)["quarantined"] == {"small-r2": {"reason": "asked for"}}
    actions = [line["action"] for line in run("audit", config_file)["lines_found"]]
    trial = ["shadow", "canary", "withdraw", "canary", "promote", "rollback", "quarantine"]
    assert [action for action in actions if action in trial][-len(trial) :] == trial


@pytest.mark.slow
def test_what_the_gate_lets_pass_is_tried_and_then_takes_production(tmp_path: Path) -> None:
    trial = {"shadow_share": 0.5, "shares": [0.3], "min_answers": 10, "min_scored": 10, "wait_for_scores": True}
    config = tiny_config(tmp_path, improve={"trial": trial})
    factory = here(config)
    books = factory.books
    first = factory.turn(factory.cycle())
    assert isinstance(first, Release), "the first release has none beside which it could be tried"
    assert books.registry.production() == first
    assert give_corrections(factory) == 1
    cycle = begin_drift(factory)
    second = factory.turn(cycle)

    assert isinstance(second, Release)
    assert books.registry.production() == first
    assert factory.turn_begun(cycle.trigger) == second, "turned again, it stays what it is"
    assert "on trial" in " ".join(factory.status().lines()).lower()
    score = partial(score_tasks, chat_fallback=config.serve.chat_fallback)
    looking = Evaluation(books, score=score, launcher=NoLauncher())
    corrections = books.feedback.corrections()
    for step, (kind, share) in enumerate([("shadow", 0.5), ("canary", 0.3)]):
        on = books.registry.trial()
        assert on is not None
        assert (on.kind, on.share) == (kind, share)
        for number in range(15):
            told = [
                Outcome(trial=on.number, release=r.number, failed=False, seconds=0.5 + number % 3 / 10, tokens=8)
                for r in (first, second)
            ]
            books.registry.trial_log.add(told)
            # What users say of answers during the trial, to which neither has listened.
            known, name = corrections[15 * step + number], f"late-{step}-{number}"
            books.feedback.log_completion(
                Completion(
                    id=name,
                    release=first.number,
                    prompt=known.prompt,
                    answer="no idea",
                    request="{}",
                    finish_reason="stop",
                    prompt_tokens=1,
                    answer_tokens=1,
                )
            )
            books.feedback.record(Feedback(completion=name, idempotency_key=name, correction=known.correction))
        looking.tick()

    assert books.registry.production() == second
    ended = books.journal.cycle(cycle.trigger)
    assert ended is not None
    assert ended.state == "promoted"
    assert ended.decision is not None
    assert any(reason.startswith("passed: superiority") for reason in ended.decision["reasons"])
    assert any(reason.startswith("passed: score: candidate minus") for reason in ended.decision["reasons"])
    assert explain_cycle(books, cycle.trigger).release == second.name
    factory.close()
