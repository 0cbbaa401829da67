"""A model's card and the picture of its losses, where they lie: beside the model, in no digest."""

from __future__ import annotations

from pathlib import Path

from aifactory.model_card import CARD, CHART, model_card
from aifactory.records.artifacts import Corpus, Model, Scorecard, TokenSet
from aifactory.records.books import Books


def write_card(books: Books, model: Model, scorecard: Scorecard | None = None) -> None:
    """Write what a person reads of a model; without a scorecard only where there is no card yet."""
    from aifactory.train.loss_chart import loss_chart

    config, storage = books.config, books.storage
    folder = books.artifacts.folder(model.kind, model.fingerprint)
    old = storage.read_bytes(*folder, CARD)
    if old is not None and scorecard is None:
        return
    inputs = model.record.inputs
    token_sets = [books.artifacts.get(TokenSet, each) for each in inputs if each.startswith(TokenSet.kind)]
    parent = next((each for each in inputs if each.startswith(Model.kind)), None)
    recipes = [recipe.model_dump(mode="json") for recipe in config.train.recipes()]
    card = model_card(
        config.name,
        model,
        corpora=[books.artifacts.left_of(Corpus, tokens.record.inputs[0]) for tokens in token_sets],
        scorecard=scorecard,
        base=None if "architecture" in model.record.recipe else public_name(config.model.base),
        parent=parent,
        num_candidates=len(recipes) if model.record.recipe["train"] in recipes else 1,
        licenses={source.name: source.license for source in config.ingest.sources if source.license},
    ).encode()
    if card != old:
        if curve := model.figures.get("curve"):
            storage.write_bytes(loss_chart([(step, loss) for step, loss in curve]).encode(), *folder, CHART)
        storage.write_bytes(card, *folder, CARD)


def public_name(base: str | None) -> str | None:
    """A hub id as it is; of a folder the last part alone, as a card goes where the folder does not."""
    folder = None if base is None else Path(base).expanduser()
    return folder.resolve().name if folder is not None and folder.is_dir() else base
