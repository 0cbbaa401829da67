"""Laws of the views: what they say is what the books say, and whatever the books hold is text on them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_books import MadeBooks, whole
from starlette.testclient import TestClient

from aifactory.energy_ledger import read_energy
from aifactory.improve.evaluation import observe
from aifactory.observe.vocabulary import EVENTS
from aifactory.page.server import VIEWS
from aifactory.records.limits import Limits
from aifactory.records.tables import audit

Client = Callable[..., TestClient]

PATHS = ["/" if name == "loop" else f"/{name}" for name in VIEWS]
MORE = ["/cycles/2", "/releases/1", "/releases/2", "/releases/act?do=rollback&release=1"]


class Page(HTMLParser):
    """What a page has in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def seen(page: TestClient, path: str) -> Page:
    answer = page.get(path)
    assert answer.status_code == 200, answer.text[:2000]
    return Page(answer.text)


@pytest.mark.parametrize("path", [*PATHS, *MORE])
def test_what_records_hold_is_text_on_every_page(page: TestClient, path: str) -> None:
    answer = page.get(path)

    assert answer.status_code == 200, answer.text[-3000:]
    assert "<script>alert" not in answer.text
    assert "\u202e" not in answer.text
    found = Page(answer.text)
    scripts = found.all("script")
    assert all(set(each) >= {"src"} and str(each["src"]).startswith("/files/page.js?") for each in scripts)
    assert not [tag for tag, attributes in found.tags if any(name.startswith("on") for name in attributes)]


@pytest.mark.parametrize("path", ["/cycles", "/corpora", "/training", "/alerts"])
def test_hostile_text_is_seen_as_it_is_written(page: TestClient, path: str) -> None:
    assert '<script>alert("x")</script>⟨U+202E⟩' in seen(page, path).text


@pytest.mark.parametrize("path", PATHS)
def test_a_strict_policy_stands_with_every_page(page: TestClient, path: str) -> None:
    answer = page.get(path)
    policy = answer.headers["content-security-policy"]

    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert "unsafe" not in policy
    assert {"frame-ancestors 'none'", "base-uri 'none'", "form-action 'self'"} <= set(policy.split("; "))
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    found = Page(answer.text)
    assert not found.all("style")
    assert not [attributes for _, attributes in found.tags if "style" in attributes]


def test_every_address_on_a_page_is_this_servers_and_answers(page: TestClient) -> None:
    addresses: set[str] = set()
    for path in [*PATHS, *MORE]:
        for _, each in seen(page, path).tags:
            addresses |= {str(each[name]) for name in ("href", "src", "action") if name in each}
    assert all(address.startswith(("/", "#", "data:,")) and not address.startswith("//") for address in addresses)
    own = {each for each in addresses if each.startswith("/") and not each.startswith("/corpora/")}
    assert {f"/{name}" for name in VIEWS if name != "loop"} < own
    answers = {address: page.get(address).status_code for address in own}
    assert set(answers.values()) == {200}, answers


@pytest.mark.parametrize("name", list(VIEWS))
def test_each_view_has_its_data_as_json(page: TestClient, name: str) -> None:
    answer = page.get(f"/data/{name}")

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()


def test_the_loop_says_what_each_part_does_now(made: MadeBooks, page: TestClient) -> None:
    told = page.get("/data/loop").json()
    parts = {part["name"]: part for part in told["parts"]}

    assert told["production"] == "made-r2"
    assert told["headline"] == "Cycle 5 trains."
    assert (parts["train"]["state"], parts["train"]["now"], parts["train"]["done"]) == ("working", "step 12 of 40", 0.3)
    assert parts["train"]["figure"] == "loss 3.25, 512 tok/s"
    assert parts["ingest"]["state"] == "ready"
    assert parts["serve"]["now"] == "1 replica, 25% busy"
    assert parts["traffic"]["now"] == "67 in the last hour"
    assert parts["feedback"]["now"] == "37 of 50 for a batch"
    assert parts["improve"]["state"] == "working"
    text = seen(page, "/").text
    assert "Cycle 5 trains." in text
    assert "step 12 of 40" in text


def test_what_happened_is_told_in_words_and_never_by_the_name_of_an_event(made: MadeBooks, page: TestClient) -> None:
    for event in ("rehearsed", "part_lost", "trial_decided"):
        made.books.journal.write(event, subject="a part")

    told = [each["what"] for each in page.get("/data/loop").json()["happenings"][:3]]

    assert told == [EVENTS["trial_decided"], EVENTS["part_lost"], EVENTS["rehearsed"]]


