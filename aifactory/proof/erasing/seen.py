"""Which models have seen rows that are meant."""

from __future__ import annotations

from aifactory.proof.erasing.search import Found
from aifactory.records.artifacts import Model
from aifactory.records.books import Books


def models_that_saw(books: Books, found: Found) -> list[Model]:
    """The models that were trained on such rows, on tokens of a tokenizer that was, or from such a model; oldest first."""
    every = [
        model for name in books.storage.names(Model.kind) if (model := books.artifacts.find(Model, name)) is not None
    ]
    saw: dict[str, Model] = {}
    for model in sorted(every, key=lambda each: each.record.created_at):
        for each in model.record.inputs:
            is_gone = each.startswith(("tokens/", "model/")) and books.artifacts.erased(each) is not None
            if each in found.tokens or each in saw or is_gone:
                saw[model.id] = model
    return list(saw.values())
