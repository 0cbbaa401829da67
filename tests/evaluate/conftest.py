"""Tiny models, corpora and scorecards, made in this process."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus_rows import as_rows, corpus_table, write_parts
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from aifactory.engine.golden import GOLDEN_NAME, golden_answers
from aifactory.records.artifacts import ArtifactStore, Corpus, Model, Record, digest_of
from aifactory.records.storage import Storage, StoredFile
from aifactory.text.tokenizer import TextTokenizer
from aifactory.tokens.vocabulary import train_vocabulary

WORDS = ["the", "quick", "brown", "fox", "größe", "日本語", "return", "x = 1", "for", "in"]
CONTEXT = 96


def random_text(rng: random.Random, num_lines: int) -> str:
    return "".join(" ".join(rng.choice(WORDS) for _ in range(rng.randrange(2, 9))) + "\n" for _ in range(num_lines))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer_files() -> dict[str, bytes]:
    rng = random.Random(1)
    return train_vocabulary([random_text(rng, 30) for _ in range(5)], vocab_size=300)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_files: dict[str, bytes]) -> TextTokenizer:
    return TextTokenizer(tokenizer_files["tokenizer.json"])


@pytest.fixture(scope="session")
def make_model() -> Callable[[int], PreTrainedModel]:
    """A model with weights of its own for each seed, wide apart."""

    def make(seed: int) -> PreTrainedModel:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=300,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=CONTEXT,
            initializer_range=0.1,
            bos_token_id=0,
            eos_token_id=0,
        )
        return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(Storage(str(tmp_path / "storage")))


def publish(store: ArtifactStore, noun: Any, number: int, files: Sequence[StoredFile]) -> Any:
    record = Record(
        kind=noun.kind,
        fingerprint=f"{number:016x}" + "0" * 48,
        digest=digest_of(files),
        code_version=1,
        recipe={},
        inputs=[],
        files=list(files),
        figures={},
    )
    return store.publish(noun, record)


@pytest.fixture
def publish_model(
    store: ArtifactStore, tmp_path: Path, tokenizer: TextTokenizer, tokenizer_files: dict[str, bytes]
) -> Callable[[int, PreTrainedModel], Model]:
    def make(number: int, model: PreTrainedModel) -> Model:
        folder = tmp_path / f"model-{number}"
        model.save_pretrained(folder)
        for name, data in tokenizer_files.items():
            (folder / name).write_bytes(data)
        (folder / GOLDEN_NAME).write_bytes(golden_answers(model, tokenizer))
        files = store.storage.upload(folder, *store.folder("model", f"{number:016x}"))
        return publish(store, Model, number, files)

    return make


@pytest.fixture
def publish_corpus(store: ArtifactStore) -> Callable[..., tuple[Corpus, list[Any]]]:
    """A corpus of random texts; with `users`, of prompts and answers of so many users; `as_chats`, of turns."""

    def make(
        number: int,
        *,
        num_rows: int = 40,
        users: int = 0,
        num_lines: int = 30,
        labels: Sequence[str] = ("",),
        as_chats: bool = False,
    ) -> tuple[Corpus, list[Any]]:
        rng = random.Random(number)

        def asked() -> dict[str, str]:
            prompt = random_text(rng, 2) if users else ""
            return {"messages": json.dumps([{"role": "user", "content": prompt}])} if as_chats else {"prompt": prompt}

        table = corpus_table(
            [
                {
                    "origin": f"{i}.txt",
                    **asked(),
                    "text": random_text(rng, rng.randrange(2, 4) if users else num_lines),
                    "user": f"user-{i % users}" if users else "",
                    "label": labels[i % len(labels)],
                }
                for i in range(num_rows)
            ],
            source="feedback" if users else "docs",
            keyed_by_file=not users,
            holdout_share=0.4,
        )
        files = write_parts(store.storage, table, *store.folder("corpus", f"{number:016x}"))
        return publish(store, Corpus, number, files), as_rows(table)

    return make
