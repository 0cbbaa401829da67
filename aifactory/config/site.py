"""The section `runtime.site`: what energy and machines cost where the factory stands, in money, carbon and water; for plans
(`aifactory plan`) and for the books (`aifactory energy`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, StringConstraints

from aifactory.config.section import Section

AcceleratorName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]{0,39}$")]
Price = Annotated[float, Field(ge=0)]


class Site(Section):
    """Factors by which hours and kilowatt-hours become money, carbon and water."""

    prices: Mapping[AcceleratorName, Price] = {}
    """Money for an hour of one accelerator, by its name in `aifactory plan --list`, such as {h100: 2.5}. Default: none, a plan
    then names no price."""
    currency: str = Field(default="USD", min_length=1, max_length=8)
    """Of all prices. Default: USD."""
    price_per_kwh: float = Field(default=0.0, ge=0)
    """Money for a kilowatt-hour, beside the price of the machines; 0 where that has it in it. Default: 0."""
    pue: float = Field(default=1.56, ge=1)
    """Power usage effectiveness: what the whole building draws, over what its machines draw. Default: 1.56, the mean that
    operators told the Uptime Institute's survey of 2024."""
    carbon_kg_per_kwh: float = Field(default=0.445, ge=0)
    """Carbon dioxide of a kilowatt-hour, kilograms. Default: 0.445, the world's mean of 2024 (IEA, Electricity 2025)."""
    prompt_token_share: float = Field(default=0.25, ge=0)
    """What a token of a prompt counts over one of an answer where energy is told by keys and releases: prompts are read many
    tokens at once. Default: 0.25."""
    water_litres_per_kwh: float = Field(default=1.8, ge=0)
    """Water that cools the building, litres for each kilowatt-hour of its machines; what power stations use is not in it.
    Default: 1.8, the mean of data centres in the USA (Shehabi et al. 2016, LBNL-1005775)."""
