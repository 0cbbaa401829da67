"""A tiny tokenizer, packed rows, and runs of a tiny model on them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from aifactory.config import Architecture, Train
from aifactory.records.storage import Storage
from aifactory.text.documents import document_tokens
from aifactory.text.shards import shard_bytes
from aifactory.text.tokenizer import TextTokenizer, load_tokenizer
from aifactory.tokens.packing import Document, pack
from aifactory.tokens.vocabulary import train_vocabulary
from aifactory.train.work import RowSet, Stored, Work, exported
from aifactory.train.worker import work

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "größe", "日本語", "return", "x = 1"]
ROW_LEN = 32


class StoppedError(Exception):
    """What a test raises in the middle of a run."""


class Runs:
    """A storage root with a token set, and training runs below it."""

    def __init__(self, root: Path) -> None:
        self.storage = Storage(str(root))
        rng = random.Random(11)
        texts = [" ".join(rng.choice(WORDS) for _ in range(rng.randrange(3, 40))) for _ in range(90)]
        files = train_vocabulary(texts, vocab_size=300)
        for name, data in files.items():
            self.storage.write_bytes(data, "tokens", "a", "tokenizer", name)
        self.tokenizer_files = tuple(f"tokenizer/{name}" for name in sorted(files))
        self.tokenizer: TextTokenizer = load_tokenizer(root / "tokens" / "a" / "tokenizer")
        names = [self._write_shard(i, texts[i * 30 : (i + 1) * 30]) for i in range(3)]
        self.row_sets = (self.row_set(names[:2], 0.7), self.row_set(names[2:], 0.3))

    def _write_shard(self, index: int, texts: Sequence[str]) -> str:
        documents = []
        for i, text in enumerate(texts):
            ids, mask = document_tokens(self.tokenizer, prompt="" if i % 2 else "say it: ", text=text)
            documents.append(Document(row=f"{index}-{i}", ids=ids, loss_mask=mask))
        rows = pack(documents, row_len=ROW_LEN, vocab_size=300, pad_id=self.tokenizer.eos_id)
        return self.storage.write_bytes(shard_bytes(rows), "tokens", "a", f"shard-{index}.arrow").name

    def row_set(self, names: Sequence[str], share: float) -> RowSet:
        return RowSet(shards=Stored(folder=("tokens", "a"), names=tuple(names)), share=share)

    def work(self, name: str, *, dropout: float = 0.1, changes: dict[str, Any] | None = None, **recipe: Any) -> Work:
        task = Work(
            storage=self.storage,
            run_folder=("runs", name),
            model_folder=("model", name),
            recipe=Train(
                **{
                    "max_steps": 10,
                    "global_batch_rows": 4,
                    "learning_rate": 1e-2,
                    "warmup_steps": 2,
                    "precision": "fp32",
                    **recipe,
                }
            ),
            architecture=Architecture(
                hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, context_length=64, dropout=dropout
            ),
            base=None,
            tokenizer=Stored(folder=("tokens", "a"), names=self.tokenizer_files),
            row_sets=self.row_sets,
            micro_batch_rows=2,
            checkpoint_every_steps=3,
            num_threads=1,
        )
        return replace(task, **(changes or {}))

    def run(self, task: Work, *, stop_after: int | None = None) -> None:
        def after_step(done: int) -> None:
            if done == stop_after:
                raise StoppedError(done)

        work(task, device=torch.device("cpu"), after_step=after_step)

    def folder(self, task: Work) -> Path:
        return Path(self.storage.path(*task.model_folder))

    def weights(self, task: Work) -> dict[str, torch.Tensor]:
        return load_file(self.folder(task) / "model.safetensors")

    def figures(self, task: Work) -> dict[str, Any]:
        found = exported(self.storage, task.run_folder)
        assert found is not None
        return dict(found["figures"])

    def files(self, task: Work) -> dict[str, bytes]:
        folder = self.folder(task)
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="session")
def stopped() -> type[StoppedError]:
    return StoppedError


@pytest.fixture(scope="session")
def uninterrupted(runs: Runs) -> Work:
    """The run that all others are compared with: dropout, two row sets, a checkpoint every three steps."""
    task = runs.work("uninterrupted")
    runs.run(task)
    return task


@pytest.fixture(scope="session")
def largest_difference(runs: Runs) -> Callable[[Work, Work], float]:
    """Between the weights of two models: the norm of the difference of a matrix, relative to its own."""

    def compare(one: Work, two: Work) -> float:
        a, b = runs.weights(one), runs.weights(two)
        assert a.keys() == b.keys()
        return max(float((a[name] - b[name]).norm() / a[name].norm()) for name in a)

    return compare
