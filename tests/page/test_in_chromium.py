"""Laws of the page in a browser: nothing is complained of, nothing is asked of elsewhere, and whoever reads or types can use it.

The accessibility checks are axe-core's of the levels A and AA, from the npm registry; each view with what a real loop has left.
AIFACTORY_PAGE_PICTURES=<folder> keeps pictures of all views, for a person to look at; AIFACTORY_PAGE_CONFIG=<file> has them be of that
factory, which must have had two releases, such as the quickstart's.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from chromium import Tab, View, browse
from drivers import Driver, kill
from made_books import MadeBooks
from small_factories import small_config

from aifactory.page.access import TOKEN_VARIABLE, Access
from aifactory.page.server import VIEWS, PageServer

PATHS = ["/" if name == "loop" else f"/{name}" for name in VIEWS]
WIDE, PHONE = View(width=1280), View(width=320)
EVERY = [View(width=width, scheme=scheme) for width in (1280, 320) for scheme in ("light", "dark")]
SIDEWAYS = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
AXE = """
axe.run(document, {runOnly: {type: "tag", values: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22a", "wcag22aa"]}})
  .then((found) => ({
    passed: found.passes.length,
    violations: found.violations.map((each) => [each.id, each.help, each.nodes.slice(0, 3).map((node) => node.html + " " + node.failureSummary)]),
  }))
"""


@contextmanager
def served(made: MadeBooks, **page: Any) -> Iterator[str]:
    """The page of some books at a port of this process."""
    runtime = made.books.config.runtime
    shown = runtime.model_copy(update={"page": runtime.page.model_copy(update=page)})
    made.books.config = made.books.config.model_copy(update={"runtime": shown})
    app = PageServer(made.books, Access(host="127.0.0.1")).app()
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def commanded(config: Path, *overrides: str, environment: dict[str, str] | None = None) -> Iterator[str]:
    """`aifactory page` as a user starts it; its address."""
    given = [word for override in ("runtime.page.port=0", *overrides) for word in ("--set", override)]
    command = [sys.executable, "-m", "aifactory", "page", "--config", str(config), *given, "--json"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}
    )
    assert process.stdout is not None
    try:
        told = ""
        while not told.rstrip().endswith("}"):
            line = process.stdout.readline()
            assert line, process.communicate()[1]
            told += line
        yield json.loads(told)["url"].rstrip("/")
    finally:
        process.terminate()
        process.communicate(timeout=30)


def keep_pictures(name: str, view: View) -> Path | None:
    folder = os.environ.get("AIFACTORY_PAGE_PICTURES")
    if folder is None:
        return None
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder) / f"{name.strip('/').replace('/', '-') or 'loop'}-{view.width}-{view.scheme}.png"


# ── over books that were made ─────────────────────────────────────────────────────────────────────────────────────────


def test_every_view_opens_without_a_complaint_and_fits_a_telephone(made: MadeBooks, chromium: str) -> None:
    async def see(tab: Tab) -> dict[tuple[str, int], tuple[int, list[Any], list[str]]]:
        found = {}
        for view in (WIDE, PHONE):
            for path in [*PATHS, "/releases/2", "/releases/act?do=canary&release=1"]:
                await tab.go(url + path, view)
                found[path, view.width] = (await tab.value(SIDEWAYS), tab.complaints, tab.requests)
        return found

    with served(made) as url:
        for (path, width), (sideways, complaints, requests) in browse(chromium, see, timeout_s=120).items():
            assert complaints == [], path
            assert sideways <= 0, (path, width)
            assert all(each.startswith(url) for each in requests), path


def test_an_open_view_follows_the_books_and_the_focus_stays(made: MadeBooks, chromium: str) -> None:
    train = "document.querySelector('svg.ring a[href=\"/training\"]')"

    async def see(tab: Tab) -> None:
        await tab.go(f"{url}/", WIDE)
        assert "step 12 of 40" in await tab.value(f"{train}.textContent")
        await tab.value(f"{train}.focus()")
        made.training(30)
        await tab.until(f"{train}.textContent.includes('step 30 of 40')", timeout_s=30)
        assert await tab.value("document.activeElement.getAttribute('href')") == "/training"
        await tab.value("document.getElementById('live').click()")
        made.training(35)
        await tab.value("new Promise((done) => setTimeout(done, 1000))", is_promise=True)
        assert "step 30 of 40" in await tab.value(f"{train}.textContent")
        await tab.value("document.getElementById('live').click()")
        await tab.until(f"{train}.textContent.includes('step 35 of 40')", timeout_s=30)
        assert tab.complaints == []

    with served(made, refresh_s=0.2) as url:
        browse(chromium, see, timeout_s=120)


def test_it_is_used_by_the_keyboard_alone(made: MadeBooks, chromium: str) -> None:
    focused = "document.activeElement.textContent.trim()"

    async def see(tab: Tab) -> None:
        await tab.go(f"{url}/releases", WIDE)
        await tab.press("Tab")
        assert await tab.value(focused) == "Skip to content"
        await tab.press("Enter")
        assert await tab.value("document.activeElement.id") == "main"
        names = []
        for _ in range(20):
            await tab.press("Tab")
            names.append(await tab.value(focused))
            if names[-1].startswith("Roll back"):
                break
        assert names[-1] == "Roll back to made-r1", names
        await tab.press("Enter")
        await tab.until("document.getElementById('reason') !== null", timeout_s=30)
        await tab.value("document.getElementById('reason').focus()")
        await tab.call("Input.insertText", text="by the keyboard")
        await tab.press("Enter")
        await tab.until("document.body?.textContent.includes('made-r1 serves again.')", timeout_s=30)

    with served(made) as url:
        browse(chromium, see, timeout_s=120)
    line = made.books.journal.audited().lines[-1]
    assert (line.action, line.subject, line.detail["reason"]) == ("rollback", "made-r1", "by the keyboard")


# ── over a real loop ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """axe-core's script."""
    folder = tmp_path_factory.mktemp("accessibility")
    if shutil.which("npm") is None:
        pytest.skip("expected npm, found none")
    shutil.copy(Path(__file__).with_name("accessibility") / "package.json", folder)
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    if done.returncode and "AIFACTORY_REQUIRE_NPM" not in os.environ:
        pytest.skip(f"expected npm to install axe-core, found: {done.stderr[-500:]}")
    assert done.returncode == 0, done.stderr
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8")


async def checked(tab: Tab, axe: str, url: str, paths: list[str]) -> list[str]:
    """What is wrong with the pages, in light and dark, on a screen and on a telephone."""
    wrong = []
    for view in EVERY:
        for path in paths:
            await tab.go(url + path, view)
            await tab.value(axe + "; 0")
            found = await tab.value(AXE, is_promise=True)
            where = f"{path} at {view.width}, {view.scheme}"
            wrong += [f"{where}: {each}" for each in found["violations"]]
            wrong += [f"{where}: {each}" for each in tab.complaints]
            assert found["passed"] > 5, where
            if (sideways := await tab.value(SIDEWAYS)) > 0:
                wrong.append(f"{where}: {sideways} pixels wider than the screen")
            if (file := keep_pictures(path.partition("?")[0], view)) is not None:
                await tab.picture(file)
    return wrong


@pytest.fixture(scope="module")
def turned(request: pytest.FixtureRequest) -> Path:
    """The configuration of a factory whose loop was closed by simulated users."""
    if (named := os.environ.get("AIFACTORY_PAGE_CONFIG")) is not None:
        return Path(named)
    driver: Driver = request.getfixturevalue("uninterrupted")
    return driver.config_file


@pytest.mark.slow
def test_every_view_of_a_real_loop_is_accessible(turned: Path, chromium: str, axe: str) -> None:
    with commanded(turned) as url:
        corpus = httpx.get(f"{url}/data/corpora").json()[0]["id"].partition("/")[2]
        more = [f"/corpora/{corpus}", "/cycles/1", "/cycles/2", "/releases/2", "/releases/act?do=rollback&release=1"]
        # The traffic of a day is looked at last, so its pictures are those that stay: a loop may have ended hours ago.
        more += ["/releases/act?do=canary&release=1", "/traffic?span=24h", "/nothing"]
        assert len(httpx.get(f"{url}/data/traffic?span=24h").json()["by_release"]) == 2

        wrong = browse(chromium, lambda tab: checked(tab, axe, url, [*PATHS, *more]), timeout_s=900)

    unexpected = [each for each in wrong if not (each.startswith("/nothing") and "404" in each)]
    assert not unexpected, "\n".join(unexpected)


@pytest.mark.slow
def test_the_door_is_accessible_too(turned: Path, chromium: str, axe: str) -> None:
    token = {TOKEN_VARIABLE: "a-token-that-is-long-enough"}
    with commanded(turned, environment=token) as url:
        assert browse(chromium, lambda tab: checked(tab, axe, url, ["/enter"]), timeout_s=300) == []


@pytest.mark.slow
def test_a_run_that_goes_on_is_seen_as_it_goes_on(tmp_path: Path, chromium: str) -> None:
    values = small_config(tmp_path, train={"max_steps": 5000}, runtime={"page": {"refresh_s": 0.5}})
    driver = Driver(tmp_path, values, verb="train")
    read: Callable[[], Any] = lambda: httpx.get(f"{url}/data/training").json()  # noqa: E731
    step = "Number(document.querySelector('.card dd').textContent.split(' of ')[0].replaceAll(',', ''))"

    async def see(tab: Tab) -> tuple[int, str]:
        await tab.go(f"{url}/training", WIDE)
        first = await tab.value(step)
        await tab.until(f"{step} > {first} + 5", timeout_s=120)
        text = await tab.value("document.querySelector('.card').textContent")
        assert await tab.value("document.querySelectorAll('.card svg.chart polyline').length") == 1
        if (file := keep_pictures("training-live", WIDE)) is not None:
            await tab.picture(file)
        await tab.go(f"{url}/", WIDE)
        if (file := keep_pictures("loop-live", WIDE)) is not None:
            await tab.picture(file)
        assert await tab.value("document.querySelector('svg.ring a[href=\"/training\"]').classList.contains('working')")
        return first, text

    with commanded(driver.config_file) as url:
        process = driver.start()
        try:
            deadline = time.monotonic() + 300
            while not any(run["state"] == "running" and run["step"] > 0 and run["curve"] for run in read()):
                assert process.poll() is None, driver.log.read_text(encoding="utf-8")[-3000:]
                assert time.monotonic() < deadline
                time.sleep(0.2)
            first, text = browse(chromium, see, timeout_s=300)
        finally:
            if process.poll() is None:
                kill(process)
    assert first > 0
    assert "tokens/s" in text
    assert "running" in text
