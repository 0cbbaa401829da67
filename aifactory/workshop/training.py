"""A training, before there is a run of it: what identifies the model, and which rows are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aifactory.config import Architecture, Train
from aifactory.records.artifacts import Model, TokenSet
from aifactory.workshop.bench import Identity

if TYPE_CHECKING:
    from aifactory.train.mixture import Drawn


@dataclass(frozen=True, kw_only=True)
class Training:
    """One model that is asked for."""

    token_sets: Sequence[TokenSet]
    shares: Sequence[float]
    """Of each token set in a batch; they add up to 1."""
    recipe: Train
    base: Model | Path | None
    """What training starts from; none: from scratch."""
    architecture: Architecture
    """Of a model from scratch."""

    @cached_property
    def identity(self) -> Identity[Model]:
        """What identifies the model."""
        from aifactory.train.trainer import CODE_VERSION

        contents: list[str] = []
        if isinstance(self.base, Path):
            from aifactory.train.base import digest_folder

            contents = [digest_folder(self.base)]
        plain: dict[str, Any] = {"train": self.recipe.model_dump(mode="json"), "shares": list(self.shares)}
        if self.base is None:
            plain["architecture"] = self.architecture.model_dump(mode="json")
        inputs = [*self.token_sets, *([self.base] if isinstance(self.base, Model) else [])]
        return Identity(noun=Model, code_version=CODE_VERSION, recipe=plain, contents=contents, inputs=inputs)

    def drawn(self) -> list[tuple[TokenSet, list[str], Drawn]]:
        """What is read in a run: shards of each token set, or of each source where the sources are mixed by weight."""
        from aifactory.tokens.pipeline import shard_names
        from aifactory.train.mixture import Drawn, mix

        recipe, drawn = self.recipe, []
        for number, (tokens, share) in enumerate(zip(self.token_sets, self.shares, strict=True)):
            draws = share * recipe.max_steps * recipe.global_batch_rows
            if number or not recipe.mixture:
                found = Drawn(share=share, epochs=draws / tokens.num_rows)
                drawn.append((tokens, shard_names(tokens.record.files), found))
                continue
            for source, of_set in mix(tokens.figures["packed_rows_of"], recipe.mixture, draws=draws).items():
                found = Drawn(share=share * of_set.share, epochs=of_set.epochs)
                drawn.append((tokens, tokens.figures["shards_of"][source], found))
        return drawn
