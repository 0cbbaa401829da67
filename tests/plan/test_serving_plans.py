"""Laws of serving and ingestion plans."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from aifactory.config import Site
from aifactory.errors import ConfigError
from aifactory.plan.accelerators import ACCELERATORS
from aifactory.plan.decoding import Replica, load_of
from aifactory.plan.ingesting import FIXED_S, ingestion
from aifactory.plan.serving import ServingNeed, plan_serving
from aifactory.plan.shapes import PUBLISHED

EIGHT_B, SEVENTY_B = PUBLISHED["llama-3.1-8b"], PUBLISHED["llama-3.1-70b"]
H100 = ACCELERATORS["h100"]
REPLICA = Replica(shape=EIGHT_B, accelerator=H100)
SITE = Site()


def need(**changes: object) -> ServingNeed:
    return replace(ServingNeed(shape=EIGHT_B, users=1000, slots=64), **changes)


def test_a_decode_step_is_bound_by_what_is_read_and_a_long_prompt_by_products() -> None:
    fast_memory = replace(REPLICA, accelerator=replace(H100, bandwidth_gb_s=2 * H100.bandwidth_gb_s))
    fast_products = replace(REPLICA, accelerator=replace(H100, tflops=2 * H100.tflops))

    assert fast_memory.decode_s(1, 1000) < 0.6 * REPLICA.decode_s(1, 1000)
    assert fast_products.decode_s(1, 1000) == REPLICA.decode_s(1, 1000)
    assert fast_products.prefill_s(8000) == pytest.approx(REPLICA.prefill_s(8000) / 2)
    assert fast_memory.prefill_s(8000) == REPLICA.prefill_s(8000)


def test_many_at_once_are_bound_by_products() -> None:
    fast_memory = replace(REPLICA, accelerator=replace(H100, bandwidth_gb_s=100 * H100.bandwidth_gb_s))

    assert fast_memory.decode_s(2000, 10) > 10 * fast_memory.decode_s(1, 10)


def test_a_short_prompt_waits_for_the_host_of_the_projects_own_engine_alone() -> None:
    assert REPLICA.prefill_s(16) > 2 * replace(REPLICA, has_host_bound_prefill=False).prefill_s(16)
    assert REPLICA.prefill_s(16) == REPLICA.prefill_s(128)


def test_keys_and_values_fill_what_weights_leave() -> None:
    room = (H100.memory_bytes - 2 * EIGHT_B.parameters) * 0.9

    assert REPLICA.kv_tokens == int(room / (2 * 2 * 32 * 8 * 128))
    assert replace(REPLICA, shape=SEVENTY_B).kv_tokens == 0


def test_more_at_once_give_more_tokens_and_each_waits_longer() -> None:
    loads = [load_of(REPLICA, number, prompt_tokens=512, answer_tokens=256) for number in (1, 4, 16, 64)]

    for fewer, more in itertools.pairwise(loads):
        assert more.tokens_per_s > fewer.tokens_per_s
        assert more.token_s > fewer.token_s
        assert more.first_token_s > fewer.first_token_s


def test_littles_law_holds() -> None:
    load = load_of(REPLICA, 32, prompt_tokens=512, answer_tokens=256)
    stay = REPLICA.prefill_s(512) + 256 * load.token_s

    assert load.requests == pytest.approx(load.requests_per_s * stay, rel=0.01)


def test_replicas_carry_what_is_asked_at_the_load_that_is_wanted() -> None:
    plan = plan_serving(need(users=20_000), H100, SITE)

    assert plan.fits
    assert plan.replicas * plan.load.requests_per_s * 0.7 >= plan.requests_per_s
    assert (plan.replicas - 1) * plan.load.requests_per_s * 0.7 < plan.requests_per_s
    assert plan.requests_per_s == pytest.approx(20_000 * 12 / 3600)


@pytest.mark.parametrize("limit", [{"token_s": 0.012}, {"first_token_s": 0.035}])
def test_times_that_are_asked_for_are_kept_by_fewer_at_once(limit: dict[str, float]) -> None:
    free, bound = plan_serving(need(), H100, SITE), plan_serving(need(**limit), H100, SITE)

    assert bound.fits
    assert bound.load.requests < free.load.requests == 64
    assert bound.load.token_s <= limit.get("token_s", 1.0)
    assert bound.load.first_token_s <= limit.get("first_token_s", 1.0)
    assert "times that are asked for" in bound.reason


def test_a_time_that_nothing_keeps_says_what_one_request_takes() -> None:
    plan = plan_serving(need(token_s=1e-4), H100, SITE)

    assert not plan.fits
    assert "even one request at a time" in plan.reason


def test_long_answers_are_bound_by_memory() -> None:
    plan = plan_serving(need(prompt_tokens=60_000, answer_tokens=4_000), H100, SITE)

    assert plan.load.requests == plan.kv_tokens // 64_000 < 64
    assert "memory for keys and values" in plan.reason


def test_a_model_that_is_too_large_for_one_device_says_how_many_would_hold_it() -> None:
    one = plan_serving(need(shape=SEVENTY_B), H100, SITE)
    four = plan_serving(need(shape=SEVENTY_B, tensor=4), H100, SITE)

    assert not one.fits
    assert "--tensor 2 holds it, on another server" in one.reason
    assert plan_serving(need(shape=SEVENTY_B, tensor=2), H100, SITE).fits
    assert four.fits
    assert four.count == 4 * four.replicas


def test_of_experts_a_step_reads_those_that_somebody_meets() -> None:
    mixture = replace(REPLICA, shape=replace(EIGHT_B, experts=8, active_experts=2))
    mlp = 2 * EIGHT_B.layers * EIGHT_B.mlp_weights

    assert mixture.read_bytes(1) - replace(REPLICA).read_bytes(1) == pytest.approx(mlp, rel=1e-3)
    assert mixture.read_bytes(500) == pytest.approx(2 * (mixture.shape.block_weights + EIGHT_B.head_weights))


def test_several_devices_answer_faster_and_share_weights_and_cache() -> None:
    four = replace(REPLICA, tensor=4)

    assert four.weight_bytes * 4 == REPLICA.weight_bytes
    assert four.decode_s(8, 1000) < REPLICA.decode_s(8, 1000)
    assert four.kv_tokens > 4 * REPLICA.kv_tokens
    # There are 8 heads of keys: beyond them a cache is held again.
    assert replace(REPLICA, tensor=16).kv_bytes_per_token == replace(REPLICA, tensor=8).kv_bytes_per_token


@pytest.mark.parametrize(("name", "tensor"), [("h100", 3), ("h100", 16), ("cpu", 2)])
def test_replicas_that_can_not_be_spread_are_errors(name: str, tensor: int) -> None:
    with pytest.raises(ConfigError, match="--tensor"):
        plan_serving(need(tensor=tensor), ACCELERATORS[name], SITE)


def test_ingestion_goes_with_bytes_and_cpus_beyond_what_it_takes_in_any_case() -> None:
    one, two, twice = ingestion(1e12, 8), ingestion(1e12, 16), ingestion(2e12, 8)
    fixed = FIXED_S / 3600

    assert (one.hours - fixed) == pytest.approx(2 * (two.hours - fixed))
    assert (twice.hours - fixed) == pytest.approx(2 * (one.hours - fixed))
    assert twice.tokens == 2 * one.tokens
