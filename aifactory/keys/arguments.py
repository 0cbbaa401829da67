"""The flags of `aifactory keys`. Loads nothing heavy: the command reads its arguments first."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

_UNITS = {"s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0, "w": 7 * 86_400.0}
_SCOPES = ("infer", "feedback", "operate")
_WINDOWS = ("day", "month", "total")


def add_verbs(parser: argparse.ArgumentParser) -> None:
    """The verbs below `aifactory keys`, with their flags."""
    verbs = parser.add_subparsers(dest="what", required=True, metavar="VERB")

    def verb(name: str, text: str, subject: str | None = None, about: str = "") -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=f"{name}: {text}.")
        if subject is not None:
            sub.add_argument("subject", metavar=subject, help=about)
        sub.add_argument(
            "config_file", nargs="?", metavar="CONFIG", help="configuration file; - reads AIFACTORY_CONFIG"
        )
        sub.add_argument("--config", metavar="CONFIG", help="the same, as an option")
        sub.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="override, such as runtime.state_url=..."
        )
        sub.add_argument("--json", action="store_true", help="print the result as one JSON document")
        return sub

    key = "its id or its name"
    create = verb("create", "make a key; what it prints is told nowhere else", "NAME", "what it is called")
    create.add_argument("--team", help="whose it is: keys of one team share its limits, files and batches")
    create.add_argument(
        "--scope", action="append", choices=_SCOPES, help="what it is good for; infer and feedback by default"
    )
    create.add_argument(
        "--expires", type=seconds, metavar="TIME", help="from now, such as 90d or 12h; never by default"
    )
    _add_limits(create)
    verb("list", "all keys, what limits hold for them, and what they have used")
    rotate = verb("rotate", "give a key another secret", "KEY", key)
    rotate.add_argument(
        "--overlap",
        type=seconds,
        default=0.0,
        metavar="TIME",
        help="how long the old one is good beside it; 0 by default",
    )
    revoke = verb("revoke", "end a key for good", "KEY", key)
    revoke.add_argument("--reason", default="asked for", help="why, for the audit")
    export = verb("export", "write salts and hashes of the keys that are good for a proxy in front (configs/gateway)")
    export.add_argument(
        "--folder", required=True, metavar="FOLDER", help="of HAProxy's maps; what is in them is replaced"
    )
    limit = verb(
        "limit",
        "say what a key or a team may use, in place of what was said before; without a flag: as much as there is",
        "KEY",
        f"{key}; anonymous: whoever asks without one",
    )
    limit.add_argument("--team", action="store_true", help="it is the name of a team")
    _add_limits(limit)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    whole, number = _number(int), _number(float)
    group = parser.add_argument_group("limits", "what comes beyond is answered 429, beyond a budget 402")
    group.add_argument("--requests-per-minute", type=whole, metavar="N", help="in any 60 seconds")
    group.add_argument("--tokens-per-minute", type=whole, metavar="N", help="of prompts and answers, in any 60 seconds")
    group.add_argument("--concurrent", type=whole, metavar="N", help="requests open at once")
    group.add_argument("--budget-tokens", type=whole, metavar="N", help="of prompts and answers, in the window")
    group.add_argument(
        "--budget-money", type=number, metavar="X", help="by the prices of runtime.gateway, in the window"
    )
    group.add_argument("--budget-joules", type=number, metavar="J", help="in the window")
    group.add_argument(
        "--budget-window",
        choices=_WINDOWS,
        default="month",
        help="calendar day or month, UTC, or all time; month by default",
    )


def seconds(text: str) -> float:
    """A time such as 90d, 12h, 30m or 45s, in seconds."""
    try:
        value = float(text[:-1]) * _UNITS[text[-1:]]
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"expected a time such as 90d, 12h, 30m or 45s, found {text!r}") from None
    if not math.isfinite(value) or value < 0:
        raise argparse.ArgumentTypeError(f"expected a time of 0 or more, found {text!r}")
    return value


def _number(kind: Callable[[float], float]) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number such as 1e6, found {text!r}") from None
        if not math.isfinite(value) or value <= 0 or (kind is int and value != int(value)):
            what = "a whole number above 0" if kind is int else "a number above 0"
            raise argparse.ArgumentTypeError(f"expected {what}, found {text!r}")
        return kind(value)

    return read