def test_a_run_is_seen_as_it_goes_on_and_silent_when_its_log_stops(made: MadeBooks, page: TestClient) -> None:
    made.training(20, loss=2.75)
    first = page.get("/data/training").json()[0]
    made.clock.now += 600
    later = page.get("/data/training").json()[0]

    assert (first["state"], first["step"], first["loss"], first["mfu"]) == ("running", 20, 2.75, 0.12)
    assert later["state"] == "silent"
    assert "says nothing" in seen(page, "/alerts").text


def test_a_loss_that_is_no_number_is_none(made: MadeBooks, page: TestClient) -> None:
    made.training(20, loss=float("nan"), curve=[[1, float("nan")], [2, 3.0]])
    run = page.get("/data/training").json()[0]

    assert (run["loss"], run["curve"]) == (None, [[2, 3.0]])
    assert page.get("/training").status_code == 200


def test_a_run_whose_model_is_made_is_told_once(made: MadeBooks, page: TestClient) -> None:
    cycle = made.begin("run-9")
    model = made.trained(cycle, made.ingested(cycle))
    made.books.storage.write_bytes(
        b'{"step": 3, "steps": 4}', "runs", f"train-{model.partition('/')[2]}", "progress.json"
    )

    assert [run["model"] for run in page.get("/data/training").json()].count(model) == 1


def test_scorecards_have_their_intervals(page: TestClient) -> None:
    text = seen(page, "/releases").text

    assert "1.900 [1.800, 2.000]" in text
    assert "−0.200 [−0.250, −0.150], better" in text
    picture = next(each for each in seen(page, "/releases/2").all("svg") if "Change" in str(each.get("aria-label")))
    assert picture["role"] == "img"


def test_the_lineage_of_a_release_goes_down_to_its_corpus(made: MadeBooks, page: TestClient) -> None:
    release = made.books.registry.release(2)
    assert release is not None
    text = seen(page, "/releases/2").text

    assert release.model[:18] in text
    assert re.search(r"corpus/[0-9a-f]{12}", text)


def test_traffic_is_told_by_release_and_adds_up(page: TestClient) -> None:
    told = page.get("/data/traffic?span=1h").json()
    found = {each["release"]: each for each in told["by_release"]}

    assert {name: each["requests"] for name, each in found.items()} == {"made-r1": 30, "made-r2": 37}
    assert all(sum(each["by_column"]) == each["requests"] for each in found.values())
    assert (told["requests"], told["answer_tokens"]) == (67, 67 * 11)


def test_a_span_leaves_out_what_was_before_it(made: MadeBooks, page: TestClient) -> None:
    made.clock.now += 1000
    made.answered(2, 3)
    made.clock.now += 0.5

    assert page.get("/data/traffic?span=15m").json()["requests"] == 3
    assert page.get("/data/traffic?span=1h").json()["requests"] == 70
    assert page.get("/data/traffic?span=nonsense").json()["span"] == "1h"


def test_feedback_is_told_by_release(page: TestClient) -> None:
    told = page.get("/data/feedback").json()
    first = next(each for each in told["by_release"] if each["release"] == "made-r1")

    assert told["counts"] == {"completions": 67, "feedback": 67, "waiting": 37, "batches": 1}
    assert (first["feedback"], first["corrections"], first["mean_score"]) == (30, 30, 0.25)
    assert (first["bits_per_byte"], first["similarity"]) == (pytest.approx(1.6), pytest.approx(0.5))


def test_drift_is_told_by_the_statistics_that_the_actor_decides_by(made: MadeBooks, page: TestClient) -> None:
    told = page.get("/data/drift").json()["production"]
    observed = observe(made.books, [])

    assert told["release"] == "made-r2"
    assert told["standard"] == observed.standard == 1.5
    assert (told["num_scored"], told["live"]) == (25, pytest.approx(2.4))
    assert told["num_scored"] == observed.num_scored
    assert told["evidence"] == pytest.approx(observed.below.won)
    assert told["established_at"] == observed.below.at
    assert page.get("/data/drift").json()["before"]["num_scored"] == 30


def test_energy_is_the_ledgers(made: MadeBooks, page: TestClient) -> None:
    before = page.get("/data/energy").json()["ledger"]["total"]
    assert before["joules"] == read_energy(made.books).total.joules
    made.metered(2, requests=5, replica="replica-2")

    assert page.get("/data/energy").json()["ledger"]["total"]["joules"] == before["joules"] + 120
    assert "an estimate" in seen(page, "/energy").text


