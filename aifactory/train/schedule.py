"""The learning rate of each step. Pure Python."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aifactory.config import Train


def learning_rate(recipe: Train, step: int) -> float:
    """The rate of step `step`, which counts from 0: linear warm-up to the peak, then as `recipe.schedule` says.

    cosine, linear   down to `final_lr_share` of the peak at the last step (Loshchilov & Hutter 2017, SGDR, arXiv:1608.03983,
                     section 3, one period)
    wsd              the peak, and down linearly over the last `decay_share` of all steps: warm-up, stable, decay (Hu et al.
                     2024, MiniCPM, arXiv:2404.06395, section 4.2; its decay is exponential, a linear one did better in
                     Haegele et al. 2024, arXiv:2405.18392, section 3)
    """
    peak, end = recipe.learning_rate, recipe.learning_rate * recipe.final_lr_share
    if step < recipe.warmup_steps:
        return peak * (step + 1) / recipe.warmup_steps
    start, last = recipe.warmup_steps, recipe.max_steps - 1
    if recipe.schedule == "wsd":
        start = max(start, recipe.max_steps - max(1, round(recipe.decay_share * recipe.max_steps)))
    done = min(1.0, max(0.0, (step - start) / max(1, last - start)))
    if recipe.schedule == "cosine":
        done = 0.5 * (1 - math.cos(math.pi * done))
    return peak + (end - peak) * done
