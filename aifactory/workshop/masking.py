"""Masking: a text without personal data and secrets, for the endpoint."""

from __future__ import annotations

from collections.abc import Callable

from aifactory.config import Config


def mask_of(config: Config) -> Callable[[str], str] | None:
    """What the endpoint masks texts with; None where its configuration wants none masked."""
    gateway = config.runtime.gateway
    return mask_text if gateway.mask_answers or gateway.mask_log else None


def mask_text(text: str) -> str:
    """The text with a placeholder, such as <EMAIL>, for each address, number, key and secret in it; names stay."""
    import pyarrow as pa

    from aifactory.ingest.personal import PLACEHOLDERS, mask_personal

    # A replica gets texts in which half a character may stand; nothing is found by it.
    whole = text.encode("utf-8", "replace").decode()
    kinds = [kind for kind in PLACEHOLDERS if kind != "name"]
    return str(mask_personal(pa.array([whole], pa.large_string()), kinds).texts[0].as_py())
