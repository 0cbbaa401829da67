"""Laws of sampling: the distribution is the asked one, and a row depends on nothing but itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aifactory.engine.protocol import Sampling
from aifactory.engine.sampling import NOT_FINITE, Draws, SamplingBatch

NUM_DRAWS = 20_000
LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -torch.inf, 1.5, -3.0])


def frequencies(sampling, logits_V=LOGITS):
    rows = 100
    batch = SamplingBatch([sampling] * rows, [Draws(seed) for seed in range(rows)], device="cpu")
    logits_BV = logits_V.expand(rows, -1)
    ids = torch.cat([batch.choose(logits_BV) for _ in range(NUM_DRAWS // rows)])
    return torch.bincount(ids, minlength=logits_V.shape[0]) / NUM_DRAWS


def expected(sampling, logits_V=LOGITS):
    probabilities = (logits_V.double() / sampling.temperature).softmax(0)
    order = probabilities.argsort(descending=True)
    kept = order[: sampling.top_k] if sampling.top_k else order
    inside = torch.zeros_like(probabilities)
    inside[kept] = probabilities[kept]
    inside /= inside.sum()
    before = 0.0
    for index in order.tolist():
        share = inside[index].item()
        if before >= sampling.top_p:
            inside[index] = 0.0
        before += share
    return inside / inside.sum()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.7},
        {"top_k": 4, "top_p": 0.6},
        {"top_p": 1e-6},
        {"top_k": 99},
    ],
)
def test_frequencies_are_the_probabilities(settings):
    sampling = Sampling(**settings)

    assert torch.allclose(frequencies(sampling).double(), expected(sampling), atol=0.015)


def test_top_p_keeps_its_whole_share_of_a_flat_distribution():
    logits_V = torch.linspace(0.0, 0.5, 2000)
    sampling = Sampling(top_p=0.9)
    batch = SamplingBatch([sampling] * 500, [Draws(seed) for seed in range(500)], device="cpu")

    ids = torch.cat([batch.choose(logits_V.expand(500, -1)) for _ in range(20)])

    allowed = expected(sampling, logits_V) > 0
    assert bool(allowed[ids].all())
    assert len(set(ids.tolist())) > 1500


def test_greedy_takes_the_maximum_and_draws_nothing():
    draws = Draws(1)
    batch = SamplingBatch([Sampling(temperature=0.0)], [draws], device="cpu")

    assert batch.choose(LOGITS[None]).tolist() == [0]
    assert draws.next() == Draws(1).next()


def test_the_ith_draw_is_a_function_of_seed_and_i_by_a_counter():
    draws = Draws(123)
    stream = [draws.next() for _ in range(9)]

    for index, value in enumerate(stream):
        raw = np.random.Philox(key=123).random_raw(index + 1)[-1]
        assert value == (int(raw) >> 11) * 2.0**-53
    assert Draws(None).next() != Draws(None).next()


def test_a_row_does_not_depend_on_its_neighbours():
    torch.manual_seed(0)
    logits_BV = torch.randn(12, 900)
    settings = [
        {"temperature": (row % 4) * 0.5, "top_k": (0, 5, 1)[row % 3], "top_p": (1.0, 0.9)[row % 2]} for row in range(12)
    ]
    samplings = [Sampling(**setting) for setting in settings]
    batch = SamplingBatch(samplings, [Draws(row) for row in range(12)], device="cpu")
    together = [batch.choose(logits_BV).tolist() for _ in range(5)]

    for row, sampling in enumerate(samplings):
        alone = SamplingBatch([sampling], [Draws(row)], device="cpu")
        assert [alone.choose(logits_BV[row : row + 1]).item() for _ in range(5)] == [ids[row] for ids in together]


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.5}])
def test_a_row_that_is_not_finite_is_marked_and_the_others_are_chosen(settings):
    logits_BV = torch.stack([LOGITS, torch.full_like(LOGITS, torch.nan), LOGITS.masked_fill(LOGITS > 1, torch.inf)])
    batch = SamplingBatch([Sampling(**settings)] * 3, [Draws(row) for row in range(3)], device="cpu")

    ids = batch.choose(logits_BV).tolist()

    assert ids[0] >= 0
    assert ids[1:] == [NOT_FINITE, NOT_FINITE]


@pytest.mark.parametrize("temperature", [1e-30, 1e-46, 5e-324])
@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_a_temperature_near_zero_is_greedy_also_where_fp32_takes_it_for_zero(temperature, settings):
    batch = SamplingBatch([Sampling(temperature=temperature, **settings)], [Draws(0)], device="cpu")

    assert batch.choose(LOGITS.flip(0)[None]).tolist() == [len(LOGITS) - 1]
