"""Laws of the energy ledger: every table adds up to all joules, to the millijoule, and says what of them is an estimate."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from aifactory.cli import main
from aifactory.config import Config
from aifactory.energy_ledger import IDLE, UNTOLD, EnergyLedger, Line, apportion, read_energy
from aifactory.errors import ConfigError
from aifactory.records.books import Books
from aifactory.records.journal import Bound, Cycle


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.at = 1_000.0

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def books(tmp_path: Path, clock: Clock) -> Iterator[Books]:
    source = {"name": "docs", "kind": "text", "path": "nowhere"}
    site = {"price_per_kwh": 0.5, "currency": "EUR", "pue": 2.0}
    values = {"name": "small", "ingest": {"sources": [source]}, "runtime": {"storage": str(tmp_path), "site": site}}
    books = Books(Config.model_validate(values))
    books.journal.clock = clock
    yield books
    books.close()


def begin(books: Books, trigger: str) -> Cycle:
    production = books.registry.production()
    bound = Bound(kind="run", sources_digest="x", champion=None if production is None else production.number)
    return books.journal.claim(books.journal.open_cycle(trigger, recipe={}, bound=bound))


def make(
    books: Books, cycle: Cycle, event: str, joules: float, *, source: str = "estimate", seconds: float = 2.0
) -> None:
    books.journal.write(event, cycle=cycle.trigger, subject=event, seconds=seconds, joules=joules, joules_source=source)


def answers(release: int, key: str, *, prompt_tokens: int = 0, answer_tokens: int = 10) -> dict[str, Any]:
    return {
        "release": release,
        "key": key,
        "requests": 1,
        "prompt_tokens": prompt_tokens,
        "answer_tokens": answer_tokens,
    }


def meter(
    books: Books,
    joules: float,
    *given: dict[str, Any],
    busy_s: float = 5.0,
    seconds: float = 10.0,
    source: str = "estimate",
) -> None:
    ended = books.journal.clock()
    detail = {"replica": "a", "node": "n", "begun": ended - seconds, "ended": ended, "busy_s": busy_s, "answers": given}
    books.journal.write("metered", detail=detail, seconds=seconds, joules=joules, joules_source=source)


def release(books: Books, cycle: Cycle) -> None:
    books.registry.promote(cycle, model=f"model/{cycle.number}", scorecard=f"scorecard/{cycle.number}", decision={})


def by_name(lines: Sequence[Line]) -> dict[str, float]:
    return {line.name: line.joules for line in lines}


def tables(ledger: EnergyLedger) -> list[Sequence[Line]]:
    return [ledger.by_stage, ledger.by_cycle, ledger.by_release, ledger.by_key]


@pytest.mark.parametrize("seed", range(8))
def test_whatever_was_entered_every_table_adds_up_to_the_total(books: Books, clock: Clock, seed: int) -> None:
    rng = random.Random(seed)
    cycles = []
    for number in range(4):
        cycles.append(begin(books, f"cycle-{number}"))
        if number < 2:
            release(books, cycles[-1])
    for _ in range(60):
        clock.at += rng.random() * 20
        source = rng.choice(["estimate", "rapl", "nvml"])
        joules = rng.choice([0.0, rng.random() / 1000, rng.random() * 1e9])
        if rng.random() < 0.5:
            event = rng.choice(["ingested", "tokenized", "trained", "evaluated"])
            make(books, rng.choice(cycles), event, joules, source=source, seconds=rng.random() * 30)
        else:
            given = [
                answers(
                    rng.randint(1, 3), f"key-{n}", prompt_tokens=rng.randint(0, 99), answer_tokens=rng.randint(0, 99)
                )
                for n in range(rng.randint(0, 5))
            ]
            seconds = rng.random() * 30
            meter(books, joules, *given, busy_s=rng.random() * seconds * 1.1, seconds=seconds, source=source)

    ledger = read_energy(books)
    entered = sum(round(1000 * (event.joules or 0)) for event in books.journal.events())

    assert ledger.total.millijoules > 0
    for table in tables(ledger):
        assert sum(line.millijoules for line in table) == ledger.total.millijoules
        assert sum(line.estimated_millijoules for line in table) == ledger.total.estimated_millijoules
        assert all(line.millijoules >= line.estimated_millijoules >= 0 for line in table)
    assert ledger.total.millijoules + round(1000 * ledger.counted_twice_j) == entered


def test_stages_go_to_their_cycles_and_to_the_releases_that_these_made(books: Books) -> None:
    first, second = begin(books, "run-a"), begin(books, "run-b")
    make(books, first, "ingested", 10.0)
    make(books, first, "trained", 100.0, source="nvml")
    release(books, first)
    make(books, second, "trained", 7.0)

    ledger = read_energy(books)

    assert by_name(ledger.by_stage) == {"ingest": 10.0, "train": 107.0}
    assert by_name(ledger.by_cycle) == {"cycle 1 (run-a)": 110.0, "cycle 2 (run-b)": 7.0}
    assert by_name(ledger.by_release) == {"small-r1": 110.0, "cycles that made no release": 7.0}
    assert by_name(ledger.by_key) == {"stages": 117.0}
    assert ledger.total.estimated_millijoules == 17_000


def test_time_in_which_nobody_is_answered_is_idle_and_the_rest_goes_to_answers_by_their_tokens(books: Books) -> None:
    release(books, begin(books, "run-a"))
    meter(books, 100.0, answers(1, "alice", answer_tokens=30), answers(1, "bob", answer_tokens=10), busy_s=4.0)

    ledger = read_energy(books)

    assert by_name(ledger.by_stage) == {"serve": 40.0, IDLE: 60.0}
    assert by_name(ledger.by_key) == {"alice": 30.0, "bob": 10.0, IDLE: 60.0}
    assert by_name(ledger.by_release) == {"small-r1": 40.0, IDLE: 60.0}
    assert ledger.joules_per_answer_token == pytest.approx(100 / 40)
    assert [line.requests for line in ledger.by_key] == [1, 1, 0]


def test_a_token_of_a_prompt_counts_as_configured(books: Books) -> None:
    given = (answers(1, "long", prompt_tokens=40, answer_tokens=0), answers(1, "short", answer_tokens=10))
    meter(books, 10.0, *given, busy_s=10.0)
    site = books.config.runtime.site.model_copy(update={"prompt_token_share": 0.0})
    runtime = books.config.runtime.model_copy(update={"site": site})

    assert by_name(read_energy(books).by_key) == {"long": 5.0, "short": 5.0, IDLE: 0.0}
    books.config = books.config.model_copy(update={"runtime": runtime})
    assert by_name(read_energy(books).by_key) == {"long": 0.0, "short": 10.0, IDLE: 0.0}


def test_work_without_answers_has_a_line_of_its_own(books: Books) -> None:
    meter(books, 10.0, busy_s=5.0)

    assert by_name(read_energy(books).by_key) == {UNTOLD: 5.0, IDLE: 5.0}


def test_what_counters_said_of_a_replica_while_they_said_it_of_a_stage_is_in_no_sum(books: Books, clock: Clock) -> None:
    cycle = begin(books, "run-a")
    clock.at = 2_000.0
    make(books, cycle, "trained", 1000.0, source="nvml", seconds=8.0)
    make(books, cycle, "evaluated", 500.0, source="nvml", seconds=4.0)
    clock.at = 2_002.0
    meter(books, 100.0, seconds=10.0, source="rapl")

    ledger = read_energy(books)

    # From 1,992 to 2,002: stages ran until 2,000.
    assert ledger.counted_twice_j == 80.0
    assert ledger.total.joules == 1520.0


def test_estimates_are_of_their_own_processors_and_overlap_nothing(books: Books, clock: Clock) -> None:
    cycle = begin(books, "run-a")
    make(books, cycle, "trained", 1000.0, source="nvml", seconds=8.0)
    meter(books, 100.0, seconds=10.0, source="estimate")

    assert read_energy(books).counted_twice_j == 0
    assert read_energy(books).total.joules == 1100.0


def test_a_time_is_asked_for_by_its_ends(books: Books, clock: Clock) -> None:
    cycle = begin(books, "run-a")
    for at in (0.0, 3600.0, 7200.0):
        clock.at = at
        make(books, cycle, "trained", 1.0 + at)

    def total(**asked: str) -> float:
        return read_energy(books, **asked).total.joules

    assert total(since="1970-01-01T01:00") == 3601.0 + 7201.0
    assert total(until="1970-01-01T01:00") == 1.0
    assert total(since="1970-01-01T01:00+00:00", until="1970-01-01T02:00") == 3601.0
    with pytest.raises(ConfigError, match="expected a time"):
        total(since="yesterday")


def test_money_and_carbon_are_by_the_sites_factors(books: Books) -> None:
    make(books, begin(books, "run-a"), "trained", 3.6e6)

    used = read_energy(books).footprint
    assert used.machine_kwh == 1.0
    assert used.kwh == 2.0
    assert used.money == 1.0
    assert used.litres == 1.8
    assert used.tonnes_co2 == pytest.approx(2 * 0.445 / 1000)


def test_empty_books_have_an_empty_ledger(books: Books) -> None:
    ledger = read_energy(books)

    assert ledger.total.millijoules == 0
    assert all(not table for table in tables(ledger))
    assert ledger.joules_per_answer_token is None
    assert "0.000 J" in next(ledger.lines())


def test_text_and_json_tell_the_same(books: Books) -> None:
    release(books, begin(books, "run-a"))
    meter(books, 100.0, answers(1, "alice"), busy_s=10.0)
    ledger = read_energy(books)

    text, plain = "\n".join(ledger.lines()), json.loads(json.dumps(ledger.to_json()))
    assert "100% are an estimate" in text
    assert "alice" in text
    assert "EUR" in text
    assert plain["total"]["joules"] == 100.0
    assert sum(line["millijoules"] for line in plain["by_key"]) == plain["total"]["millijoules"]
    assert plain["footprint"] == json.loads(json.dumps(asdict(ledger.footprint)))


def test_the_command_reads_the_books(books: Books, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(books, begin(books, "run-a"), "trained", 5.0)
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(books.config.model_dump(mode="json", exclude_unset=True)), encoding="utf-8")

    assert main(["energy", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"]["joules"] == 5.0
    assert main(["energy", str(file), "--since", "1970-01-02"]) == 0
    assert "0.000 J" in capsys.readouterr().out
    assert main(["energy", str(file), "--since", "x"]) == 2


@pytest.mark.parametrize("total", [0, 1, 7, 10**15 + 1])
@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, 1.0], [0.1, 0.2, 0.7], [0.0, 5.0], [1e-9, 1e9], [3, 0, 0.25]])
def test_parts_are_whole_add_up_and_are_within_one_of_their_share(total: int, weights: list[float]) -> None:
    parts = apportion(total, weights)

    assert sum(parts) == total
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part - total * weight / sum(weights)) <= 1 + 1e-9 * total
        assert weight or not part


def test_where_nobody_has_a_weight_nothing_is_given_away() -> None:
    assert apportion(5, [0.0, 0.0]) == [0, 0]
    assert apportion(5, []) == []
