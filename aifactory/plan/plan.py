"""Plan: the answer to `aifactory plan`, as text and as JSON. All of it is an estimate, and says how far to believe it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from aifactory.config import Site
from aifactory.plan import calibration
from aifactory.plan.accelerators import Accelerator
from aifactory.plan.footprint import Footprint
from aifactory.plan.ingesting import Ingestion
from aifactory.plan.serving import ServingPlan
from aifactory.plan.shapes import ModelShape
from aifactory.plan.tradeoff import hours_words, short
from aifactory.plan.training import TrainingPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What was asked, on each accelerator."""

    model: str
    shape: ModelShape
    accelerators: Sequence[Accelerator]
    site: Site
    training: Sequence[TrainingPlan]
    tradeoff: Sequence[TrainingPlan]
    """On other numbers of them."""
    serving: Sequence[ServingPlan]
    ingestion: Ingestion | None
    most_hours: float | None
    """By when training is to be done."""
    left_out: Sequence[str]
    hints: Sequence[str]
    """Options that would make it faster."""
    row_len: int
    steps: int
    batch_rows: int

    @property
    def tokens(self) -> int:
        """That are trained on."""
        return self.steps * self.batch_rows * self.row_len

    @property
    def holds(self) -> bool:
        """Whether all that was asked is to be had on one accelerator at least."""
        trains = not self.training or any(plan.fits and not self._is_late(plan) for plan in self.training)
        return trains and (not self.serving or any(plan.fits for plan in self.serving))

    def _is_late(self, plan: TrainingPlan) -> bool:
        return self.most_hours is not None and plan.hours > self.most_hours

    def lines(self) -> Iterator[str]:
        flops = self.shape.flops_per_token(self.row_len)
        yield (
            f"{self.model}: {short(self.shape.parameters)} weights, {short(flops)} operations a token in rows of "
            f"{self.row_len:,}. An estimate."
        )
        if self.training:
            yield from self._training_lines()
        if self.serving:
            yield from self._serving_lines()
        if self.ingestion is not None:
            yield from self._ingestion_lines(self.ingestion)
        yield from (f"Left out: {each}." for each in self.left_out)
        yield from (f"Hint: {each}." for each in self.hints)
        yield ""
        yield (
            f"Factors: PUE {self.site.pue:g}, {self.site.carbon_kg_per_kwh:g} kg of CO2 a kWh, {self.site.water_litres_per_kwh:g} l a "
            f"kWh of the machines (runtime.site); power is the most that they draw."
            + (
                " No price is known: --set runtime.site.prices.NAME=... an hour."
                if not self.site.prices and not self.site.price_per_kwh
                else ""
            )
        )
        bounds = calibration.BOUNDS
        yield (
            f"How far to believe it: of runs that others have published, tokens/s of training within {bounds['published, training']:.0%}, "
            f"memory within {bounds['published, memory']:.0%}, decoding within {bounds['published, decoding']:.0%}; whole pretrainings took "
            f"up to {1 / (1 - bounds['published, accelerator-hours']):.1f} times as long. `python benchmarks/plan_errors.py`"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "shape": asdict(self.shape) | {"parameters": self.shape.parameters},
            "is_estimate": True,
            "accelerators": [asdict(chip) for chip in self.accelerators],
            "site": self.site.model_dump(mode="json"),
            "steps": self.steps,
            "tokens": self.tokens,
            "training": [asdict(plan) for plan in self.training],
            "tradeoff": [
                {
                    "accelerator": plan.accelerator,
                    "count": plan.count,
                    "hours": plan.hours,
                    "tokens_per_s": plan.tokens_per_s,
                    "layout": plan.layout.words,
                    "footprint": asdict(plan.footprint),
                }
                for plan in self.tradeoff
            ],
            "serving": [asdict(plan) for plan in self.serving],
            "ingestion": None if self.ingestion is None else asdict(self.ingestion),
            "left_out": list(self.left_out),
            "hints": list(self.hints),
            "largest_errors": dict(calibration.BOUNDS),
            "holds": self.holds,
        }

    # ── parts ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _training_lines(self) -> Iterator[str]:
        yield ""
        yield f"Training on {short(self.tokens)} tokens: {self.steps:,} steps of {self.batch_rows:,} rows"
        yield (
            f"  {'on':<14}{'spread over':<24}{'GB each, of':>12}{'step':>9}{'tokens/s':>10}{'MFU':>6}{'time':>9}"
            + self._cost_titles()
        )
        for plan in self.training:
            held = f"{plan.memory.total / 1e9:.3g}/{plan.memory_bytes / 1e9:.4g}"
            if not plan.fits:
                yield (
                    f"  {f'{plan.count} {plan.accelerator}':<14}{plan.layout.words:<24}{held:>12}  does not fit"
                    + (f" even with {', '.join(plan.changes)}" if plan.changes else "")
                )
                continue
            yield (
                f"  {f'{plan.count} {plan.accelerator}':<14}{plan.layout.words:<24}{held:>12}{hours_words(plan.step_s / 3600):>9}"
                f"{short(plan.tokens_per_s):>10}{plan.mfu:>6.0%}{hours_words(plan.hours):>9}"
                + self._costs(plan.footprint)
            )
            if self._is_late(plan):
                yield "      later than asked"
            yield from self._how(plan)
        if self.tradeoff:
            fastest = min(self.tradeoff, key=lambda plan: plan.hours)
            yield (
                f"  fastest of {len(self.tradeoff)} that fit: {fastest.count} {fastest.accelerator}, {fastest.layout.words}, "
                f"{hours_words(fastest.hours)}; --svg FILE draws them"
            )

    def _how(self, plan: TrainingPlan) -> Iterator[str]:
        if plan.changes:
            yield f"      with {', '.join(plan.changes)}, which change no result"
        if len(self.training) > 1:
            return
        time, memory = plan.time, plan.memory
        shares = {
            "products": time.products_s,
            "attention": time.attention_s,
            "element-wise": time.elementwise_s,
            "starting kernels": time.host_s,
            "update": time.update_s,
            "exchange": time.exchange_s,
            "pipeline": time.pipeline_s,
            "crowding": time.crowded_s,
        }
        told = ", ".join(
            f"{name} {each / time.total:.0%}" for name, each in shares.items() if each / time.total >= 0.005
        )
        yield f"      a step is {told}"
        yield (
            f"      memory: states {memory.states / 1e9:.3g}, casts {memory.casts / 1e9:.3g}, activations "
            f"{memory.activations / 1e9:.3g}, loss {memory.loss / 1e9:.3g} GB of one; {plan.step.micro_batches} times "
            f"{plan.step.micro_batch_rows} rows a step"
        )
        if plan.interruptions >= 0.05:
            yield f"      {plan.interruptions:.1f} interruptions are to be expected, and are in the time"

    def _serving_lines(self) -> Iterator[str]:
        yield ""
        yield f"Serving {self.serving[0].requests_per_s:.3g} requests a second; of a replica whose slots are full:"
        yield (
            f"  {'on':<14}{'replicas':<16}{'at once':>8}{'tokens/s':>10}{'first token':>13}{'a token':>10}{'room, tokens':>14}"
            + self._cost_titles("a day")
        )
        for plan in self.serving:
            name = f"{plan.count} {plan.accelerator}"
            if not plan.fits:
                yield f"  {plan.accelerator:<14}does not do: {plan.reason}"
                continue
            replicas = f"{plan.replicas} of {plan.tensor}" if plan.tensor > 1 else f"{plan.replicas}"
            load = plan.load
            yield (
                f"  {name:<14}{replicas:<16}{load.requests:>8}{short(load.tokens_per_s):>10}"
                f"{f'{1e3 * load.first_token_s:.3g} ms':>13}{f'{1e3 * load.token_s:.3g} ms':>10}{short(plan.kv_tokens):>14}"
                + self._costs(plan.day)
            )
            if len(self.serving) == 1:
                yield f"      {plan.reason}; a token's keys and values are {short(plan.kv_bytes_per_token)} bytes"
                answers = plan.answer_tokens_per_day / 1e6
                each = f", {plan.day.kwh / answers:.3g} kWh" if answers else ""
                money = "" if plan.day.money is None else f", {plan.day.money / answers:.3g} {self.site.currency}"
                yield f"      a million tokens of answers{each}{money}"

    def _ingestion_lines(self, found: Ingestion) -> Iterator[str]:
        yield ""
        yield (
            f"Ingestion of {short(found.num_bytes)} bytes on {found.cpus:g} CPUs: {hours_words(found.hours)} at {found.mb_per_s:.3g} MB/s, "
            f"about {short(found.tokens)} tokens; by the rules of Gopher and C4, without near-duplicates and steps that ask models"
        )

    def _cost_titles(self, per: str = "") -> str:
        names = [
            "kWh",
            "litres",
            "t CO2",
            *([self.site.currency] if self.site.prices or self.site.price_per_kwh else []),
        ]
        return "".join(f"{name:>9}" for name in names) + (f"  {per}" if per else "")

    def _costs(self, used: Footprint) -> str:
        numbers = [short(used.kwh), short(used.litres), short(used.tonnes_co2)]
        if self.site.prices or self.site.price_per_kwh:
            numbers.append("-" if used.money is None else short(used.money))
        return "".join(f"{each:>9}" for each in numbers)