def test_a_budget_that_is_used_up_is_seen(tmp_path: Path, client: Client) -> None:
    made = MadeBooks(tmp_path, improve={"budget": {"joules": 100.0}})
    made.released("run-1")
    cycle = made.begin("drift-2", champion=1, kind="drift")
    made.ingested(cycle)

    page = client(made)
    found = [alert for alert in page.get("/data/alerts").json() if alert["kind"] == "empty budget"]
    assert found[0]["severity"] == "now"
    assert "energy: 200 of 100 J" in found[0]["said"]
    assert "used up" in page.get("/energy").text


def test_the_budget_of_a_key_that_is_used_up_is_seen(tmp_path: Path, client: Client) -> None:
    made = MadeBooks(tmp_path)
    limited = Limits(budget_joules=100.0, budget_window="total")
    key = made.books.keys.create("asks much", limited=limited).key
    page = client(made)

    def empty() -> list[str]:
        return [each["said"] for each in page.get("/data/alerts").json() if each["kind"] == "empty budget"]

    made.books.allowances.add_joules({key.id: 60.0})
    assert empty() == []
    made.books.allowances.add_joules({key.id: 60.0})
    assert empty() == ["joules: 120 of 100 (total)"]


def test_alerts_are_what_the_books_say(made: MadeBooks, page: TestClient) -> None:
    kinds = {alert["kind"]: alert["severity"] for alert in page.get("/data/alerts").json()}
    assert kinds == {"failed cycle": "lately", "rejected release": "lately"}

    made.books.journal.write("load_failed", subject="made-r2", detail={"reason": "no room"})
    made.books.registry.rollback(to=1, reason="bad", quarantine=True)
    kinds = {alert["kind"]: alert["severity"] for alert in page.get("/data/alerts").json()}
    assert (kinds["load failed"], kinds["quarantine"]) == ("now", "lately")

    made.books.journal.write("swapped", subject="made-r2", detail={"replica": "x"})
    assert {a["kind"]: a["severity"] for a in page.get("/data/alerts").json()}["load failed"] == "lately"


def test_an_audit_that_was_changed_is_an_alert(made: MadeBooks, page: TestClient) -> None:
    with made.books.database.write() as connection:
        connection.execute(audit.update().where(audit.c.number == 1).values(subject="made-r9"))

    found = [alert for alert in page.get("/data/alerts").json() if alert["kind"] == "audit"]
    assert found
    assert found[0]["severity"] == "now"


def test_an_empty_factory_has_all_views(tmp_path: Path, client: Client) -> None:
    page = client(MadeBooks(tmp_path))
    for path in PATHS:
        assert page.get(path).status_code == 200, path
    assert "No release yet" in page.get("/").text
    assert page.get("/cycles/1").status_code == 404
    assert page.get("/releases/1").status_code == 404


def test_the_page_of_a_corpus_is_shown_as_ingest_wrote_it_and_nothing_else_of_the_storage(
    made: MadeBooks, page: TestClient
) -> None:
    corpus = page.get("/data/corpora").json()[0]["id"].partition("/")[2]
    written = b'<!doctype html>\n<html lang="en">\n<head></head>\n<body>\n<h1>rows</h1>\n</body></html>'
    made.books.storage.write_bytes(written, "corpus", corpus, "report.html")

    answer = page.get(f"/corpora/{corpus}")
    assert "<h1>rows</h1>" in answer.text
    assert "← Corpora" in answer.text
    assert "script-src" not in answer.headers["content-security-policy"]
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    for name in ("..%2f..%2fstate.db", "..%2fmodel", "nothing", "a b"):
        assert page.get(f"/corpora/{name}").status_code == 404, name


def test_every_view_reads_from_postgresql_what_it_reads_from_sqlite(
    page: TestClient, client: Client, tmp_path: Path, postgres_url: str
) -> None:
    other = whole(tmp_path / "other", runtime={"state_url": postgres_url})
    on_postgresql = client(other)

    for name in VIEWS:
        assert on_postgresql.get(f"/data/{name}").json() == page.get(f"/data/{name}").json(), name
    for path in [*PATHS, *MORE]:
        assert on_postgresql.get(path).status_code == 200, path
    other.books.close()


def test_the_page_neither_loads_nor_asks_ray() -> None:
    code = (
        "import sys\nfor name in ('ray', 'torch'): sys.modules[name] = None\n"
        "import aifactory.page.command, aifactory.page.server, aifactory.page.screen"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
