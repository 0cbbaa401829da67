"""The mixture: which share of a batch each source gives, and how often its rows are read for it.

Source   Chung et al. 2023, "UniMax: Fairer and More Effective Language Sampling for Large-Scale Multilingual Pretraining",
         arXiv:2304.09151, section 3: a cap on epochs, and what lies above it shared out among the others, by their weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aifactory.errors import ConfigError

if TYPE_CHECKING:
    from aifactory.config import SourceShare


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """What a run reads of one source."""

    share: float
    """Of the rows of a batch that are mixed; all shares add up to 1."""
    epochs: float
    """How often each of its packed rows is read, on average."""


def mix(rows: Mapping[str, int], mixture: Mapping[str, SourceShare], *, draws: float) -> dict[str, Drawn]:
    """The shares of sources with so many packed rows, in a run that reads `draws` rows in all.

    Without a mixture each source gives as many rows as it has. A source without rows, or with weight 0, is left out.
    Raises   ConfigError where the sources may not be read so often that they give `draws` rows.
    """
    if mixture and (unknown := sorted(set(rows) - set(mixture))):
        raise ConfigError(
            f"expected train.mixture to name every source of the corpus, found none for {unknown}; add them."
        )
    # By name: the order of the sets counts in the order of the rows, and records keep no order.
    sizes = {name: count for name, count in sorted(rows.items()) if count and (not mixture or mixture[name].weight)}
    weights = {name: mixture[name].weight if mixture else float(count) for name, count in sizes.items()}
    most = {name: _cap(mixture.get(name), count) for name, count in sizes.items()}
    if sum(most.values()) < draws * (1 - 1e-9):
        raise ConfigError(
            f"expected sources of train.mixture that give {draws:,.0f} packed rows, found {sum(most.values()):,.0f} within "
            "their max_epochs; lower train.max_steps or raise max_epochs."
        )
    given: dict[str, float] = {}
    while len(given) < len(sizes):
        left, open_weight = draws - sum(given.values()), sum(weights[name] for name in sizes if name not in given)
        wanted = {name: left * weights[name] / open_weight for name in sizes if name not in given}
        full = {name: most[name] for name, count in wanted.items() if count > most[name]}
        given |= full or wanted
    return {name: Drawn(share=given[name] / draws, epochs=given[name] / count) for name, count in sizes.items()}


def _cap(share: SourceShare | None, count: int) -> float:
    if share is None or share.max_epochs is None:
        return float("inf")
    return share.max_epochs * count
