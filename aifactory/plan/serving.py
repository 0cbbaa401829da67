"""ServingPlan: how many accelerators answer so many users, how fast, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

from aifactory.config import Site
from aifactory.errors import ConfigError
from aifactory.plan.accelerators import Accelerator
from aifactory.plan.decoding import Load, Replica, load_of
from aifactory.plan.footprint import Footprint, footprint
from aifactory.plan.shapes import ModelShape

TENSORS = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingNeed:
    """Who asks how often, how long questions and answers are, and how fast they are to come."""

    shape: ModelShape
    users: float
    requests_per_user_hour: float = 12.0
    prompt_tokens: int = 512
    answer_tokens: int = 256
    first_token_s: float | None = None
    """Longest mean time to the first token, at a replica whose slots are full."""
    token_s: float | None = None
    """Longest mean time from a token to the next."""
    slots: int = 16
    """Requests that a replica decodes at once, at most (`runtime.endpoint.slots`)."""
    load: float = 0.7
    """Share of a replica's most requests a second that it is to be given, so that queues stay short."""
    bytes_per_weight: int = 2
    tensor: int = 1
    """Devices of a replica. The factory's own engines hold a model on one."""
    engine: Literal["torch", "vllm"] = "torch"

    @property
    def requests_per_s(self) -> float:
        return self.users * self.requests_per_user_hour / 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingPlan:
    """Replicas of one accelerator."""

    accelerator: str
    fits: bool
    reason: str
    """What is not to be had, where it does not fit; else what bounds it."""
    tensor: int
    replicas: int
    count: int
    weight_bytes: float
    memory_bytes: float
    kv_tokens: int
    """Of a replica: tokens that there is room for."""
    kv_bytes_per_token: float
    load: Load
    """Of a replica whose slots are full."""
    requests_per_s: float
    """That are asked of all."""
    day: Footprint
    """Of 24 hours."""
    answer_tokens_per_day: float


def plan_serving(need: ServingNeed, accelerator: Accelerator, site: Site) -> ServingPlan:
    """With `fits` false, and why, where a replica does not hold the model or is too slow.

    Raises   ConfigError where a replica would be larger than a node, or its heads don't come out even.
    """
    if need.tensor > 1 and accelerator.kind == "cpu":
        raise ConfigError(f"expected --tensor 1 on {accelerator.name}, found {need.tensor}; leave it out.")
    if need.tensor > accelerator.per_node or need.shape.heads % need.tensor:
        raise ConfigError(
            f"expected --tensor to divide the model's {need.shape.heads} heads and to be at most {accelerator.per_node}, the "
            f"{accelerator.name} of a node, found {need.tensor}; change it."
        )
    return _with(need, accelerator, need.tensor, site)


def _with(need: ServingNeed, accelerator: Accelerator, tensor: int, site: Site) -> ServingPlan:
    replica = Replica(
        shape=need.shape,
        accelerator=accelerator,
        tensor=tensor,
        bytes_per_weight=need.bytes_per_weight,
        bytes_per_kv=need.bytes_per_weight,
        has_host_bound_prefill=need.engine == "torch",
    )
    whole = need.prompt_tokens + need.answer_tokens
    most = min(need.slots, replica.kv_tokens // whole)
    reason = ""
    if most < 1:
        needed = replica.weight_bytes + whole * replica.kv_bytes_per_token
        reason = f"weights and one request need {needed / 1e9:.1f} GB on each of {tensor}, and there are {accelerator.memory_gb:g}"
        enough = [each for each in TENSORS if each > tensor and _holds(need, accelerator, each)]
        if enough and accelerator.kind == "gpu":
            reason += (
                f"; --tensor {enough[0]} holds it, on another server: the factory's engines take one device a replica"
            )
    load = _largest(need, replica, max(1, most))
    if not reason and load is None:
        alone = load_of(replica, 1, prompt_tokens=need.prompt_tokens, answer_tokens=need.answer_tokens)
        reason = (
            f"even one request at a time takes {alone.first_token_s * 1e3:.1f} ms to its first token and "
            f"{alone.token_s * 1e3:.1f} ms a token"
        )
    fits = not reason
    load = load or load_of(replica, 1, prompt_tokens=need.prompt_tokens, answer_tokens=need.answer_tokens)
    replicas = max(1, ceil(need.requests_per_s / (load.requests_per_s * need.load)))
    return ServingPlan(
        accelerator=accelerator.name,
        fits=fits,
        reason=reason or _bound(need, replica, load, most),
        tensor=tensor,
        replicas=replicas,
        count=replicas * tensor,
        weight_bytes=replica.weight_bytes,
        memory_bytes=accelerator.memory_bytes,
        kv_tokens=replica.kv_tokens,
        kv_bytes_per_token=replica.kv_bytes_per_token,
        load=load,
        requests_per_s=need.requests_per_s,
        day=footprint(accelerator, replicas * tensor, 24.0, site),
        answer_tokens_per_day=need.requests_per_s * need.answer_tokens * 86_400,
    )


def _holds(need: ServingNeed, accelerator: Accelerator, tensor: int) -> bool:
    if need.shape.heads % tensor or tensor > accelerator.per_node:
        return False
    weights = need.bytes_per_weight
    replica = Replica(
        shape=need.shape, accelerator=accelerator, tensor=tensor, bytes_per_weight=weights, bytes_per_kv=weights
    )
    return replica.kv_tokens >= need.prompt_tokens + need.answer_tokens


def _largest(need: ServingNeed, replica: Replica, most: int) -> Load | None:
    """The most requests at once of which each is answered fast enough; both times grow with their number."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        load = load_of(replica, middle, prompt_tokens=need.prompt_tokens, answer_tokens=need.answer_tokens)
        late = need.token_s is not None and load.token_s > need.token_s
        late = late or (need.first_token_s is not None and load.first_token_s > need.first_token_s)
        low, high = (low, middle - 1) if late else (middle, high)
    if low == 0:
        return None
    return load_of(replica, low, prompt_tokens=need.prompt_tokens, answer_tokens=need.answer_tokens)


def _bound(need: ServingNeed, replica: Replica, load: Load, most: int) -> str:
    prefill = load.requests * replica.prefill_s(need.prompt_tokens)
    decode = need.answer_tokens * replica.decode_s(load.requests, need.prompt_tokens + need.answer_tokens / 2)
    spent = "prompts" if prefill > decode else "decode steps"
    if load.requests < most:
        what = "the times that are asked for"
    elif most < need.slots:
        what = "memory for keys and values"
    else:
        what = "runtime.endpoint.slots"
    share = max(prefill, decode) / (prefill + decode)
    return f"{what} bound the requests at once; {share:.0%} of a replica's time are {spent}"
