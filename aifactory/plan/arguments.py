"""The flags of `aifactory plan`. Loads nothing heavy: the command reads its arguments first."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `aifactory plan`."""
    whole, positive = _number(int, 1), _number(float, 0)
    parser.add_argument("config_file", nargs="?", metavar="CONFIG", help="configuration file; none is needed")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of the configuration")
    parser.add_argument("--json", action="store_true", help="print the plan as one JSON document")
    parser.add_argument("--list", action="store_true", help="print what the accelerators are, and whence that is known")
    parser.add_argument(
        "--accelerator", action="append", metavar="NAME", help="one or, again, several; all GPUs by default"
    )
    parser.add_argument(
        "--model", metavar="NAME", help="a published model (llama-3.1-8b) or a folder with a config.json"
    )
    training = parser.add_argument_group("training", "planned with a CONFIG, or with --tokens")
    training.add_argument(
        "--tokens", type=positive, metavar="N", help="to train on, such as 15e12; else train.max_steps"
    )
    training.add_argument("--count", type=whole, metavar="N", help="accelerators; by default as few as do")
    training.add_argument("--days", type=positive, metavar="D", help="by when it is to be done")
    training.add_argument("--tensor", type=whole, metavar="N", help="devices that share each layer; 1 by default")
    training.add_argument("--pipeline", type=whole, default=1, metavar="N", help="stages of layers; 1 by default")
    training.add_argument("--parallel", choices=("ddp", "fsdp"), help="as runtime.parallel")
    training.add_argument(
        "--activations", choices=("none", "selective", "full"), help="as runtime.execution.activations"
    )
    training.add_argument("--row-len", type=whole, metavar="N", help="as tokenize.row_len")
    training.add_argument("--batch-rows", type=whole, metavar="N", help="as train.global_batch_rows")
    training.add_argument("--micro-batch-rows", type=whole, metavar="N", help="as runtime.micro_batch_rows")
    training.add_argument("--svg", metavar="FILE", help="write a picture of time, accelerators and cost")
    serving = parser.add_argument_group("serving", "planned with --users")
    serving.add_argument("--users", type=positive, metavar="N", help="who ask at the busiest hour")
    serving.add_argument("--per-hour", type=positive, default=12.0, metavar="N", help="requests of each; 12 by default")
    serving.add_argument("--prompt-tokens", type=whole, default=512, metavar="N", help="of a request; 512 by default")
    serving.add_argument("--answer-tokens", type=whole, default=256, metavar="N", help="of an answer; 256 by default")
    serving.add_argument("--first-token-ms", type=positive, metavar="MS", help="longest mean time to the first token")
    serving.add_argument("--token-ms", type=positive, metavar="MS", help="longest mean time from a token to the next")
    serving.add_argument("--slots", type=whole, metavar="N", help="as runtime.endpoint.slots")
    ingesting = parser.add_argument_group(
        "ingestion", "planned with --bytes, or where all sources are files of this machine"
    )
    ingesting.add_argument("--bytes", type=positive, metavar="N", help="of text, such as 2e9")
    ingesting.add_argument("--cpus", type=positive, metavar="N", help="by default data_tasks x cpus_per_worker")


def _number(kind: Callable[[float], float], least: float) -> Callable[[str], float]:
    """A number above 0 (at least `least`), in any form that Python reads: 15e12."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number such as 15e12, found {text!r}") from None
        if not math.isfinite(value) or value <= 0 or value < least or (kind is int and value != int(value)):
            what = "a whole number of at least 1" if kind is int else "a number above 0"
            raise argparse.ArgumentTypeError(f"expected {what}, found {text!r}")
        return kind(value)

    return read
