"""What is lost on the way from sources to tokens changes no byte: a worker, a node, the driver, the room on the disk."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from drivers import Driver

from aifactory.records.artifacts import Corpus, TokenSet

SOURCES = 10
WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "that",
    "is",
    "was",
    "for",
    "on",
    "with",
    "as",
    "by",
    "at",
    "from",
    "this",
    "have",
    "which",
    "one",
    "were",
    "all",
    "there",
    "can",
    "more",
    "about",
]


def values_of(folder: Path, **runtime: Any) -> dict[str, Any]:
    """Ten sources, each of which is a piece, with copies and near copies among them, and every kind of step."""
    data = folder / "data"
    if not data.exists():
        data.mkdir(parents=True)
        rng = random.Random(5)
        known: list[str] = []
        for number in range(SOURCES):
            texts = []
            for _ in range(250):
                words = rng.choices(WORDS, k=60) + [f"w{rng.randrange(5000)}" for _ in range(40)]
                rng.shuffle(words)
                if known and rng.random() < 0.1:
                    words = rng.choice(known).split()
                    words[rng.randrange(len(words))] = f"w{rng.randrange(5000)}" if rng.random() < 0.5 else words[0]
                known.append(" ".join(words))
                texts.append(f"{known[-1]}\n")
            rows = "".join(f'{{"text": "{text.strip()}"}}\n' for text in texts)
            (data / f"s{number}.jsonl").write_text(rows, encoding="utf-8")
    return {
        "name": "plane",
        "ingest": {
            "sources": [{"name": f"s{i}", "kind": "jsonl", "path": str(data / f"s{i}.jsonl")} for i in range(SOURCES)],
            "steps": [
                {"step": "unicode"},
                {"step": "language"},
                {"step": "near_duplicates"},
                {"step": "decontaminate"},
            ],
        },
        "tokenize": {"vocab_size": 600, "row_len": 128},
        "runtime": {"storage": str(folder / "storage"), "inline_bytes": 0, "data_tasks": 2, "cpus_per_worker": 0.8}
        | runtime,
    }


def digests(driver: Driver) -> tuple[str, ...]:
    """The digests of the corpus and of the token set: what every byte of them comes to."""
    books = driver.books
    found = []
    for noun, event in ((Corpus, "ingested"), (TokenSet, "tokenized")):
        (made,) = books.journal.events(event=event)
        artifact = books.artifacts.get(noun, str(made.subject))
        assert all(books.storage.size(noun.kind, artifact.fingerprint[:16], f.name) for f in artifact.record.files)
        found.append(artifact.record.digest)
    return tuple(found)


def parts_of(driver: Driver) -> int:
    return len(list(Path(driver.books.storage.path("parts")).glob("*/*/part.json")))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """What comes out where nothing is lost, made in the driver's own process."""
    folder = tmp_path_factory.mktemp("whole")
    driver = Driver(folder, values_of(folder, inline_bytes=1_000_000_000), verb="tokenize")
    driver.finish()
    return digests(driver)


# In the first pass; in the second, or between them; among the shards.
@pytest.mark.parametrize(
    "moments",
    [
        pytest.param([SOURCES + 12], marks=pytest.mark.slow),
        pytest.param([1, 6, SOURCES + 4, 2 * SOURCES + 3], marks=pytest.mark.faults),
    ],
)
def test_a_driver_killed_among_its_parts_ends_with_the_same_bytes(
    moments: list[int], tmp_path: Path, whole: tuple[str, ...]
) -> None:
    killed = Driver(tmp_path, values_of(tmp_path), verb="tokenize")

    for moment in moments:
        assert killed.kill_when(lambda least=moment: parts_of(killed) >= least)  # type: ignore[misc]
    before = parts_of(killed)
    killed.finish()

    assert before >= moments[-1], "what was made stays"
    assert digests(killed) == whole


@pytest.mark.slow
def test_workers_killed_as_they_work_change_nothing(tmp_path: Path, whole: tuple[str, ...]) -> None:
    driver = Driver(tmp_path, values_of(tmp_path), verb="tokenize")
    process = driver.start()
    kills = []
    try:
        while process.poll() is None and len(kills) < 3:
            for child in psutil.Process(process.pid).children(recursive=True):
                if _name(child).startswith("ray::_") and parts_of(driver) > len(kills):
                    os.kill(child.pid, signal.SIGKILL)
                    kills.append(child.pid)
                    break
            time.sleep(0.02)
        assert process.wait(timeout=200) == 0, driver.log.read_text(encoding="utf-8")[-4000:]
    finally:
        process.kill()

    assert kills
    assert digests(driver) == whole


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.mark.faults
def test_a_node_that_is_lost_changes_nothing(tmp_path: Path, whole: tuple[str, ...]) -> None:
    driver = Driver(tmp_path, values_of(tmp_path), verb="tokenize")
    script = Path(__file__).with_name("losing_a_node.py")

    done = subprocess.run(
        [sys.executable, str(script), str(driver.config_file)], capture_output=True, text=True, timeout=400
    )

    assert done.returncode == 0, done.stderr[-4000:]
    assert "lost a node" in done.stdout
    assert digests(driver) == whole


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="a small disk is mounted in a namespace of its own")
def test_a_full_disk_is_an_error_that_says_so_and_what_was_published_is_intact(
    tmp_path: Path, whole: tuple[str, ...]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    values = values_of(tmp_path, storage=str(disk), inline_bytes=1_000_000_000)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    command = f"{sys.executable} -m aifactory tokenize {config}"
    # As many kibibytes as do for some parts, and not for all.
    script = (
        f"mount -t tmpfs -o size=900k none {disk} || exit 90; {command}; first=$?; "
        f"find {disk} -name part.json | wc -l; mount -o remount,size=200m {disk}; {command} --json; exit $((first * 10 + $?))"
    )
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script], capture_output=True, text=True, timeout=200
    )
    if done.returncode in (1, 90) and "unshare" in done.stderr + done.stdout:
        pytest.skip(f"no namespace with a disk of its own here: {done.stderr[-200:]}")

    assert done.returncode == 10, (done.returncode, done.stdout[-1000:], done.stderr[-3000:])
    assert "found the disk or the quota full; what was published is intact" in done.stderr
    assert int(done.stdout.split()[0]) > 0
    assert whole[1] in done.stdout
