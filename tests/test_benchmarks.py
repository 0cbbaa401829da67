"""The benchmarks' own arithmetic and data: what they say must be right, however long they take."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import documents
import pyarrow.parquet as pq
import pytest
from documents import Planted, write_documents

FOLDER = Path(__file__).parent.parent / "benchmarks"


def benchmark(name: str) -> Any:
    """A file of benchmarks/ as a module; a folder of tests may have the same name."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ingest = benchmark("ingest")


def texts_of(folder: Path) -> list[str]:
    return [text for file in sorted(folder.glob("*.parquet")) for text in pq.read_table(file)["text"].to_pylist()]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Planted], list[str]]:
    folder = tmp_path_factory.mktemp("documents")
    found = write_documents(folder, 500_000, duplicate_share=0.2, file_bytes=100_000, num_sentences=300)
    return found, texts_of(folder)


def test_the_same_documents_are_written_each_time(tmp_path, planted):
    write_documents(tmp_path, 500_000, duplicate_share=0.2, file_bytes=100_000, num_sentences=300)
    assert texts_of(tmp_path) == planted[1]


def test_what_is_planted_is_a_copy_of_what_it_names(planted):
    copies, texts = planted
    assert {each.is_exact for each in copies} == {True, False}
    for each in copies:
        assert (texts[each.copy] == texts[each.original]) == each.is_exact
        assert ingest.jaccard(texts[each.copy], texts[each.original]) >= ingest._LEAST_JACCARD


def test_a_document_that_is_no_copy_is_unlike_all_others(planted):
    copies, texts = planted
    fresh = sorted(set(range(len(texts))) - {each.copy for each in copies})[:30]
    assert all(ingest.jaccard(texts[a], texts[b]) < ingest._LEAST_JACCARD for a in fresh for b in fresh if a < b)


def test_each_copy_that_stays_beside_its_like_is_a_miss_whichever_of_them_it_is():
    family = [Planted(1, 0, True), Planted(2, 0, True), Planted(3, 0, False), Planted(4, 0, False)]
    assert ingest.recalls(family, {0, 9}) == (1, 1)
    assert ingest.recalls(family, {2, 9}) == (1, 1)
    assert ingest.recalls(family, {3}) == (1, 1)
    assert ingest.recalls(family, {0, 1}) == (1, 0.5)
    assert ingest.recalls(family, {0, 4}) == (0.5, 1)
    assert ingest.recalls(family, {3, 4}) == (0.5, 1)
    assert ingest.recalls(family, {0, 1, 2, 3, 4}) == (0, 0)


def test_every_key_is_told_of_in_the_docstring_and_quick_takes_less_of_everything():
    assert all(f" {key} " in ingest.__doc__ for key in ingest._FIGURES)
    assert ingest.QUICK.end_to_end_bytes < ingest.FULL.end_to_end_bytes
    assert documents.sentences(10) == documents.sentences(20)[:10]


# ── training ──────────────────────────────────────────────────────────────────────────────────────────────────────────

train = benchmark("train")


def test_every_key_of_training_is_told_of_and_quick_takes_less_of_everything():
    assert all(f" {key} " in train.__doc__ for key in train._FIGURES)
    assert train.QUICK.seconds * train.QUICK.rounds < train.FULL.seconds * train.FULL.rounds
    assert not train.QUICK.peers


def test_the_figure_over_a_peer_is_the_least_of_all_models_and_each_is_the_median_of_its_rounds(tmp_path):
    bench = train._Bench(tmp_path, train.QUICK, ["fp32"])

    def contender(seconds):
        return lambda: {"tokens": 100, "seconds": seconds, "losses": [1.0], "cpu_s": 1.0}

    for seconds in (1.0, 9.0, 2.0):
        bench._round("17m_fp32", {"bare": contender(1.0), "ray": contender(seconds)}, backwards=False)
    bench._round("110m_fp32", {"bare": contender(1.0), "ray": contender(1.0)}, backwards=True)
    found = bench.measured()

    assert found.figures["ray_over_bare"] == 0.5
    assert found.figures["over_trl_sft"] is None
    assert found.raw["ray_over_bare_17m_fp32"] == [1.0, 1 / 9, 0.5]
    assert set(found.figures) == set(train._FIGURES)


def test_a_peer_whose_loss_is_another_is_told_of(tmp_path):
    bench = train._Bench(tmp_path, train.QUICK, ["fp32"])
    losses = {"bare": [2.0], "ray": [2.0], "lightning": [2.5], "hf_trainer": [2.001]}
    run = {name: lambda each=each: {"tokens": 1, "seconds": 1, "losses": each} for name, each in losses.items()}
    bench._round("17m_fp32", run, backwards=False)

    assert [note.split(",")[0] for note in bench.measured().notes] == ["lightning"]
