"""What a proxy in front needs to know keys: their salts and hashes, as HAProxy's maps (`configs/gateway/haproxy.cfg`)."""

from __future__ import annotations

import os
from pathlib import Path

from aifactory.errors import ConfigError
from aifactory.records.keys import Keys

NAMES = ("salts.map", "hashes.map", "old-salts.map", "old-hashes.map")
"""By the 16 hex digits of a key's id: salt and hash of its newest secret, and of the one before while that is good."""


def write_maps(keys: Keys, folder: str) -> int:
    """Write the maps of the keys that are good now, each in the place of the one before; how many keys there are.

    Raises   ConfigError where the folder can't be written to.
    """
    now = keys.journal.clock()
    lines: dict[str, list[str]] = {name: [] for name in NAMES}
    good = [key for key in keys.all() if key.state(now) == "active"]
    for key in good:
        known = keys.known(key.id)
        kept = [] if known is None else [each for each in known.secrets if each.ends_at is None or now < each.ends_at]
        for secret, (salts, hashes) in zip(kept, (NAMES[:2], NAMES[2:]), strict=False):
            digits = key.id.removeprefix("key-")
            lines[salts].append(f"{digits} {secret.salt}\n")
            lines[hashes].append(f"{digits} {secret.hash}\n")
    try:
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        for name, found in lines.items():
            passing = place / f".{name}.{os.getpid()}"
            passing.touch(mode=0o600)
            passing.write_text("".join(found), encoding="ascii")
            passing.replace(place / name)
    except OSError as error:
        raise ConfigError(f"expected to write into the folder {folder}, found: {error}; name another one.") from error
    return len(good)
