"""python -m pytest tests/records/test_feedback.py"""

from __future__ import annotations

import math
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa

from aifactory.errors import BadRequestError
from aifactory.records.artifacts import ArtifactStore, FeedbackBatch
from aifactory.records.database import Database
from aifactory.records.feedback import Completion, Feedback, FeedbackLog, Score
from aifactory.records.journal import Journal
from aifactory.records.storage import Storage
from aifactory.records.tables import feedback


def answer(
    name: str, *, release: int = 1, prompt: str = "2+2=", text: str = "5", user: str | None = None
) -> Completion:
    return Completion(
        id=name,
        release=release,
        prompt=prompt,
        answer=text,
        request="{}",
        finish_reason="stop",
        prompt_tokens=3,
        answer_tokens=1,
        user=user,
    )


def correct(name: str, *, key: str | None = None, to: str = "4", user: str | None = None) -> Feedback:
    return Feedback(completion=name, idempotency_key=key or f"key-{name}", correction=to, user=user)


def fill(log: FeedbackLog, number: int, *, start: int = 0) -> None:
    for at in range(start, start + number):
        log.log_completion(answer(f"c{at}"))
        log.record(correct(f"c{at}"))


@pytest.fixture
def log(journal: Journal) -> FeedbackLog:
    return FeedbackLog(journal)


# ── keeping ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_completion_comes_back_as_it_was_given(log: FeedbackLog) -> None:
    given = answer("c1", prompt="a\t'\"\\ äß 日本 😀 \r\n", text="", user="u1")

    log.log_completion(given)

    found = log.completion("c1")
    assert found is not None
    assert (found.prompt, found.answer, found.user) == (given.prompt, "", "u1")
    assert (found.at, found.key_id) == (1_000.0, "key-1")
    assert log.completion("c2") is None
    assert log.completions_by_release() == {1: 1}


def test_an_answer_that_databases_cannot_hold_is_kept_with_a_mark(log: FeedbackLog) -> None:
    log.log_completion(answer("c1", prompt="a\0b", text="\ud800😀\0"))

    found = log.completion("c1")

    assert found is not None
    assert (found.prompt, found.answer) == ("a\ufffdb", "\ufffd😀\ufffd")


def test_feedback_with_the_same_key_is_counted_once(log: FeedbackLog) -> None:
    log.log_completion(answer("c1"))

    assert log.record(correct("c1", key="k")) is True
    assert log.record(correct("c1", key="k")) is False
    assert log.record(correct("c1", key="k", to="another")) is False
    assert log.record(correct("c1", key="other")) is True

    assert log.counts() == {"completions": 1, "feedback": 2, "waiting": 2, "batches": 0}
    assert log.feedback_keys() == {"k", "other"}
    assert [row.correction for row in log.corrections()] == ["4", "4"]


def test_a_key_that_was_used_for_another_completion_is_refused(log: FeedbackLog) -> None:
    log.log_completion(answer("c1"))
    log.log_completion(answer("c2"))
    log.record(correct("c1", key="k"))

    with pytest.raises(BadRequestError, match="found 'k' already used for 'c1'") as error:
        log.record(correct("c2", key="k"))

    assert error.value.field == "idempotency_key"
    assert log.counts()["feedback"] == 1


def test_feedback_on_an_answer_that_was_never_given_is_refused(log: FeedbackLog) -> None:
    with pytest.raises(BadRequestError, match="expected the id of a completion that was given, found 'c1'") as error:
        log.record(correct("c1"))

    assert error.value.field == "completion"
    assert log.counts()["feedback"] == 0


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("score", {"score": 1.5}),
        ("score", {"score": math.nan}),
        ("correction", {"correction": "a\0b"}),
        ("comment", {"comment": "\udfff"}),
        ("user", {"user": "u" * 257}),
        ("idempotency_key", {"idempotency_key": "k" * 129}),
    ],
)
def test_feedback_that_cannot_be_kept_as_it_is_is_refused(log: FeedbackLog, field: str, values: dict[str, Any]) -> None:
    log.log_completion(answer("c1"))

    with pytest.raises(BadRequestError, match=r"^expected .*found") as error:
        log.record(Feedback(**({"completion": "c1", "idempotency_key": "k"} | values)))

    assert error.value.field == field
    assert log.counts()["feedback"] == 0


