"""Laws of training plans: what fits, how it is spread, how time and cost go with the number of accelerators."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from aifactory.config import Site
from aifactory.errors import ConfigError
from aifactory.plan import calibration
from aifactory.plan.accelerators import ACCELERATORS
from aifactory.plan.footprint import footprint, from_energy
from aifactory.plan.layout import Layout, Step
from aifactory.plan.memory import kept_bytes, memory_of
from aifactory.plan.shapes import PUBLISHED
from aifactory.plan.step_time import collective_s, step_time, work_of
from aifactory.plan.training import TrainingNeed, counts_of, least_count, plan_training

EIGHT_B = PUBLISHED["llama-3.1-8b"]
ONE_B = PUBLISHED["llama-3.2-1b"]
H100 = ACCELERATORS["h100"]
STEP = Step(row_len=4096, micro_batch_rows=4, is_compiled=True)
SITE = Site()


def need(**changes: object) -> TrainingNeed:
    return replace(TrainingNeed(shape=EIGHT_B, steps=1000, global_batch_rows=256, step=STEP), **changes)


# ── what fits ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_fits_as_it_is_configured_stays_as_it_is() -> None:
    plan = plan_training(need(shape=ONE_B), H100, 8, SITE)

    assert plan.fits
    assert plan.changes == ()
    assert plan.step.micro_batch_rows == 4
    assert plan.layout.shard == "ddp"


def test_what_does_not_fit_is_made_to_fit_and_says_how() -> None:
    plan = plan_training(need(), H100, 8, SITE)

    assert plan.fits
    assert "runtime.parallel=fsdp" in plan.changes
    assert plan.memory.total * calibration.MEMORY_MARGIN <= plan.memory_bytes


def test_what_can_be_had_in_no_way_says_so() -> None:
    plan = plan_training(need(), H100, 1, SITE)

    assert not plan.fits
    assert plan.memory.total * calibration.MEMORY_MARGIN > plan.memory_bytes


def test_every_plan_that_fits_has_the_asked_batch() -> None:
    for count in counts_of(need()):
        plan = plan_training(need(), ACCELERATORS["h200"], count, SITE)
        rows = plan.layout.data * plan.step.micro_batches * plan.step.micro_batch_rows
        assert rows == 256, count


def test_the_least_count_fits_and_half_of_it_does_not() -> None:
    plan = least_count(need(), H100, SITE, hours=None)

    assert plan.fits
    assert not plan_training(need(), H100, plan.count // 2, SITE).fits


def test_the_least_count_for_a_day_is_in_time_and_half_of_it_is_not() -> None:
    hours = least_count(need(), H100, SITE, hours=None).hours / 5
    plan = least_count(need(), H100, SITE, hours=hours)

    assert plan.hours <= hours
    assert plan_training(need(), H100, plan.count // 2, SITE).hours > hours


@pytest.mark.parametrize(
    ("changes", "count", "expected"),
    [
        ({"tensor": 4}, 6, "multiple of tensor x pipeline"),
        ({}, 512, "at most 256 accelerators"),
        ({"tensor": 16}, 16, "within a node of 8"),
        ({"tensor": 3}, 3, "divide the model's 32 heads"),
        ({"pipeline": 64}, 64, "at most its 32 layers"),
    ],
)
def test_what_can_not_be_spread_is_an_error_that_says_what_can(
    changes: dict[str, int], count: int, expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        plan_training(need(**changes), H100, count, SITE)


# ── memory ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_states_take_sixteen_bytes_a_weight_and_are_shared_by_fsdp_alone() -> None:
    small = replace(STEP, micro_batch_rows=1, row_len=8, micro_batches=2)
    alone = memory_of(EIGHT_B, Layout(), small, H100)
    shared = memory_of(EIGHT_B, Layout(data=8, shard="fsdp"), small, H100)
    copied = memory_of(EIGHT_B, Layout(data=8), small, H100)

    assert alone.states == 16 * EIGHT_B.parameters
    assert copied.states == alone.states
    assert shared.states == pytest.approx(alone.states / 8)


def test_hybrid_sharding_spreads_over_its_groups_alone() -> None:
    layout = Layout(data=64, shard="fsdp", shard_groups=8)

    assert memory_of(EIGHT_B, layout, STEP, H100).states == pytest.approx(
        memory_of(EIGHT_B, Layout(data=8, shard="fsdp"), STEP, H100).states
    )


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("residual_bytes", [2, 4])
def test_what_is_computed_again_is_not_kept(is_compiled: bool, residual_bytes: int) -> None:
    step = replace(STEP, is_compiled=is_compiled, residual_bytes=residual_bytes)

    kept = [kept_bytes(EIGHT_B, step, how) for how in ("none", "selective", "full")]
    assert kept == sorted(kept, reverse=True)
    assert kept[2] == residual_bytes * EIGHT_B.hidden


def test_pieces_bound_what_logits_take_however_many_rows_there_are() -> None:
    few, many = (memory_of(ONE_B, Layout(), replace(STEP, micro_batch_rows=rows), H100).loss for rows in (4, 64))
    plain = memory_of(ONE_B, Layout(), replace(STEP, micro_batch_rows=64, loss="plain"), H100).loss

    assert few == many
    assert plain > 20 * many


def test_tensor_and_pipeline_divide_what_a_device_holds() -> None:
    small = replace(STEP, micro_batch_rows=1, micro_batches=8)
    one = memory_of(EIGHT_B, Layout(), small, H100)
    tensor = memory_of(EIGHT_B, Layout(tensor=8), small, H100)
    pipeline = memory_of(EIGHT_B, Layout(pipeline=8), small, H100)

    assert tensor.total == pytest.approx(one.total / 8)
    # The first stage keeps as many micro-batches as there are stages, so activations don't shrink.
    assert pipeline.states < one.states / 5
    assert pipeline.activations == pytest.approx(one.activations)


def test_adapters_have_optimiser_states_of_their_own_alone() -> None:
    thin = replace(STEP, trained_share=0.01, micro_batches=2)

    assert memory_of(EIGHT_B, Layout(), thin, H100).states == pytest.approx((4 + 0.12) * EIGHT_B.parameters)


# ── time ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [name for name, chip in ACCELERATORS.items() if chip.kind == "gpu"])
def test_twice_as_many_are_no_slower_and_less_than_twice_as_fast(name: str) -> None:
    plans = [plan_training(need(shape=ONE_B), ACCELERATORS[name], count, SITE) for count in counts_of(need())]

    for fewer, more in itertools.pairwise(plans):
        assert more.hours <= fewer.hours
        # Where there is room for more rows, or for what was computed again, more than twice as many is won.
        if more.changes == fewer.changes and fewer.layout.data > 1:
            assert fewer.hours <= 2.0001 * more.hours


def test_parts_of_a_step_add_up_to_it() -> None:
    layout = Layout(data=4, tensor=2, pipeline=2, shard="fsdp")
    time = step_time(EIGHT_B, layout, replace(STEP, micro_batches=8), H100)
    parts = (
        time.products_s,
        time.attention_s,
        time.elementwise_s,
        time.host_s,
        time.update_s,
        time.exchange_s,
        time.pipeline_s,
        time.crowded_s,
    )

    assert time.total == pytest.approx(sum(parts))
    assert min(parts) >= 0


def test_no_plan_is_faster_than_the_peak() -> None:
    for count in (1, 8, 64):
        for name in ("h100", "a100", "b200", "l40s", "mi300x"):
            plan = plan_training(need(shape=ONE_B), ACCELERATORS[name], count, SITE)
            assert 0.1 < plan.mfu < 0.75, (name, count)


def test_a_pipeline_waits_less_the_more_micro_batches_and_parts_there_are() -> None:
    def waited(micro_batches: int, parts: int) -> float:
        layout = Layout(pipeline=8, virtual_stages=parts)
        time = step_time(EIGHT_B, layout, replace(STEP, micro_batches=micro_batches), H100)
        return time.pipeline_s / time.total

    assert waited(8, 1) == pytest.approx((7 / 8) / (1 + 7 / 8), rel=0.02)
    assert waited(8, 4) < waited(8, 1)
    assert waited(64, 1) < waited(8, 1)


def test_activations_that_are_computed_again_cost_a_third_of_the_products_of_blocks() -> None:
    none, full = (work_of(EIGHT_B, Layout(), replace(STEP, activations=how)) for how in ("none", "full"))

    assert full.product_flops - none.product_flops == 2 * EIGHT_B.active_block_weights * STEP.micro_tokens


def test_frozen_weights_need_no_gradient() -> None:
    all_, thin = (work_of(EIGHT_B, Layout(), replace(STEP, trained_share=share)) for share in (1.0, 0.0))

    assert thin.product_flops / all_.product_flops == pytest.approx(4 / 6)


def test_documents_cost_less_attention_than_rows_and_a_mask_more() -> None:
    documents, rows, mask = (
        work_of(EIGHT_B, Layout(), step).attention_flops
        for step in (replace(STEP, document_tokens=512), STEP, replace(STEP, attention="mask"))
    )

    assert documents * 8 == rows
    assert mask == 2 * rows


def test_what_crosses_between_nodes_goes_by_all_their_networks() -> None:
    inside = collective_s(1e9, 8, 1, H100)
    between = collective_s(1e9, 64, 1, H100)
    thin = collective_s(1e9, 8, 8, H100)

    assert inside == pytest.approx(1e9 * 7 / 8 / 450e9 / calibration.LINK_SHARE)
    assert between == pytest.approx(1e9 * 7 / 8 / (8 * 50e9) / calibration.LINK_SHARE)
    assert thin == pytest.approx(1e9 * 7 / 8 / 50e9 / calibration.LINK_SHARE)
    assert collective_s(1e9, 1, 1, H100) == 0


def test_slow_links_make_fsdp_wait() -> None:
    layout, step = Layout(data=8, shard="fsdp"), replace(STEP, micro_batch_rows=1)
    slow = step_time(EIGHT_B, layout, step, replace(H100, link_gb_s=10))

    assert slow.exchange_s > 5 * step_time(EIGHT_B, layout, step, H100).exchange_s


def test_a_power_limit_slows_products_by_its_third_root() -> None:
    limited = replace(H100, power_limit_watts=350)

    times = [step_time(EIGHT_B, Layout(), STEP, chip) for chip in (H100, limited)]
    assert times[1].products_s / times[0].products_s == pytest.approx(2 ** (1 / 3))
    assert times[1].elementwise_s == times[0].elementwise_s


def test_a_tiny_model_waits_for_the_host() -> None:
    tiny = replace(ONE_B, hidden=64, intermediate=128, heads=2, kv_heads=2, head_dim=32, vocab=512)
    time = step_time(tiny, Layout(), replace(STEP, micro_batch_rows=1, row_len=64), H100)

    assert time.host_s > 0.9 * time.total


def test_interruptions_go_with_accelerators_and_hours_and_cost_half_an_interval() -> None:
    often = plan_training(need(steps=200_000, checkpoint_every_steps=10), H100, 256, SITE)
    seldom = plan_training(need(steps=200_000, checkpoint_every_steps=2000), H100, 256, SITE)

    assert often.interruptions == pytest.approx(256 * often.hours / calibration.HOURS_PER_INTERRUPTION)
    assert seldom.hours > often.hours > 200_000 * often.step_s / 3600


# ── cost ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_footprint_is_hours_times_power_times_factors() -> None:
    site = Site(prices={"h100": 2.0}, price_per_kwh=0.1, pue=1.5, carbon_kg_per_kwh=0.4, water_litres_per_kwh=2.0)
    used = footprint(H100, 10, 100.0, site)

    assert used.accelerator_hours == 1000
    assert used.machine_kwh == pytest.approx(1000 * (700 + 575) / 1e3)
    assert used.kwh == pytest.approx(1.5 * used.machine_kwh)
    assert used.litres == pytest.approx(2 * used.machine_kwh)
    assert used.tonnes_co2 == pytest.approx(0.4 * used.kwh / 1e3)
    assert used.money == pytest.approx(2 * 1000 + 0.1 * used.kwh)


def test_without_a_price_there_is_no_money() -> None:
    assert footprint(H100, 1, 1.0, Site()).money is None
    assert footprint(H100, 1, 1.0, Site(prices={"a100": 1.0})).money is None
    assert from_energy(1.0, Site(price_per_kwh=0.2)).money == pytest.approx(0.2 * 1.56)
