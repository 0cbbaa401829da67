"""Laws of what is made: sources are mixed by the weights of the recipe; a candidate that fails takes no other with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from benches import bench_of, training_of
from corpora import write_topics
from small_factories import small_config

from aifactory import Config, Factory
from aifactory.cluster.tasks import RunTasks
from aifactory.config import Train
from aifactory.errors import ConfigError, TrainingError
from aifactory.records.artifacts import Model
from aifactory.text.shards import TokenRows
from aifactory.train.work import Work
from aifactory.workshop.bench import Made
from aifactory.workshop.execution import execution_of
from aifactory.workshop.models import Models
from aifactory.workshop.runs import Run


def two_sources(folder: Path, **train: Any) -> Config:
    values = small_config(folder, train=train, runtime={"inline_bytes": 10_000_000})
    write_topics(folder / "other", range(8, 10), documents=10)
    values["ingest"]["sources"].append({"name": "other", "kind": "text", "path": str(folder / "other")})
    return Config.model_validate(values)


def drawn(factory: Factory) -> list[Any]:
    return training_of(factory).drawn()


def test_every_source_is_read_from_shards_of_its_own_by_its_weight(tmp_path: Path) -> None:
    mixture = {"topics": {"weight": 1}, "other": {"weight": 3}}
    with Factory(two_sources(tmp_path, mixture=mixture)) as factory:
        found = drawn(factory)
        rows_of = {row["id"]: row["source"] for row in _rows(Path(factory.ingest().uri))}

    assert [each.share for _, _, each in found] == [0.75, 0.25]
    for (tokens, names, each), source in zip(found, ["other", "topics"], strict=True):
        rows = TokenRows(Path(tokens.uri), names)
        assert {rows_of[name] for name, _ in rows.whole_documents()} == {source}
        assert each.epochs == pytest.approx(each.share * 60 * 8 / len(rows))


def test_without_a_mixture_all_rows_are_one_set(tmp_path: Path) -> None:
    with Factory(two_sources(tmp_path)) as factory:
        ((tokens, names, each),) = drawn(factory)

    assert (each.share, len(TokenRows(Path(tokens.uri), names))) == (1.0, tokens.num_rows)


def test_weights_change_the_model_and_neither_the_corpus_nor_the_tokens(tmp_path: Path) -> None:
    ids = []
    for weight in (1, 2):
        mixture = {"topics": {"weight": weight}, "other": {}}
        with Factory(two_sources(tmp_path, mixture=mixture)) as factory:
            ids.append((factory.ingest().id, factory.tokenize().id))

    assert ids[0] == ids[1]


@pytest.mark.parametrize("mixture", [{"topics": {}}, {"topics": {}, "other": {}, "third": {}}])
def test_a_mixture_names_every_source_and_no_other(tmp_path: Path, mixture: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"train\.mixture to name the sources \['other', 'topics'\]"):
        two_sources(tmp_path, mixture=mixture)


def test_a_source_that_may_not_be_read_so_often_is_an_error_before_training(tmp_path: Path) -> None:
    mixture = {"topics": {"max_epochs": 0.1}, "other": {"max_epochs": 0.1}}
    with Factory(two_sources(tmp_path, mixture=mixture)) as factory, pytest.raises(ConfigError, match="max_epochs"):
        drawn(factory)


def _rows(corpus: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    return [row for file in sorted(corpus.glob("train-*.parquet")) for row in pq.read_table(file).to_pylist()]


MIB = 2**20
"""What the fake says of every model that it trains; a card shows it."""
FIGURES = {"parameters": MIB, "steps": 60, "tokens": MIB, "final_loss": 2.0, "tokens_per_s": 1.0, "precision": "fp32"}


def test_where_a_candidate_can_not_be_trained_it_is_named_and_the_others_are_trained(tmp_path: Path) -> None:
    trained: list[int] = []

    def train_work(work: Work, config: Config, run: RunTasks) -> Made:
        # What happens to each recipe is counted here; how one is trained is the trainer's.
        if work.recipe.seed == 2:
            raise TrainingError("expected a finite loss, found none.")
        trained.append(work.recipe.seed)
        return Made(files=[work.storage.write_bytes(b"weights", *work.model_folder, "weights")], figures=FIGURES)

    with Factory(two_sources(tmp_path, candidates=[{"seed": seed} for seed in (1, 2, 3)])) as factory:
        cycle, token_set = factory.cycle(), factory.tokenize()
        first, second, third = factory.config.train.recipes()
        models = Models(bench_of(factory), runs_at_once=lambda most: min(2, most), train_work=train_work)

        def of(*recipes: Train) -> list[Model]:
            return models.of(cycle, [token_set], recipes=recipes, shares=[1.0], base=None)

        with pytest.raises(TrainingError, match=r"train\.candidates\[1\]: expected a finite loss.*without this one"):
            of(first, second, third)
        assert sorted(trained) == [1, 3]
        with pytest.raises(TrainingError, match=r"^expected a finite loss"):
            of(second)
        # Those that were trained wait in the storage.
        assert [model.record.recipe["train"]["seed"] for model in of(third, first)] == [3, 1]
        assert sorted(trained) == [1, 3]


def test_how_a_step_is_computed_reaches_the_workers_and_the_record_and_not_the_recipe(tmp_path: Path) -> None:
    from aifactory.train.execution import Execution

    config = two_sources(tmp_path)
    chosen = {"attention": "mask", "activations": "full", "gradients": "bf16"}
    values = config.model_dump(mode="json")
    values["runtime"]["execution"] = chosen
    with Factory(Config.model_validate(values)) as factory:
        runtime = factory.config.runtime
        run = Run(bench_of(factory), training_of(factory))

        assert run.work().execution == Execution(**chosen)
        assert execution_of(runtime, factory.config.train)["step"] == runtime.execution.model_dump()
        assert factory.config.recipe("train", "model") == config.recipe("train", "model")
