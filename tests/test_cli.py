"""The command: its verbs, its exit status, what goes where."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_factories import small_config

from aifactory import Factory
from aifactory.cli import VERBS

ROOT = Path(__file__).parent.parent


def run(*arguments: str, cwd: Path | None = None, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "aifactory", *arguments], capture_output=True, text=True, timeout=timeout, cwd=cwd
    )


def written(folder: Path, values: dict[str, Any]) -> str:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(file)


def test_every_verb_is_a_method_of_the_factory_and_a_job() -> None:
    assert all(callable(getattr(Factory, verb)) for verb in VERBS)
    jobs = {file.stem.removesuffix("_corpus") for file in (ROOT / "jobs").glob("*.py")}
    assert jobs == set(VERBS)


def test_no_job_has_the_name_of_a_module_of_the_standard_library() -> None:
    assert not {file.stem for file in (ROOT / "jobs").glob("*.py")} & sys.stdlib_module_names


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda f: f.name)
def test_every_configuration_in_the_repository_loads(file: Path) -> None:
    assert Factory.from_yaml(file).config.name


def test_help_names_every_verb() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert all(verb in done.stdout for verb in VERBS)


def test_schema_goes_to_standard_output() -> None:
    schema = json.loads(run("config", "schema").stdout)
    assert set(schema["properties"]) >= {"name", "ingest", "train", "runtime"}


def test_an_unknown_key_ends_with_status_2_and_names_file_line_and_nearest_key(tmp_path: Path) -> None:
    config = written(tmp_path, small_config(tmp_path, train={"max_step": 5}))
    done = run("status", config)
    assert done.returncode == 2
    assert "train.max_step" in done.stderr
    assert "max_steps" in done.stderr
    assert f"{config}:" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("arguments", [("status",), ("status", "a.yaml", "--config", "b.yaml"), ("status", "no.yaml")])
def test_a_missing_configuration_ends_with_status_2(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "expected" in done.stderr


def test_work_that_fails_ends_with_status_1(tmp_path: Path) -> None:
    config = written(tmp_path, small_config(tmp_path))
    done = run("rollback", config)
    assert done.returncode == 1
    assert "expected a release" in done.stderr


def test_json_results_stand_alone_on_standard_output(tmp_path: Path) -> None:
    config = written(tmp_path, small_config(tmp_path))
    done = run("status", config, "--json", "--set", "name=other")
    assert json.loads(done.stdout)["factory"] == "other"


def test_what_does_not_fit_is_an_error_at_the_start_that_says_what_is_there(tmp_path: Path) -> None:
    config = written(tmp_path, small_config(tmp_path))
    done = run("train", config, "--set", "runtime.workers=64")
    assert done.returncode == 1
    assert "64 training workers" in done.stderr
    assert "CPU" in done.stderr


def test_a_relative_storage_root_is_refused_in_a_job(tmp_path: Path) -> None:
    config = written(tmp_path, small_config(tmp_path, runtime={"storage": "here"}))
    done = subprocess.run(
        [sys.executable, "-m", "aifactory", "status", config],
        capture_output=True,
        text=True,
        env={"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 2
    assert "runtime.storage" in done.stderr
