"""Laws of completion: what a shell offers is what the command knows, and each script is one that its shell runs."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from aifactory.cli import VERBS, command_parser
from aifactory.completion import SHELLS, script

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("completion")
    found = {shell: folder / f"aifactory.{shell}" for shell in SHELLS}
    for shell, file in found.items():
        file.write_text(script(command_parser(), shell), encoding="utf-8")
    return found


def ran(*command: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def offered_by_bash(file: Path, *words: str, cwd: Path = ROOT) -> set[str]:
    code = f'source "{file}"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _aifactory; printf "%s\\n" "${{COMPREPLY[@]}}"'
    return set(ran("bash", "-c", code, "bash", "aifactory", *words, cwd=cwd).split())


def offered_by_fish(file: Path, line: str, cwd: Path = ROOT) -> set[str]:
    code = f'source "{file}"; complete -C "aifactory {line}"'
    return {each.split("\t")[0] for each in ran("fish", "--no-config", "-c", code, cwd=cwd).splitlines()}


@pytest.mark.parametrize("shell", SHELLS)
def test_every_verb_and_every_option_is_in_each_script(scripts: dict[str, Path], shell: str) -> None:
    text = scripts[shell].read_text(encoding="utf-8")
    options = {
        name
        for verb in VERBS
        for action in command_parser()._subparsers._group_actions[0].choices[verb]._actions  # type: ignore[union-attr, index, call-overload]
        for name in action.option_strings
        if name.startswith("--")
    }
    assert len(options) > 30
    assert all(verb in text for verb in VERBS)
    assert all((name[2:] if shell == "fish" else name) in text for name in options)


def test_bash_offers_what_may_come_next(scripts: dict[str, Path]) -> None:
    bash = scripts["bash"]
    assert {*VERBS, "page", "plan", "config", "completion"} <= offered_by_bash(bash, "")
    assert offered_by_bash(bash, "roll") == {"rollback"}
    assert {"--to", "--reason", "--quarantine"} <= offered_by_bash(bash, "rollback", "--")
    assert "--watch" not in offered_by_bash(bash, "rollback", "--")
    assert offered_by_bash(bash, "canary", "r2", "--by", "") == {"key", "request"}
    assert offered_by_bash(bash, "config", "") == {"schema"}
    assert offered_by_bash(bash, "completion", "") == set(SHELLS)
    assert "quickstart.yaml" in offered_by_bash(bash, "run", "quick", cwd=ROOT / "configs")
    assert "quickstart.yaml" in offered_by_bash(bash, "status", "--config", "quick", cwd=ROOT / "configs")


@pytest.mark.skipif(shutil.which("fish") is None, reason="expected the shell fish, found none")
def test_fish_offers_what_may_come_next(scripts: dict[str, Path]) -> None:
    fish = scripts["fish"]
    assert {*VERBS, "page"} <= offered_by_fish(fish, "")
    assert {"--to", "--quarantine"} <= offered_by_fish(fish, "rollback --")
    assert "--watch" not in offered_by_fish(fish, "rollback --")
    assert {"key", "request"} <= offered_by_fish(fish, "canary r2 --by ")
    assert offered_by_fish(fish, "config ") == {"schema"}


@pytest.mark.skipif(shutil.which("zsh") is None, reason="expected the shell zsh, found none")
def test_zsh_takes_its_script_from_its_path_of_functions(scripts: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(scripts["zsh"], tmp_path / "_aifactory")
    code = "fpath=($1 $fpath); autoload -Uz compinit; compinit -u -d $1/dump; autoload +X _aifactory; print $_comps[aifactory]"
    assert ran("zsh", "-f", "-c", code, "zsh", str(tmp_path)).strip() == "_aifactory"


@pytest.mark.skipif(shutil.which("zsh") is None, reason="expected the shell zsh, found none")
def test_zsh_offers_what_may_come_next(scripts: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(scripts["zsh"], tmp_path / "_aifactory")
    begin = f"fpath=({tmp_path} $fpath); autoload -Uz compinit; compinit -u -d {tmp_path}/dump; LISTMAX=1000"

    assert "--watch" not in offered_by_zsh(begin, "aifactory rollback --", until="--quarantine")
    offered_by_zsh(begin, "aifactory ", until="withdraw")
    offered_by_zsh(begin, "aifactory canary r2 --by ", until="request")
    offered_by_zsh(begin, "aifactory config ", until="schema")


def offered_by_zsh(begin: str, line: str, *, until: str) -> str:
    """What zsh lists for a line; it does so in a terminal alone."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "dumb", "COLUMNS": "100"}
    process = subprocess.Popen(["zsh", "-f", "-i"], stdin=follower, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    heard = ""

    def wait_for(wanted: str) -> None:
        nonlocal heard
        deadline = time.monotonic() + 60
        while wanted not in heard:
            assert time.monotonic() < deadline, heard
            if select.select([leader], [], [], 0.1)[0]:
                heard += os.read(leader, 65_536).decode(errors="replace")

    try:
        os.write(leader, f"{begin}; print READ''Y\n".encode())
        wait_for("READY")
        heard = ""
        os.write(leader, f"{line}\t".encode())
        wait_for(until)
        return heard
    finally:
        process.kill()
        process.wait()
        os.close(leader)
