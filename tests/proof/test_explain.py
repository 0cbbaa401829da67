"""The story of a cycle, on a loop that was really turned: every figure of it is one of the books', in text, JSON and on the page."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from chromium import View, look
from small_factories import small_config

from aifactory import Config, Factory
from aifactory.cli import main
from aifactory.errors import ConfigError, StorageError
from aifactory.proof.cycle_charts import Whisker, curve, intervals, ticks_of
from aifactory.proof.cycle_page import cycle_page
from aifactory.proof.explain import CycleStory
from aifactory.records.journal import Bound

HOSTILE = "\"><script>ran=1</script><img src=x onerror=ran=1>'&lt;</svg>\u202eevil\x00\x1b[2J"


@pytest.fixture
def story(loop: Factory) -> CycleStory:
    return loop.explain("2")


def test_the_story_of_a_retrain_is_what_the_books_say(loop: Factory, story: CycleStory) -> None:
    events = {e.event: e for e in loop.books.journal.events(cycle=story.trigger)}
    corpora = {c.is_new: c for c in story.corpora}

    assert (story.number, story.kind, story.state, story.release, story.champion) == (
        2,
        "drift",
        "promoted",
        "small-r2",
        "small-r1",
    )
    assert story.why_begun == ["live answers need more than the standard"]
    assert [corpus.is_new for corpus in story.corpora] == [False, True]
    ingested = events["ingested"].detail
    assert (corpora[True].rows_kept, corpora[True].batch) == (ingested["rows_kept"], story.batches[0])
    assert story.rejected_by_rule == ingested["rejected_by_rule"]
    (training,) = story.trainings
    trained = events["trained"].detail
    assert (training.steps, training.tokens, training.final_loss) == (60, trained["tokens"], trained["final_loss"])
    assert training.parent == loop.books.registry.named("small-r1").model
    assert len(training.curve) == len(trained["curve"])
    scores = {score.set: score for score in story.scores}
    evaluated = events["evaluated"].detail
    assert scores["target"].change == evaluated["target"]["over_champion"]
    assert (scores["target"].verdict, scores["known"].verdict) == ("better", "nothing to compare with")
    assert [cost.stage for cost in story.costs] == ["ingested", "tokenized", "trained", "evaluated"]
    assert story.seconds == pytest.approx(sum(e.seconds or 0 for e in events.values()))
    assert story.joules == pytest.approx(sum(e.joules or 0 for e in events.values()))
    assert story.joules_source in ("estimate", "rapl", "nvml")
    cycle = loop.books.journal.cycle(story.trigger)
    assert cycle is not None and cycle.decision is not None
    assert story.reasons == cycle.decision["reasons"]


def test_a_cycle_is_named_by_its_number_its_trigger_or_its_release(loop: Factory, story: CycleStory) -> None:
    assert loop.explain(story.trigger) == story == loop.explain("small-r2")
    first = loop.explain("small-r1")
    assert (first.number, first.champion, first.trainings[0].parent) == (1, None, None)
    assert {score.verdict for score in first.scores} == {"nothing to compare with"}
    with pytest.raises(ConfigError, match=r"found '7'; there are: 1 \(run-.*\), 2 \(drift-"):
        loop.explain("7")


def test_a_cycle_that_has_made_nothing_yet_is_told_too(tmp_path: Path) -> None:
    with Factory(Config.model_validate(small_config(tmp_path))) as factory:
        factory.books.journal.open_cycle("run-0", recipe={}, bound=Bound(kind="run", sources_digest="x"))
        story = factory.explain("1")

    assert (story.state, story.costs, story.scores, story.corpora) == ("running", [], [], [])
    assert story.lines()[0] == "Cycle 1 of small (run-0): running"
    assert "The cycle is running." in cycle_page(story).decode()


def test_the_command_writes_text_json_and_the_page(
    loop: Factory, story: CycleStory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, page = tmp_path / "config.yaml", tmp_path / "cycle.html"
    config.write_text(yaml.safe_dump(loop.config.model_dump(mode="json", exclude_defaults=True)), encoding="utf-8")

    assert main(["explain", "2", str(config), "--json", "--html", str(page)]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(story.to_json()))
    assert page.read_bytes() == cycle_page(story)
    assert main(["explain", "small-r2", str(config)]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines() == story.lines()
    for said in ("better", "taken over", "came in", f"{story.joules:,.0f} J", "passed: superiority"):
        assert said in shown
    assert main(["explain", "9", str(config)]) == 2
    with pytest.raises(StorageError, match="expected to write the page"):
        loop.explain("2", html=str(tmp_path / "no" / "folder.html"))


# ── the page ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Parsed(HTMLParser):
    """A page's elements and its text."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.shape: list[str] = []
        self.text = ""
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.shape.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_says_what_the_story_says(story: CycleStory) -> None:
    text = re.sub(r"\s+", " ", Parsed(cycle_page(story)).text)

    assert "The candidate became the release small-r2. It is better on target" in text or "small-r2. It is" in text
    for score in story.scores:
        assert f"{score.set}: {score.verdict}" in text
    for reason in story.reasons:
        assert reason.partition(": ")[2] in text
    for corpus in story.corpora:
        assert corpus.id in text
    assert f"{story.joules:,.0f} J" in text


