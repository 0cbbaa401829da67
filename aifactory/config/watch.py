"""The section `improve.prompts`: how the prompts of users are watched."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from aifactory.config.section import Section


class PromptWatch(Section):
    """What users ask is compared with what they asked of the same release at first, by a sequence that holds at every look.

    Each prompt is looked at in several ways, among which the stake of the bets is shared equally."""

    of: tuple[Literal["length", "trigrams", "distance", "language"], ...] = Field(
        default=("length", "trigrams", "distance", "language"), min_length=1
    )
    """What is watched: its length; how much its character trigrams surprise who knows those of the first prompts; how far it is from
    the nearest of those by words and pairs of words; its language. Default: all four."""

    reference: int = Field(default=400, ge=50)
    """So many first prompts of a release, or since its last retrain ended, say what is usual: half of them how frequent each
    trigram is, half what the others are compared with. Default: 400."""
    confidence: float = Field(default=0.99, gt=0.5, lt=1)
    """Confidence that prompts are others than at first, however often it is looked at, before it is said. Default: 0.99."""
    retrain: bool = False
    """Whether that is a reason to retrain as answers below the standard are, once there is new feedback. Default: false, it is
    said and no more: other prompts may be answered as well."""
