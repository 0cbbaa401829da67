"""Laws of a model's card: the Hub reads it, every number of it is one of a record, and no digest depends on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from aifactory.model_card import model_card
from aifactory.records.artifacts import Corpus, Model, Record, Scorecard
from aifactory.workshop.cards import public_name

INTERVAL = {"estimate": 1.5, "low": 1.25, "high": 1.75, "confidence": 0.95, "num_examples": 40, "num_clusters": 9}
TRAIN = {"learning_rate": 0.003, "max_steps": 200, "guards": {"max_skipped": 3}, "mixture": {}, "threads": None}
TRAINED = {
    "parameters": 1_234_567,
    "steps": 200,
    "tokens": 819_200,
    "final_loss": 2.345678,
    "tokens_per_s": 4_321.0,
    "precision": "bf16",
    "mfu": 0.41,
    "flops_per_token": 9.1e6,
    "peak_flops_per_s": 9.894e14,
    "peak_source": "published",
    "curve": [[1, 5.0], [200, 2.3]],
    "parity": {"documents": 8, "tokens": 900, "largest_difference": 2e-7, "tolerance": 1e-3},
    "mixture": [{"tokens": "tokens/a", "sources": ["docs", "a|b"], "share": 1.0, "epochs": 1.5}],
}
INGESTED = {
    "rows_in": 120,
    "rows_kept": 100,
    "rows_holdout": 10,
    "rows_rejected": 20,
    "sources": {"docs": {"kept": 70, "rejected": 20}, "a|b": {"kept": 30, "rejected": 0}},
    "languages": {"de": 30, "en": 60, "unknown": 10},
}


def artifact(noun: Any, figures: dict[str, Any], **values: Any) -> Any:
    record = Record(
        kind=noun.kind,
        fingerprint=noun.kind[0] * 64,
        digest="0" * 64,
        code_version=1,
        recipe={"train": TRAIN, "architecture": {"context_length": 512}} if noun is Model else {},
        inputs=[],
        files=[],
        figures=figures,
        execution={"workers": 2},
        seconds=61.0,
        joules=1_220.0,
        **values,
    )
    return noun(record=record, uri="/nowhere")


MODEL = artifact(Model, TRAINED)
CORPUS = artifact(Corpus, INGESTED, joules_source="rapl")
SCORECARD = artifact(
    Scorecard,
    {
        "holdout": {"name": "holdout", "candidate": INTERVAL},
        "known": None,
        "target": {"name": "target", "candidate": {**INTERVAL, "estimate": 1.25}},
        "unigram_bits_per_byte": 3.0,
        "gzip_bits_per_byte": 2.5,
    },
)


def test_the_hub_reads_it_with_scores_languages_and_what_it_is() -> None:
    card = ModelCard(model_card("demo", MODEL, corpora=[CORPUS], scorecard=SCORECARD, base="org/base-1b"))

    assert card.data.language == ["en", "de"]
    assert (card.data.pipeline_tag, card.data.library_name) == ("text-generation", "transformers")
    assert (card.data.license, card.data.base_model) == ("unknown", "org/base-1b")
    found = {result.dataset_type: (result.metric_type, result.metric_value) for result in card.data.eval_results}
    assert found == {"holdout": ("bits_per_byte", 1.5), "target": ("bits_per_byte", 1.25)}
    # What the hub's library makes of the metadata is what stands there.
    assert card.data.to_dict()["model-index"][0]["results"][0]["metrics"][0]["name"].endswith("[1.250, 1.750]")


def test_data_recipe_scores_energy_and_limits_are_those_of_the_records() -> None:
    text = model_card("demo", MODEL, corpora=[CORPUS], scorecard=SCORECARD, licenses={"docs": "cc-by-4.0"})

    for said in (
        "1,234,567 parameters",
        "from scratch",
        "| `docs` | `corpus/cccccccccccccccc` | 70 | cc-by-4.0 |",
        "| `a\\|b` | `corpus/cccccccccccccccc` | 30 | not stated |",
        "10 of these rows are held out",
        "| 100.0% | 1.50 |",
        "![Training loss](loss.svg)",
        "41.0%: tokens/s x 9.1 MFLOP per token / (workers x peak of 989.4 TFLOP/s, published)",
        "900 tokens of 8 documents equal",
        "| `guards.max_skipped` | 3 |",
        "| `learning_rate` | 0.003 |",
        "1.500 [1.250, 1.750] | 40 | 9 |",
        "| training | 1,220 J | estimated",
        "| 1,220 J | measured: counters of the processors",
        "at most 512 tokens",
    ):
        assert said in text, said
    assert "threads" not in text  # what was not set is not said


def test_one_of_several_candidates_says_that_its_scores_chose() -> None:
    of_three = model_card("demo", MODEL, corpora=[CORPUS], scorecard=SCORECARD, num_candidates=3)

    assert "one of 3 candidates" in of_three
    assert "candidates" not in model_card("demo", MODEL, corpora=[CORPUS], scorecard=SCORECARD)


def test_before_it_is_judged_a_card_says_so_and_has_no_results() -> None:
    text = model_card("demo", MODEL, corpora=[CORPUS])

    assert "Not evaluated yet." in text
    assert "judged on nothing yet" in text
    assert ModelCard(text).data.eval_results is None


def test_a_base_that_is_no_model_of_the_hub_is_not_given_as_one(tmp_path: Path) -> None:
    (tmp_path / "secret" / "llama-1b").mkdir(parents=True)
    name = public_name(str(tmp_path / "secret" / "llama-1b"))
    folder = model_card("demo", MODEL, corpora=[CORPUS], base=name)
    child = model_card("demo", MODEL, corpora=[CORPUS], parent="model/0123456789abcdef")

    assert "from `llama-1b`" in folder
    assert "secret" not in folder
    assert "from `model/0123456789abcdef`" in child
    assert "base_model" not in folder + child
    assert public_name("org/base-1b") == "org/base-1b"


def test_a_model_of_before_there_were_curves_and_peaks_has_a_card_too() -> None:
    old = {name: value for name, value in TRAINED.items() if name not in ("curve", "mfu", "parity", "mixture")}
    text = model_card("demo", replace(MODEL, record=replace(MODEL.record, figures=old)), corpora=[CORPUS])

    assert "loss.svg" not in text
    assert "MFU" not in text
    ModelCard(text)