def test_a_name_longer_than_its_column_is_refused_on_every_database(log: FeedbackLog) -> None:
    log.log_completion(answer("c1", user="u" * 256))

    with pytest.raises(BadRequestError, match="expected user of at most 256 characters, found 257"):
        log.log_completion(answer("c2", user="u" * 257))

    assert log.completion("c2") is None


def test_concurrent_clients_that_repeat_themselves_are_counted_once(open_database: Callable[[], Database]) -> None:
    logs = [FeedbackLog(Journal(open_database(), "alpha")) for _ in range(4)]
    for at in range(8):
        logs[0].log_completion(answer(f"c{at}"))
    counted: list[bool] = []

    def work(log: FeedbackLog, seed: int) -> None:
        order = list(range(8))
        random.Random(seed).shuffle(order)
        counted.extend(log.record(correct(f"c{at}")) for at in order)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(logs, range(4), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert (counted.count(True), counted.count(False)) == (8, 24)
    assert logs[0].counts()["feedback"] == 8


def test_threads_of_one_gateway_share_a_log(log: FeedbackLog) -> None:
    failures: list[BaseException] = []

    def work(at: int) -> None:
        try:
            fill(log, 3, start=at * 3)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(at,)) for at in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failures == []
    assert log.counts() == {"completions": 36, "feedback": 36, "waiting": 36, "batches": 0}


def test_factories_in_one_database_do_not_see_one_another(log: FeedbackLog, tmp_path: Path) -> None:
    beta = FeedbackLog(Journal(log.database, "beta", clock=log.journal.clock))
    fill(log, 4)
    assert log.seal(batch_rows=2, batch_after_s=None) == 1
    log.add_scores([Score(feedback=log.corrections()[0].feedback, metric="m", release=1, value=1.0, weight=1.0)])

    assert beta.completion("c0") is None
    assert (beta.corrections(), beta.sealed(), beta.scores(metric="m", release=1)) == ([], [], [])
    assert (beta.feedback_keys(), beta.completions_by_release()) == (set(), {})
    assert beta.counts() == {"completions": 0, "feedback": 0, "waiting": 0, "batches": 0}
    assert beta.seal(batch_rows=1, batch_after_s=0.0) is None
    with pytest.raises(BadRequestError):
        beta.record(correct("c0"))

    fill(beta, 2)
    assert beta.seal(batch_rows=2, batch_after_s=None) == 1
    assert log.counts() == {"completions": 4, "feedback": 4, "waiting": 2, "batches": 1}
    assert [row.completion for row in log.corrections(batch=1)] == ["c0", "c1"]


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_corrections_are_found_by_release_by_score_and_in_order(log: FeedbackLog) -> None:
    for at in range(6):
        log.log_completion(answer(f"c{at}", release=1 + at % 2, user="asker" if at == 3 else None))
    for at in (5, 0, 3, 1):
        log.record(correct(f"c{at}", user="corrector" if at == 0 else None))
    log.record(Feedback(completion="c2", idempotency_key="thumb", score=1.0))

    rows = log.corrections()
    log.add_scores([Score(feedback=rows[0].feedback, metric="m", release=2, value=1.0, weight=1.0)])

    assert [row.completion for row in rows] == ["c5", "c0", "c3", "c1"]
    assert [row.user for row in rows] == ["c5", "corrector", "asker", "c1"]
    assert [row.completion for row in log.corrections(release=2)] == ["c5", "c3", "c1"]
    assert [row.completion for row in log.corrections(unscored_by="m")] == ["c0", "c3", "c1"]
    assert [row.completion for row in log.corrections(unscored_by="other", limit=2)] == ["c5", "c0"]


