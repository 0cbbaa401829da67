"""TrainingPlan: whether a run fits, on how many of which accelerators, spread in which way, how long it takes, and what it costs.

Where it does not fit as it is configured, the fastest of the ways is taken that change no result: fewer rows in a micro-batch, FSDP
in the place of DDP, activations that are computed again. What was changed is told.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from aifactory.config import Site
from aifactory.errors import ConfigError
from aifactory.plan import calibration
from aifactory.plan.accelerators import Accelerator
from aifactory.plan.footprint import Footprint, footprint
from aifactory.plan.layout import Activations, Layout, Shard, Step, spread
from aifactory.plan.memory import Memory, memory_of
from aifactory.plan.shapes import ModelShape
from aifactory.plan.step_time import StepTime, step_time

MOST = 16_384
"""Accelerators that are looked at."""
_MILDER: tuple[Activations, ...] = ("none", "selective", "full")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingNeed:
    """A run, in the terms of the configuration."""

    shape: ModelShape
    steps: int
    global_batch_rows: int
    step: Step
    """As configured; `micro_batches` follows from the layout."""
    shard: Shard = "ddp"
    shard_groups: int | None = None
    tensor: int = 1
    pipeline: int = 1
    checkpoint_every_steps: int = 100

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_rows * self.step.row_len

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """A run on so many of one accelerator."""

    accelerator: str
    count: int
    layout: Layout
    fits: bool
    changes: Sequence[str]
    """What is not as configured, so that it fits."""
    step: Step
    memory: Memory
    memory_bytes: float
    """Of one accelerator."""
    time: StepTime
    step_s: float
    tokens_per_s: float
    mfu: float
    """By the convention of `aifactory/train/flops.py`."""
    interruptions: float
    hours: float
    """With what interruptions cost; without queues, evaluations and whatever goes wrong."""
    footprint: Footprint


def plan_training(need: TrainingNeed, accelerator: Accelerator, count: int, site: Site) -> TrainingPlan:
    """On exactly so many. Where nothing fits, the plan that comes nearest, with `fits` false.

    Raises   ConfigError where so many can't share the batch, or don't come out even in groups.
    """
    layout = spread(count, tensor=need.tensor, pipeline=need.pipeline, shard=need.shard, shard_groups=need.shard_groups)
    if need.tensor > accelerator.per_node:
        raise ConfigError(
            f"expected tensor parallelism within a node of {accelerator.per_node} {accelerator.name}, found {need.tensor}; "
            "lower --tensor."
        )
    if need.shape.heads % need.tensor or need.pipeline > need.shape.layers:
        raise ConfigError(
            f"expected --tensor to divide the model's {need.shape.heads} heads and --pipeline to be at most its {need.shape.layers} "
            f"layers, found {need.tensor} and {need.pipeline}; change them."
        )
    if layout.data > need.global_batch_rows:
        raise ConfigError(
            f"expected at most {need.global_batch_rows * need.tensor * need.pipeline} accelerators for a batch of "
            f"{need.global_batch_rows} rows (train.global_batch_rows), found {count}; lower --count or raise the batch."
        )
    plans = []
    for tried, step, changes in _ways(need, layout):
        memory = memory_of(need.shape, tried, step, accelerator)
        fits = memory.total * calibration.MEMORY_MARGIN <= accelerator.memory_bytes
        plan = _plan(need, accelerator, tried, step, memory, changes, site, fits=fits)
        if fits and not changes:
            return plan
        plans.append(plan)
    fitting = [plan for plan in plans if plan.fits]
    return min(fitting, key=lambda plan: plan.hours) if fitting else min(plans, key=lambda plan: plan.memory.total)


def least_count(need: TrainingNeed, accelerator: Accelerator, site: Site, *, hours: float | None) -> TrainingPlan:
    """On the fewest, in powers of two, on which it fits and ends in time; else the nearest to it that was found."""
    best: TrainingPlan | None = None
    for count in counts_of(need):
        plan = plan_training(need, accelerator, count, site)
        if plan.fits and (hours is None or plan.hours <= hours):
            return plan
        if best is None or (plan.fits, -plan.hours if plan.fits else -plan.memory.total) > (
            best.fits,
            -best.hours if best.fits else -best.memory.total,
        ):
            best = plan
    assert best is not None
    return best


def counts_of(need: TrainingNeed) -> Iterator[int]:
    """Numbers of accelerators that can share the batch: one group, two, four..."""
    count = need.tensor * need.pipeline
    most = min(MOST, need.global_batch_rows * count)
    while count <= most:
        yield count
        count *= 2


def _ways(need: TrainingNeed, layout: Layout) -> Iterator[tuple[Layout, Step, Sequence[str]]]:
    configured = need.step
    shards: list[Shard] = ["fsdp"] if layout.shard == "fsdp" or layout.data == 1 else ["ddp", "fsdp"]
    if layout.data == 1:
        shards = [layout.shard]
    for activations in _MILDER[_MILDER.index(configured.activations) :]:
        for shard in shards:
            rows = max(1, min(configured.micro_batch_rows, -(-need.global_batch_rows // layout.data)))
            while True:
                tried = replace(layout, shard=shard)
                micro_batches = -(-need.global_batch_rows // (layout.data * rows))
                step = replace(
                    configured,
                    micro_batch_rows=rows,
                    micro_batches=micro_batches,
                    activations=activations,
                    # FSDP2 casts weights before the forward pass, so what lies between blocks is in bf16.
                    residual_bytes=2 if shard == "fsdp" and layout.data > 1 else configured.residual_bytes,
                )
                yield tried, step, _changes(need, tried, step)
                if rows == 1:
                    break
                rows //= 2


def _changes(need: TrainingNeed, layout: Layout, step: Step) -> Sequence[str]:
    found = []
    share = -(-need.global_batch_rows // layout.data)
    if step.micro_batch_rows < min(need.step.micro_batch_rows, share):
        found.append(f"runtime.micro_batch_rows={step.micro_batch_rows}")
    if layout.shard != need.shard:
        found.append(f"runtime.parallel={layout.shard}")
    if step.activations != need.step.activations:
        found.append(f"runtime.execution.activations={step.activations}")
    return found


def _plan(
    need: TrainingNeed,
    accelerator: Accelerator,
    layout: Layout,
    step: Step,
    memory: Memory,
    changes: Sequence[str],
    site: Site,
    *,
    fits: bool,
) -> TrainingPlan:
    time = step_time(need.shape, layout, step, accelerator)
    working = need.steps * time.total / 3600
    per_hour = layout.count / calibration.HOURS_PER_INTERRUPTION if accelerator.kind == "gpu" else 0.0
    # Half of what lies between two checkpoints is done again; and what is done again may be interrupted.
    each = (calibration.RESTART_S + min(need.checkpoint_every_steps, need.steps) / 2 * time.total) / 3600
    lost = min(0.9, per_hour * each)
    hours = working / (1 - lost)
    rate = need.tokens_per_step / time.total
    flops = need.shape.flops_per_token(step.row_len)
    return TrainingPlan(
        accelerator=accelerator.name,
        count=layout.count,
        layout=layout,
        fits=fits,
        changes=tuple(changes),
        step=step,
        memory=memory,
        memory_bytes=accelerator.memory_bytes,
        time=time,
        step_s=time.total,
        tokens_per_s=rate,
        mfu=rate * flops / (layout.count * accelerator.tflops * 1e12),
        interruptions=hours * per_hour,
        hours=hours,
        footprint=footprint(accelerator, layout.count, hours, site),
    )
