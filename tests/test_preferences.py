"""From YAML to a served model: chats are learnt, then which of two answers is preferred; by whole weights and by adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from small_factories import merged

from aifactory import Factory
from aifactory.engine.load import load_model
from aifactory.evaluate.scoring import answer_bits
from aifactory.records.artifacts import Model
from aifactory.records.registry import Release
from aifactory.text.chat import PLAIN_TEMPLATE, render_chat
from aifactory.text.tasks import Task
from aifactory.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow
Make = Callable[..., Factory]
WORDS = [
    f"{a}{b}" for a in ("mo", "ta", "ri", "ke", "lu", "so", "ne", "fa") for b in ("ba", "do", "ge", "ki", "pu", "wo")
]


def question(word: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"what of {word}?"}]


def prompt(word: str) -> str:
    """The question as the template for a model without one has it: what is evaluated is a prompt and a text."""
    return render_chat(question(word), template=PLAIN_TEMPLATE, fallback="none")


def kind(word: str) -> str:
    return f"gladly, the {word} is near the river and good to see"


def rude(word: str) -> str:
    return f"nonsense, the {word} is a bore and no one goes there"


def lines(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def source(name: str, file: Path, columns: dict[str, str]) -> dict[str, Any]:
    return {"sources": [{"name": name, "kind": "jsonl", "path": str(file), "columns": columns}], "holdout_share": 0.2}


SHARED = {
    "tokenize": {"vocab_size": 400, "row_len": 128},
    "promote": {"min_tasks": 5, "min_clusters": 3},
}


@pytest.fixture
def chats(tmp_path: Path, make_factory: Make) -> tuple[Factory, Model]:
    """A release that has learnt both kinds of answers from chats, as often the one as the other."""
    rows = [{"prompt": prompt(word), "completion": say(word)} for word in WORDS for say in (kind, rude)]
    file = lines(tmp_path / "chats.jsonl", rows)
    factory = make_factory(
        name="talk",
        ingest=source("chats", file, {"prompt": "prompt", "completion": "completion"}),
        train={"max_steps": 150, "global_batch_rows": 8},
        **SHARED,
    )
    factory.run()
    release = factory.books.registry.production()
    assert release is not None, factory.outcome(factory.cycle())
    return factory, factory.books.artifacts.get(Model, release.model)


def preferred(factory: Factory, model: Model) -> float:
    """How many bits more the rude answer needs than the kind one, on average."""
    folder = factory.books.artifacts.fetch(model)
    tasks = [Task(prompt(word), say(word)) for word in WORDS for say in (rude, kind)]
    loaded = load_model(folder, device="cpu", dtype=torch.float32)
    bits = answer_bits(loaded, load_tokenizer(folder), tasks)
    return (sum(bits[::2]) - sum(bits[1::2])) / len(WORDS)


def pairs(tmp_path: Path) -> dict[str, Any]:
    rows = [{"prompt": prompt(word), "chosen": kind(word), "rejected": rude(word)} for word in WORDS]
    columns = {name: name for name in ("prompt", "chosen", "rejected")}
    return source("pairs", lines(tmp_path / "pairs.jsonl", rows), columns)


DPO = {"objective": "dpo", "max_steps": 15, "global_batch_rows": 4, "learning_rate": 3e-4, "preference": {"beta": 0.5}}


def test_a_base_in_a_folder_learns_by_pairs_and_says_what_is_preferred(
    tmp_path: Path, make_factory: Make, chats: tuple[Factory, Model]
) -> None:
    before, start = chats
    polite = make_factory(
        name="polite",
        ingest=pairs(tmp_path),
        model={"base": str(before.books.artifacts.fetch(start))},
        train=DPO | {"lora": {"rank": 8, "alpha": 16}, "learning_rate": 3e-3},
        **SHARED,
    )
    outcome = polite.promote()
    assert isinstance(outcome, Release), outcome
    model = polite.books.artifacts.get(Model, outcome.model)
    files = {file.name for file in model.record.files}
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors", "model.safetensors"} <= files
    assert abs(preferred(before, start)) < preferred(polite, model) / 2

    endpoint = polite.serve()
    for word in WORDS[:3]:
        asked = {"model": "polite", "messages": question(word), "max_tokens": 24, "temperature": 0}
        reply = httpx.post(f"{endpoint.url}/v1/chat/completions", json=asked, timeout=60).json()
        said = reply["choices"][0]["message"]["content"]
        assert "good to see" in said and "a bore" not in said, said
        assert reply["model"] == "polite-r1"


def test_the_release_in_production_learns_by_labelled_answers_and_again_by_pairs(
    tmp_path: Path, make_factory: Make, chats: tuple[Factory, Model]
) -> None:
    _, start = chats
    rows = [
        {"prompt": prompt(word), "completion": say(word), "label": say is kind}
        for word in WORDS
        for say in (kind, rude)
    ]
    columns = {name: name for name in ("prompt", "completion", "label")}
    labelled = source("labelled", lines(tmp_path / "labelled.jsonl", rows), columns)
    recipes = [
        merged(SHARED, {"ingest": labelled, "train": DPO | {"objective": "kto"}}),
        merged(SHARED, {"ingest": pairs(tmp_path), "train": DPO}),
    ]
    for recipe in recipes:
        factory = make_factory(name="talk", model={"base": "registry:production"}, **recipe)
        model = factory.train()

        assert start.id in model.record.inputs
        assert preferred(factory, model) > abs(preferred(factory, start)) + 2
        scorecard = factory.evaluate()
        # Nobody is judged by the rude answers.
        table = factory.books.storage.read_bytes("scorecard", scorecard.fingerprint[:16], "evidence.json")
        assert table is not None
        assert json.loads(table)["holdout"]["candidate"]["num_examples"] > 0
