"""The section `improve.budget`: what retrains may cost, and what they must be worth."""

from __future__ import annotations

from pydantic import Field, model_validator

from aifactory.config.section import Section


class Budget(Section):
    """What a retrain is expected to cost and to bring is reckoned from those before it; it is then begun, begun with fewer steps,
    deferred until there is room, or refused.

    Counted is what stages took that came to their end, as the journal has it; hours are those of what the runtime gives them."""

    window_s: float = Field(default=86_400.0, gt=0)
    """The limits hold for any so long a time, seconds. Default: 86,400."""
    cpu_hours: float | None = Field(default=None, gt=0)
    """Most hours of CPUs. Default: any."""
    gpu_hours: float | None = Field(default=None, gt=0)
    """Most hours of GPUs. Default: any."""
    joules: float | None = Field(default=None, gt=0)
    """Most energy; where there is no counter, of the estimate by `runtime.watts_per_cpu`. Default: any."""
    money: float | None = Field(default=None, gt=0)
    """Most money, by the prices below, in their currency. Default: any."""
    price_per_cpu_hour: float = Field(default=0.0, ge=0)
    """Money for an hour of one CPU. Default: 0."""
    price_per_gpu_hour: float = Field(default=0.0, ge=0)
    """Money for an hour of one GPU. Default: 0."""
    price_per_kwh: float = Field(default=0.0, ge=0)
    """Money for 3.6 million joules. Default: 0."""
    worth_per_bit: float | None = Field(default=None, gt=0)
    """Money that one bit per byte less on what users correct is worth: a retrain that is expected to bring less than it costs is
    refused. Default: that is not asked."""
    min_gain: float = Field(default=0.0, ge=0)
    """Least gain that is expected of a retrain, bits per byte. Default: 0."""
    least_steps_share: float = Field(default=0.5, gt=0, le=1)
    """A retrain may be begun with this share of its steps, where there is no room for all. Default: 0.5."""
    memory_s: float = Field(default=30 * 86_400.0, gt=0)
    """Retrains that began longer ago tell nothing any more, seconds. Default: 30 days."""

    @property
    def has_prices(self) -> bool:
        return bool(self.price_per_cpu_hour or self.price_per_gpu_hour or self.price_per_kwh)

    @model_validator(mode="after")
    def _money_has_prices(self) -> Budget:
        asked = [name for name in ("money", "worth_per_bit") if getattr(self, name) is not None]
        if asked and not self.has_prices:
            raise ValueError(
                f"expected a price (price_per_cpu_hour, price_per_gpu_hour or price_per_kwh) beside {asked[0]}, found none; "
                "name one"
            )
        return self
