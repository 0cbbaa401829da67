"""The arguments of `aifactory doctor`: read before anything heavy is loaded."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `aifactory doctor`."""
    parser.add_argument(
        "config_file",
        nargs="?",
        metavar="CONFIG",
        help="configuration file; without one the machine alone is looked at",
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of the configuration")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON document")
