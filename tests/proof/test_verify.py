"""Releases made again from their records: equal to the byte, or it says what is not and why."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import yaml
from here_loops import tiny_config, train_here

from aifactory import Config, Factory
from aifactory.cli import main
from aifactory.cluster.tasks import run_here
from aifactory.errors import StateError
from aifactory.proof.verify import Verification, verify_release
from aifactory.records.artifacts import Artifact, Corpus, Model, Record, Scorecard, TokenSet, digest_of

pytestmark = pytest.mark.slow
Copy = Callable[..., Factory]


def verified(factory: Factory, release: str, *, from_scratch: bool = False) -> Verification:
    return verify_release(
        factory.books, release, run_tasks=lambda: run_here, from_scratch=from_scratch, train_work=train_here
    )


def made_of(factory: Factory, number: int) -> dict[str, Artifact]:
    """What the cycle of this number made, by kind."""
    nouns = {"ingested": Corpus, "tokenized": TokenSet, "trained": Model, "evaluated": Scorecard}
    cycle = factory.books.journal.cycles()[number - 1]
    events = factory.books.journal.events(cycle=cycle.trigger)
    return {
        nouns[e.event].kind: factory.books.artifacts.get(nouns[e.event], str(e.subject))
        for e in events
        if e.event in nouns
    }


def stored(loop: Factory) -> list[Path]:
    """What lies under the storage root, without the files that SQLite opens and closes."""
    return sorted(path for path in Path(loop.books.storage.root).rglob("*") if not path.name.startswith("state.db"))


def test_a_first_release_is_made_again_to_the_byte_and_nothing_is_taken(loop: Factory) -> None:
    before = stored(loop)

    report = verified(loop, "small-r1")

    assert (report.verdict, report.reason, report.holds) == ("equal", "", True)
    made = made_of(loop, 1)
    tokens = made["tokens"].id
    assert [(check.id, check.how) for check in report.checks] == [
        (made["corpus"].id, "rebuilt"),
        (f"tokenizer of {tokens}", "rebuilt"),
        (tokens, "rebuilt"),
        (made["model"].id, "rebuilt"),
        (made["scorecard"].id, "rebuilt"),
    ]
    assert [check.found for check in report.checks if "tokenizer" not in check.id] == [
        made[kind].digest for kind in ("corpus", "tokens", "model", "scorecard")
    ]
    assert all(check.execution == {} for check in report.checks)
    assert stored(loop) == before  # nothing is left there


def test_of_a_later_release_what_its_cycle_made_is_rebuilt_and_the_rest_is_taken_and_checked(loop: Factory) -> None:
    report = verified(loop, "small-r2")

    assert (report.verdict, report.reason) == ("equal", "")
    how = {check.id: check.how for check in report.checks}
    first, second = made_of(loop, 1), made_of(loop, 2)
    assert {name: how[made.id] for name, made in second.items()} == dict.fromkeys(second, "rebuilt")
    assert {name: how.get(made.id) for name, made in first.items()} == {
        "corpus": "taken",
        "tokens": "taken",
        "model": "taken",
        "scorecard": None,
    }
    (batch,) = [name for name in how if name.startswith("batch/")]
    assert how[batch] == "taken"


def test_from_scratch_makes_the_ancestors_too(loop: Factory) -> None:
    report = verified(loop, "small-r2", from_scratch=True)

    assert (report.verdict, report.reason) == ("equal", "")
    assert [check.id.partition("/")[0] for check in report.checks if check.how == "taken"] == ["batch"]
    rebuilt = {check.id for check in report.checks if check.how == "rebuilt"}
    for number in (1, 2):
        made = made_of(loop, number)
        assert {made[kind].id for kind in ("corpus", "tokens", "model")} <= rebuilt


# ── what is not as it was ─────────────────────────────────────────────────────────────────────────────────────────────


def change(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(("number", "kind"), [(1, "corpus"), (1, "tokens"), (2, "model"), (1, "model")])
def test_a_stored_file_that_was_changed_is_named(copied: Copy, number: int, kind: str) -> None:
    factory = copied()
    artifact = made_of(factory, number)[kind]
    name = max(artifact.record.files, key=lambda file: file.num_bytes).name
    change(Path(artifact.uri) / name)

    report = verified(factory, "small-r2" if number == 2 or kind != "tokens" else "small-r1")

    assert (report.verdict, report.holds) == ("differs", False)
    assert artifact.id in report.reason and name in report.reason


def test_a_record_that_was_changed_with_its_files_is_found_by_the_books(copied: Copy) -> None:
    factory = copied()
    model = made_of(factory, 1)["model"]
    file = Path(model.uri) / "record.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    record["digest"] = "0" * 64
    file.write_text(json.dumps(record), encoding="utf-8")

    report = verified(factory, "small-r2")

    assert report.verdict == "differs"
    assert f"the record of {model.id} says digest {'0' * 16}, the books {model.digest[:16]}" in report.reason


def test_weights_that_no_training_gives_are_found_though_record_and_books_agree(copied: Copy) -> None:
    factory = copied()
    model = made_of(factory, 1)["model"]
    change(Path(model.uri) / "model.safetensors")
    data = (Path(model.uri) / "model.safetensors").read_bytes()
    record = json.loads((Path(model.uri) / "record.json").read_text(encoding="utf-8"))
    for each in record["files"]:
        if each["name"] == "model.safetensors":
            each["sha256"] = hashlib.sha256(data).hexdigest()
    record["digest"] = digest_of(Record.from_json(json.dumps(record)).files)
    (Path(model.uri) / "record.json").write_text(json.dumps(record), encoding="utf-8")
    with factory.books.database.write() as connection:
        values = {"digest": record["digest"], "id": model.id}
        connection.execute(sa.text("UPDATE artifacts SET digest = :digest WHERE id = :id"), values)

    report = verified(factory, "small-r1")

    assert report.verdict == "differs"
    assert report.reason == f"{model.id} is the first that differs, in model.safetensors"
    assert [check.is_equal for check in report.checks] == [True, True, True, False]
    assert report.checks[-1].files == ["model.safetensors"]


def test_sources_that_were_changed_are_named(copied: Copy, tmp_path: Path) -> None:
    factory = copied()
    file = Path(factory.config.ingest.sources[0].path) / "topic002" / "003.txt"  # type: ignore[union-attr]
    file.write_text("something else altogether", encoding="utf-8")

    report = verified(factory, "small-r1")

    assert (report.verdict, report.checks) == ("not rebuildable", [])
    assert "hold something else than when run-" in report.reason
    # The parent's corpus is taken, so the retrain does not need them.
    assert verified(factory, "small-r2").verdict == "equal"
    assert verified(factory, "small-r2", from_scratch=True).verdict == "not rebuildable"


def test_sources_that_are_gone_are_said(copied: Copy) -> None:
    factory = copied()
    shutil.rmtree(Path(factory.config.ingest.sources[0].path))  # type: ignore[union-attr]
    report = verified(factory, "small-r1")

    assert report.verdict == "not rebuildable"
    assert "are not there any more" in report.reason


def test_a_source_that_the_configuration_names_no_more_is_said(copied: Copy) -> None:
    def renamed(config: Config) -> Config:
        source = config.ingest.sources[0].model_copy(update={"name": "other"})
        return config.model_copy(update={"ingest": config.ingest.model_copy(update={"sources": (source,)})})

    report = verified(copied(renamed), "small-r1")

    assert report.verdict == "not rebuildable"
    assert "names no source 'topics' of kind text any more" in report.reason


def test_the_recipe_is_that_of_the_records_whatever_the_configuration_says_today(copied: Copy) -> None:
    def other(config: Config) -> Config:
        plain = config.model_dump(mode="json")
        plain["train"] |= {"max_steps": 7, "learning_rate": 0.5}
        plain["tokenize"]["vocab_size"] = 300
        plain["model"]["architecture"]["hidden_size"] = 32
        plain["evaluate"]["max_tasks"] = 3
        plain["ingest"] |= {"holdout_share": 0.5, "steps": [{"step": "length", "min_bytes": 10**6}]}
        plain["improve"] |= {"holdout_share": 0.9}
        return Config.model_validate(plain)

    factory = copied(other)
    assert verified(factory, "small-r1").verdict == "equal"
    assert verified(factory, "small-r2").verdict == "equal"


def test_what_another_version_of_a_stage_made_is_said_before_any_work(
    loop: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aifactory.train import trainer

    monkeypatch.setattr(trainer, "CODE_VERSION", trainer.CODE_VERSION + 1)
    report = verified(loop, "small-r1")

    assert (report.verdict, report.checks) == ("not rebuildable", [])
    assert (
        f"made by version {trainer.CODE_VERSION - 1} of its stage, this is version {trainer.CODE_VERSION}"
        in report.reason
    )


def altered_execution(factory: Factory, artifact: Artifact, **execution: Any) -> None:
    file = Path(artifact.uri) / "record.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    record["execution"] |= execution
    file.write_text(json.dumps(record), encoding="utf-8")


def test_another_execution_that_gives_the_same_bytes_is_equal_and_said(copied: Copy) -> None:
    factory = copied()
    altered_execution(factory, made_of(factory, 1)["model"], torch="1.0.0")

    report = verified(factory, "small-r1")

    assert report.verdict == "equal"
    (model,) = [check for check in report.checks if check.id.startswith("model/")]
    assert model.execution["torch"][0] == "1.0.0"
    assert any("torch" in line and "recorded 1.0.0" in line for line in report.lines())


def test_other_bytes_under_another_instruction_set_are_no_contradiction(copied: Copy) -> None:
    factory = copied()
    model = made_of(factory, 1)["model"]
    altered_execution(factory, model, cpu_flags=["avx1024"])

    def other_bits(work: Any, config: Config, run: Any) -> Any:
        made = train_here(work, config, run)
        path = Path(work.storage.path(*work.model_folder)) / "model.safetensors"
        change(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        files = [replace(f, sha256=digest) if f.name == "model.safetensors" else f for f in made.files]
        return replace(made, files=files)

    report = verify_release(factory.books, "small-r1", run_tasks=lambda: run_here, train_work=other_bits)

    assert report.verdict == "not rebuildable"
    assert "comes out with other bytes under another instruction set: cpu_flags" in report.reason
    assert "recorded avx1024" in report.reason


def test_a_release_that_is_not_there_is_an_error(loop: Factory) -> None:
    with pytest.raises(StateError, match="small-r1, small-r2"):
        verified(loop, "small-r9")


# ── by the command, on Ray ────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_rebuilds_on_the_cluster_and_its_status_says_whether_it_is_equal(
    tmp_path: Path, ray_session: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True)), encoding="utf-8")
    with Factory(config) as factory:
        factory.run()
        model = made_of(factory, 1)["model"]
    capsys.readouterr()

    assert main(["verify", "small-r1", str(file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["verdict"], told["holds"], len(told["checks"])) == ("equal", True, 5)
    assert all(check["how"] == "rebuilt" and check["is_equal"] for check in told["checks"])

    change(Path(model.uri) / "model.safetensors")
    assert main(["verify", "1", str(file)]) == 1
    shown = capsys.readouterr().out
    assert shown.startswith("small-r1: differs: ")
    assert "model.safetensors" in shown
