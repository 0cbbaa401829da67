"""The section `runtime.page`: where the factory's page is served."""

from __future__ import annotations

from pydantic import Field

from aifactory.config.section import Section


class Page(Section):
    """The factory's page, by `aifactory page`."""

    host: str = "127.0.0.1"
    """Address to bind. One that other machines reach is refused without keys and without a token in AIFACTORY_PAGE_TOKEN.
    Default: 127.0.0.1, which only this machine reaches."""
    port: int = Field(default=8270, ge=0, le=65535)
    """TCP port; 0 takes a free one. Default: 8270."""
    refresh_s: float = Field(default=2.0, ge=0.2, le=3600)
    """How often an open view is read again, seconds. Default: 2."""
