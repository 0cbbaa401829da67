"""Laws of candidates, over the whole loop: each is a model of its own, the best is judged, and none is made twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from aifactory.factory import Factory
from aifactory.records.artifacts import Model, Scorecard, digest_of
from aifactory.records.storage import StoredFile
from aifactory.train.base import digest_folder

pytestmark = pytest.mark.slow
TRAIN = {"max_steps": 24, "candidates": [{"learning_rate": 1e-5}, {}]}


def models_of(factory: Factory) -> list[str]:
    return [event.subject for event in factory.books.journal.events(event="trained") if event.subject]


def test_candidates_from_training_to_the_gate_and_one_more_later(
    make_factory: Callable[..., Factory],
) -> None:
    runtime = {"cpus_per_worker": 0.4}
    factory = make_factory(train=TRAIN, runtime=runtime)
    report = factory.run()
    (cycle,) = report.cycles
    first, second = models_of(factory)

    # Each is an artifact with its lineage and its scorecard; they differ by what the candidates differ by.
    models = {model_id: factory.books.artifacts.get(Model, model_id) for model_id in (first, second)}
    rates = {model_id: model.record.recipe["train"]["learning_rate"] for model_id, model in models.items()}
    assert sorted(rates.values()) == [1e-5, 0.01]
    slow, fast = sorted(models, key=lambda model_id: rates[model_id])
    for model_id in models:
        tree = factory.lineage(model_id)
        assert {parent.kind for parent in tree.parents} == {"tokens"}
    scorecards = [
        factory.books.artifacts.get(Scorecard, e.subject or "") for e in factory.books.journal.events(event="evaluated")
    ]
    assert {card.record.inputs[0] for card in scorecards} == {slow, fast}

    # A rate of 1e-5 teaches nothing in 24 steps: the other one is chosen and judged, and says of how many it was chosen.
    assert [(each["differs"], each["model"], each["chosen"]) for each in cycle.candidates] == [
        ({"learning_rate": 1e-5}, slow, False),
        ({}, fast, True),
    ]
    assert "choice: the best of 2 candidates on holdout; each interval here holds with 97.50%" in cycle.reasons[0]
    chosen = next(card for card in scorecards if card.record.inputs[0] == fast)
    assert cycle.scores["holdout"]["candidate"] == chosen.figures["holdout"]["candidate"]
    assert all(release.model == fast for release in factory.books.registry.releases())
    lines = "\n".join(report.lines())
    assert "candidate   learning_rate: 1e-05: " in lines
    assert f"{fast} (chosen)" in lines

    # What left the stage was found by another process to be what was trained.
    for model in models.values():
        assert model.figures["parity"]["largest_difference"] <= 1e-3
        assert model.figures["parity"]["tokens"] > 100
        assert_card(factory, model)

    # The same again makes nothing; without candidates it is the model that {} made.
    factory.close()
    again = make_factory(train=TRAIN, runtime=runtime)
    again.run()
    assert len(models_of(again)) == 2
    alone = make_factory(train={"max_steps": 24}, runtime=runtime)
    assert alone.train().id == fast

    # One more candidate trains that one alone.
    more = make_factory(train={**TRAIN, "candidates": [*TRAIN["candidates"], {"seed": 5}]}, runtime=runtime)
    last = more.run()
    assert len(models_of(more)) == 3
    assert [each["model"] for each in last.cycles[-1].candidates][:2] == [slow, fast]
    assert "best of 3 candidates" in last.cycles[-1].reasons[0]
    assert last.cycles[-1].tokens_per_s is not None
    assert last.cycles[-1].scores["holdout"]


def assert_card(factory: Factory, model: Model) -> None:
    """The card is there, is valid, has the scores, and is in no digest."""
    folder = Path(model.uri)
    card = ModelCard.load(folder / "README.md")
    (holdout, *_) = card.data.eval_results
    assert holdout.metric_type == "bits_per_byte"
    assert "![Training loss](loss.svg)" in card.text
    assert (folder / "loss.svg").read_text().startswith("<svg")
    listed = {file.name for file in model.record.files}
    assert not {"README.md", "loss.svg"} & listed
    assert model.digest == digest_of([file for file in model.record.files if isinstance(file, StoredFile)])
    before = digest_folder(folder)
    (folder / "README.md").write_text("another card")
    assert digest_folder(folder) == before


def test_what_a_person_looks_at_is_left_of_a_run(make_factory: Callable[..., Factory]) -> None:
    factory = make_factory(train={"max_steps": 12})
    model = factory.train()
    run = Path(factory.books.storage.path("runs", f"train-{model.fingerprint[:16]}"))

    assert sorted(path.name for path in run.iterdir()) == ["loss.svg", "tensorboard"]
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