def test_an_answer_is_scored_once_by_a_metric(log: FeedbackLog) -> None:
    fill(log, 2)
    first, second = (row.feedback for row in log.corrections())

    def score(of: int, value: float, metric: str = "m") -> Score:
        return Score(feedback=of, metric=metric, release=1, value=value, weight=2.0)

    log.add_scores([score(second, 0.5)])
    log.add_scores([score(second, 9.0), score(first, 0.25), score(first, 9.0), score(first, 3.0, metric="n")])

    assert log.scores(metric="m", release=1) == [score(first, 0.25), score(second, 0.5)]
    assert log.scores(metric="n", release=1) == [score(first, 3.0, metric="n")]
    assert log.scores(metric="m", release=2) == []


def test_concurrent_scorers_score_once(open_database: Callable[[], Database]) -> None:
    logs = [FeedbackLog(Journal(open_database(), "alpha")) for _ in range(4)]
    fill(logs[0], 5)
    rows = [row.feedback for row in logs[0].corrections()]
    failures: list[BaseException] = []

    def work(log: FeedbackLog, value: float) -> None:
        try:
            log.add_scores([Score(feedback=r, metric="m", release=1, value=value, weight=1.0) for r in rows])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(log, float(at))) for at, log in enumerate(logs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    kept = logs[0].scores(metric="m", release=1)
    assert failures == []
    assert [score.feedback for score in kept] == rows
    assert len({score.value for score in kept}) == 1


# ── sealing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_batch_is_sealed_when_it_is_full_and_holds_the_oldest(log: FeedbackLog) -> None:
    fill(log, 5)
    log.record(Feedback(completion="c0", idempotency_key="thumb", score=0.0))

    assert log.seal(batch_rows=6, batch_after_s=None) is None
    assert log.seal(batch_rows=2, batch_after_s=None) == 1
    assert log.seal(batch_rows=2, batch_after_s=None) == 2
    assert log.seal(batch_rows=2, batch_after_s=None) is None

    assert log.sealed() == [1, 2]
    assert [row.completion for row in log.corrections(batch=1)] == ["c0", "c1"]
    assert [row.completion for row in log.corrections(batch=2)] == ["c2", "c3"]
    assert log.counts()["waiting"] == 1
    assert [event.detail for event in log.journal.events(event="sealed")] == [{"rows": 2}, {"rows": 2}]


def test_a_batch_is_sealed_when_its_oldest_row_is_old_enough(log: FeedbackLog, clock: Any) -> None:
    assert log.seal(batch_rows=100, batch_after_s=0.0) is None
    fill(log, 1)
    clock.at += 60
    fill(log, 1, start=1)

    assert log.seal(batch_rows=100, batch_after_s=61) is None
    assert log.seal(batch_rows=100, batch_after_s=60) == 1

    assert len(log.corrections(batch=1)) == 2
    assert log.seal(batch_rows=100, batch_after_s=0.0) is None


def test_a_sealed_batch_never_changes(log: FeedbackLog) -> None:
    fill(log, 2)
    log.seal(batch_rows=2, batch_after_s=None)
    before = log.corrections(batch=1)

    fill(log, 3, start=2)
    log.record(correct("c0", key="late"))
    log.seal(batch_rows=2, batch_after_s=None)
    log.seal(batch_rows=1, batch_after_s=0.0)

    assert log.corrections(batch=1) == before


def test_concurrent_sealers_seal_every_row_once(open_database: Callable[[], Database]) -> None:
    logs = [FeedbackLog(Journal(open_database(), "alpha")) for _ in range(4)]
    fill(logs[0], 24)
    sealed: list[int] = []

    def work(log: FeedbackLog, at: int) -> None:
        fill(log, 3, start=100 + at * 3)
        while (number := log.seal(batch_rows=4, batch_after_s=None)) is not None:
            sealed.append(number)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(logs, range(4), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(sealed) == list(range(1, 10)) == logs[0].sealed()
    batches = [[row.completion for row in logs[0].corrections(batch=number)] for number in sealed]
    assert [len(batch) for batch in batches] == [4] * 9
    assert len({name for batch in batches for name in batch}) == 36


def test_a_batch_larger_than_a_statement_may_bind_is_sealed(log: FeedbackLog) -> None:
    log.log_completion(answer("c0"))
    rows = [{"idempotency_key": f"k{at}", "factory": "alpha", "completion": "c0", "at": 0.0} for at in range(70_000)]
    with log.database.write() as connection:
        connection.execute(feedback.insert().values(key_id="k", correction="4"), rows[:1])
        numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 69999)"
        columns = "factory, idempotency_key, completion, at, key_id, correction"
        insert = f"INSERT INTO feedback ({columns}) {numbers} SELECT 'alpha', 'k' || i, 'c0', 0, 'k', '4' FROM n"
        connection.execute(sa.text(insert))

    assert log.seal(batch_rows=70_000, batch_after_s=None) == 1

    assert log.counts() == {"completions": 1, "feedback": 70_000, "waiting": 0, "batches": 1}


# ── publishing ────────────────────────────────────────────────────────────────────────────────────────────────────────

ROWS = [("ada", "1+1=", "2"), ("bob", "1+2=", "3"), (None, "1+3=", "4"), (None, "1+4=", "5"), ("ada", "1+1=", "2")]


def publish(
    log: FeedbackLog, rows: Sequence[tuple[str | None, str, str]], root: Path, *, prefix: str = "c"
) -> FeedbackBatch:
    for at, (user, prompt, text) in enumerate(rows):
        log.log_completion(answer(f"{prefix}{at}", prompt=prompt, user=user, text=f"{prefix}{at}"))
        log.record(correct(f"{prefix}{at}", to=text))
    number = log.seal(batch_rows=len(rows), batch_after_s=None)
    assert number is not None
    return log.publish(number, ArtifactStore(Storage(str(root))))


def test_the_fingerprint_of_a_batch_is_that_of_its_contents_alone(log: FeedbackLog, clock: Any, tmp_path: Path) -> None:
    first = publish(log, ROWS, tmp_path / "a")
    clock.at += 1_000
    other = FeedbackLog(Journal(log.database, "beta", clock=clock, key_id="other"))
    shuffled = random.Random(1).sample(ROWS, len(ROWS))
    assert shuffled != ROWS
    publish(other, ROWS[:1], tmp_path / "b", prefix="x")

    same = publish(other, shuffled, tmp_path / "b", prefix="y")

    assert same.fingerprint == first.fingerprint
    tables = [pq.read_table(f"{batch.uri}/rows.parquet").select(["user", "prompt", "text"]) for batch in (first, same)]
    assert tables[0].equals(tables[1])


@pytest.mark.parametrize("changed", [("eve", "1+1=", "2"), ("ada", "1+1 =", "2"), ("ada", "1+1=", "2."), None])
def test_the_fingerprint_of_a_batch_changes_with_any_content(
    log: FeedbackLog, tmp_path: Path, changed: tuple[str, str, str] | None
) -> None:
    first = publish(log, ROWS, tmp_path)

    other = publish(log, ([] if changed is None else [changed]) + ROWS[1:], tmp_path, prefix="d")

    assert other.fingerprint != first.fingerprint


def test_a_published_batch_holds_its_rows_and_where_they_came_from(log: FeedbackLog, tmp_path: Path) -> None:
    batch = publish(log, ROWS, tmp_path)

    rows = pq.read_table(f"{batch.uri}/rows.parquet").to_pylist()

    assert batch.num_rows == len(rows) == 5
    assert sorted((row["prompt"], row["text"]) for row in rows) == sorted((p, t) for _, p, t in ROWS)
    assert {row["completion"] for row in rows} == {"c0", "c1", "c2", "c3", "c4"}
    assert {row["feedback"] for row in rows} == {row.feedback for row in log.corrections()}
    unknown = {row["user"] for row in rows} - {"ada", "bob"}
    assert len(unknown) == 2
    assert not unknown & {"c2", "c3"}


def test_publishing_again_changes_nothing(log: FeedbackLog, clock: Any, tmp_path: Path) -> None:
    batch = publish(log, ROWS, tmp_path)
    written = (tmp_path / "batch" / batch.fingerprint[:16] / "rows.parquet").stat().st_mtime_ns
    clock.at += 60

    again = log.publish(1, ArtifactStore(Storage(str(tmp_path))))

    assert again.record.to_json() == batch.record.to_json()
    assert (tmp_path / "batch" / batch.fingerprint[:16] / "rows.parquet").stat().st_mtime_ns == written


# ── durability ────────────────────────────────────────────────────────────────────────────────────────────────────────

WRITER = """
import sys
from aifactory.records.database import Database
from aifactory.records.feedback import Completion, Feedback, FeedbackLog
from aifactory.records.journal import Journal
log = FeedbackLog(Journal(Database(sys.argv[1]), "alpha"))
at = int(sys.argv[2])
while True:
    log.log_completion(Completion(id=f"c{at}", release=1, prompt="p", answer="a", request="{}", finish_reason="stop",
                                  prompt_tokens=1, answer_tokens=1))
    print(f"completion c{at}", flush=True)
    log.record(Feedback(completion=f"c{at}", idempotency_key=f"k{at}", correction="b"))
    print(f"feedback k{at}", flush=True)
    at += 1
"""


@pytest.mark.parametrize("lines", [1, 30, 61])
def test_what_was_acknowledged_survives_a_kill(tmp_path: Path, lines: int) -> None:
    url = f"sqlite:///{tmp_path / 'state.db'}"
    acknowledged: list[str] = []

    for start in (0, 10_000):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, url, str(start)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        acknowledged += [writer.stdout.readline().strip() for _ in range(lines)]
        writer.kill()
        acknowledged += [line.strip() for line in writer.stdout if line.endswith("\n")]
        assert writer.wait(timeout=30) == -9

    log = FeedbackLog(Journal(Database(url), "alpha"))
    keys = log.feedback_keys()
    completions = [line.removeprefix("completion ") for line in acknowledged if line.startswith("completion ")]
    assert len(acknowledged) >= 2 * lines
    assert {line.removeprefix("feedback ") for line in acknowledged if line.startswith("feedback ")} <= keys
    assert all(log.completion(name) is not None for name in completions)
    assert log.counts()["completions"] - len(completions) <= 2
    with log.database.read() as connection:
        assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
    log.database.close()


def test_what_is_learnt_says_whether_the_answer_that_was_corrected_is_in_a_batch(
    log: FeedbackLog, tmp_path: Path
) -> None:
    store = ArtifactStore(Storage(str(tmp_path)))
    texts, pairs, labelled = (
        publish(log, ROWS, tmp_path) if objective == "likelihood" else log.publish(1, store, objective=objective)
        for objective in ("likelihood", "dpo", "kto")
    )
    found = [pq.read_table(f"{batch.uri}/rows.parquet").to_pylist() for batch in (texts, pairs, labelled)]

    assert len({batch.fingerprint for batch in (texts, pairs, labelled)}) == 3
    wanted = {f"c{at}": (prompt, text) for at, (_, prompt, text) in enumerate(ROWS)}
    assert {row["completion"]: (row["prompt"], row["text"]) for row in found[1]} == wanted
    assert all(row["rejected"] == row["completion"] for row in found[1])  # each said its own name
    assert sorted((row["completion"], row["prompt"], row["text"], row["label"]) for row in found[2]) == sorted(
        (name, prompt, *said) for name, (prompt, text) in wanted.items() for said in ((text, "true"), (name, "false"))
    )
    assert labelled.num_rows == 10
    assert not {"rejected", "label"} & set(found[0][0])
