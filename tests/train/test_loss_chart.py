"""Laws of the picture of a run's losses: it stands alone, runs nothing, and depends on the losses alone."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from aifactory.train.loss_chart import loss_chart

POINTS = [(step, 8 / step**0.3) for step in range(5, 1005, 5)]


def test_the_bytes_depend_on_the_losses_alone():
    assert loss_chart(POINTS) == loss_chart(POINTS)
    assert loss_chart(POINTS) != loss_chart(POINTS[:-1])


def test_nothing_in_it_is_a_script_a_date_or_fetched_from_elsewhere():
    chart = loss_chart(POINTS)

    assert not re.search(r"<script|<!--|javascript|@import|url\(|20\d\d-\d\d", chart)
    assert re.findall(r"https?://[^\"]+", chart) == ["http://www.w3.org/2000/svg"]


def test_the_line_has_a_place_for_every_point_and_falls_as_the_loss_does():
    root = ElementTree.fromstring(loss_chart(POINTS))
    (line,) = root.findall(".//*[@class='series serie-0 color-0']/{*}path")
    places = [tuple(map(float, place)) for place in re.findall(r"([\d.]+) ([\d.]+)", line.get("d"))]

    assert len(places) == len(POINTS)
    assert places == sorted(places)  # to the right, and downwards
    assert places[0][1] < places[-1][1]


@pytest.mark.parametrize("points", [[(1, 3.0)], [(1, 3.0), (2, 3.0)], [(10, 3.0), (20, 2.0), (1_000_000, 1.0)], []])
def test_few_points_and_equal_ones_can_be_drawn(points):
    ElementTree.fromstring(loss_chart(points))


def test_the_run_has_it_in_its_folder(runs, uninterrupted):
    file = Path(runs.storage.path(*uninterrupted.run_folder, "loss.svg"))

    assert file.read_text() == loss_chart([tuple(point) for point in runs.figures(uninterrupted)["curve"]])