def test_the_page_asks_for_nothing_and_runs_nothing(story: CycleStory) -> None:
    page = cycle_page(story)

    assert not {"script", "iframe", "object", "link"} & set(Parsed(page).shape) - {"link"}
    assert b"default-src 'none'" in page
    assert not re.findall(rb"(?:src|href)=\"(?!data:)", page)


def test_what_data_says_can_not_change_what_the_page_is_made_of(story: CycleStory) -> None:
    def saying(text: str) -> CycleStory:
        corpora = [replace(c, id=text, sources={text: {"kept": 1}}, rejected_by_rule={text: 3}) for c in story.corpora]
        trainings = [
            replace(
                t,
                model=text,
                parent=text,
                differs={text: text},
                mixture=[{"sources": [text], "share": 1.0, "epochs": 1}],
            )
            for t in story.trainings
        ]
        names = {"factory": text, "trigger": text, "release": text, "champion": text}
        costs = [replace(cost, artifact=text, joules_source=text) for cost in story.costs]
        told = {"why_begun": [text], "reasons": [text], "corpora": corpora, "trainings": trainings, "costs": costs}
        return replace(story, **names, **told)

    page = cycle_page(saying(HOSTILE))
    assert Parsed(page).shape == Parsed(cycle_page(saying("plain"))).shape
    assert "<script>ran=1</script>" in Parsed(page).text
    assert not {"\u202e", "\x00", "\x1b"} & set(page.decode())


def test_the_page_fits_a_phone_and_is_dark_where_that_is_liked(
    story: CycleStory, chromium: str, tmp_path: Path
) -> None:
    file = tmp_path / "cycle.html"
    file.write_bytes(cycle_page(story))
    views = [View(width=1280), View(width=1280, scheme="dark"), View(width=360), View(width=360, scheme="dark")]
    seen = look(
        chromium,
        file.as_uri(),
        views,
        "({wide: document.documentElement.scrollWidth, paper: getComputedStyle(document.body).backgroundColor, "
        "charts: document.querySelectorAll('svg.chart').length, "
        "small: [...document.querySelectorAll('svg.chart text')].filter(t => t.getBoundingClientRect().height < 9).length, "
        "out: [...document.querySelectorAll('svg.drawn')].filter(svg => [...svg.querySelectorAll('text')].some(t => "
        "t.getBoundingClientRect().right > innerWidth || t.getBoundingClientRect().left < 0)).length})",
    )

    assert [value["wide"] <= view.width for value, view in zip(seen.values, views, strict=True)] == [True] * 4
    assert [value["paper"] for value in seen.values[:2]] == ["rgb(253, 253, 252)", "rgb(20, 23, 26)"]
    assert all(value["charts"] >= 6 and not value["small"] and not value["out"] for value in seen.values)
    assert seen.complaints == []
    assert seen.requests == [file.as_uri()] * 4


# ── the pictures ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (2.01, 2.02), (-0.3, 0.1), (0, 60), (5, 5), (0, 0), (-1e-9, 1e-9), (1e3, 9e6)]
)
def test_ticks_are_round_and_hold_the_range(low: float, high: float) -> None:
    ticks = ticks_of(low, high)

    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(set(ticks))
    assert ticks[0] <= low + 1e-9 and ticks[-1] >= high - 1e-9


def test_an_interval_is_drawn_from_its_low_to_its_high_end_on_one_scale() -> None:
    whiskers = [
        Whisker(label="a", tone="kept", low=1.0, estimate=1.5, high=2.0, said="a"),
        Whisker(label="b", tone="held", low=2.0, estimate=2.5, high=3.0, said="b"),
    ]
    lines = re.findall(r'</title><line x1="([\d.]+)" x2="([\d.]+)"', intervals(whiskers, title="t"))

    (a_low, a_high), (b_low, b_high) = (tuple(map(float, line)) for line in lines)
    assert a_high == b_low
    assert a_high - a_low == pytest.approx(b_high - b_low, abs=0.2)
    dots = [float(x) for x in re.findall(r'cx="([\d.]+)"', intervals(whiskers, title="t"))]
    assert dots[0] == pytest.approx((a_low + a_high) / 2, abs=0.2)


def test_zero_is_on_the_scale_where_it_is_marked() -> None:
    whisker = Whisker(label="a", tone="kept", low=-0.3, estimate=-0.2, high=-0.1, said="a")

    assert 'class="guide zero"' in intervals([whisker], title="t", zero=True)
    assert "zero" not in intervals([whisker], title="t")


def test_a_curve_goes_through_its_points_and_falls_where_they_fall() -> None:
    (way,) = re.findall(r'points="([^"]+)"', curve([(1, 5.0), (50, 3.0), (100, 2.0)], title="t"))
    points = [tuple(map(float, point.split(","))) for point in way.split()]

    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert [y for _, y in points] == sorted(y for _, y in points)
    assert "circle" in curve([(1, 5.0)], title="t")
