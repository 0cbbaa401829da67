"""Footprint: hours of accelerators as kilowatt-hours, water, carbon and money, by the factors of `runtime.site`.

An estimate, and an upper one: every device draws its most all the time, as Meta's model cards reckon too.
"""

from __future__ import annotations

from dataclasses import dataclass

from aifactory.config import Site
from aifactory.plan.accelerators import Accelerator


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What so many accelerators use in so many hours."""

    accelerator_hours: float
    machine_kwh: float
    """Of the machines."""
    kwh: float
    """Of the building: times PUE."""
    litres: float
    tonnes_co2: float
    money: float | None
    """None where no price is configured."""


def footprint(accelerator: Accelerator, count: float, hours: float, site: Site) -> Footprint:
    """Of `count` devices for `hours` hours."""
    spent = count * hours
    machine = spent * accelerator.drawn_watts / 1e3
    return from_energy(machine, site, accelerator_hours=spent, price=site.prices.get(accelerator.name))


def from_energy(
    machine_kwh: float, site: Site, *, accelerator_hours: float = 0.0, price: float | None = None
) -> Footprint:
    """Of energy that machines use, measured or reckoned.

    price   of an accelerator-hour
    """
    kwh = machine_kwh * site.pue
    has_price = price is not None or site.price_per_kwh > 0
    return Footprint(
        accelerator_hours=accelerator_hours,
        machine_kwh=machine_kwh,
        kwh=kwh,
        litres=machine_kwh * site.water_litres_per_kwh,
        tonnes_co2=kwh * site.carbon_kg_per_kwh / 1e3,
        money=(price or 0.0) * accelerator_hours + kwh * site.price_per_kwh if has_price else None,
    )
