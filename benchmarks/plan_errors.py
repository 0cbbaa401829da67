"""What the planner predicts beside what was measured: this project's own runs, and those that others have published.

    python benchmarks/plan_errors.py          the table
    python benchmarks/plan_errors.py --fit    the constants of aifactory/plan/calibration.py and their like, fitted anew

Each row says whether it was fitted to or predicted. Takes part of a second; needs nothing but the files of benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import published_runs as published

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from aifactory.config import Architecture, Site
from aifactory.plan import calibration, ingesting
from aifactory.plan.accelerators import ACCELERATORS
from aifactory.plan.decoding import Replica, load_of
from aifactory.plan.footprint import footprint
from aifactory.plan.layout import Layout, Step
from aifactory.plan.memory import memory_of
from aifactory.plan.shapes import PUBLISHED, ModelShape, shape_of_architecture
from aifactory.plan.step_time import Work, step_time, work_of

RESULTS = Path(__file__).resolve().parent / "results"
ABLATION = "train_gpu_ablation-2026-11-26"
TRAINED = "train_gpu-2026-11-26"
SERVED = "serve_gpu-2026-11-26"
ON_CPUS = "train-2026-11-26"
INGESTED = "ingest-2026-11-25"
FITTED_TO = ("as meant", "one document a row", "without compilation")
ONE_B = PUBLISHED["llama-3.2-1b"]
"""The model of train_gpu.py and serve_gpu.py."""
PROMPT, ANSWER = 128, 256
"""Tokens, of serve_gpu.py."""
ONE = Layout()


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A figure that is known, and what the planner says."""

    group: str
    name: str
    unit: str
    known: float
    planned: float
    is_fitted: bool = False
    source: str

    @property
    def error(self) -> float:
        """Of the planned over the known figure: 0.1 is a tenth too high."""
        return self.planned / self.known - 1


def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


# ── what is fitted ────────────────────────────────────────────────────────────────────────────────────────────────────


def fit() -> dict[str, float]:
    """The constants, each from the runs that `calibration`, `accelerators` and `ingesting` name."""
    found = result(ABLATION)["found"]
    chip = ACCELERATORS["h200"]
    peak = chip.tflops * 1e12
    served = result(SERVED)["raw"]
    bandwidth_share = statistics.median(served["bandwidth_gb_s"]) / chip.bandwidth_gb_s
    bandwidth = bandwidth_share * chip.bandwidth_gb_s * 1e9
    plain, documents, eager = (_work(found[name]) for name in FITTED_TO)
    plain_s, documents_s, eager_s = (statistics.median(found[name]["step_s"]) for name in FITTED_TO)
    attention = (documents.attention_flops - plain.attention_flops) / (documents_s - plain_s)
    update = _update_s(ONE_B, ONE, bandwidth)
    products = plain.product_flops / (
        plain_s - update - plain.moved_bytes / bandwidth - plain.attention_flops / attention
    )
    replica = Replica(shape=ONE_B, accelerator=chip)
    read = replica.read_bytes(1) + (PROMPT + ANSWER / 2) * replica.kv_bytes_per_token
    between = statistics.median(served["between_ms_p50_b1"]) / 1e3
    eager_bytes = 1 + (eager_s - plain_s) * bandwidth / eager.eager_bytes
    return {
        "PRODUCTS_SHARE": products / peak,
        "ATTENTION_SHARE": attention / peak,
        "EAGER_BYTES": eager_bytes,
        "BANDWIDTH_SHARE": bandwidth_share,
        "DECODE_LAYER_S": (between - read / bandwidth) / ONE_B.layers,
        "PREFILL_LAYER_S": statistics.median(served["ttft_ms_p50_b1"]) / 1e3 / ONE_B.layers,
        "A100_PRODUCTS_SHARE": _a100_share(attention / peak, eager_bytes, bandwidth_share),
        "ALL_REDUCE_S": _all_reduce_s(float(f"{(between - read / bandwidth) / ONE_B.layers:.3g}")),
        **_fit_cpu(),
        **_fit_ingestion(),
    }


def _a100_share(attention_share: float, eager_bytes: float, bandwidth_share: float) -> float:
    run = next(run for run in published.TRAINING if run.name == published.A100_FIT)
    chip, work = run.accelerator, work_of(run.shape, run.layout, run.step)
    peak, bandwidth = chip.tflops * 1e12, chip.bandwidth_gb_s * 1e9 * bandwidth_share
    seconds = run.step.tokens(run.layout) / run.layout.count / run.tokens_per_s
    seconds -= _update_s(run.shape, run.layout, bandwidth)
    exchange = step_time(run.shape, run.layout, run.step, chip).exchange_s
    left = (seconds - exchange) / run.step.micro_batches
    left -= work.attention_flops / (peak * attention_share)
    left -= (work.moved_bytes + (eager_bytes - 1) * work.eager_bytes) / bandwidth
    return work.product_flops / left / peak


def _all_reduce_s(layer_s: float) -> float:
    """From one device to two what is read halves, and what a layer takes beside that stays."""
    one, two = (1 / each.tokens_per_s for each in published.DECODING[:2])
    layers = PUBLISHED[published.DECODING[0].model].layers
    return (two - ((one - layers * layer_s) / 2 + layers * layer_s)) / (2 * layers)


def _fit_cpu() -> dict[str, float]:
    raw = result(ON_CPUS)["raw"]
    rate = statistics.median(raw["bare_110m_fp32_tokens_per_s"])
    step = _cpu_step()
    work = work_of(_on_cpu("110m"), ONE, step)
    flops = (work.product_flops + work.attention_flops) / step.micro_tokens * rate
    return {"cpu tflops": flops / 1e12, "cpu crowded_share": statistics.median(raw["bare2_over_1_17m_fp32"]) / 2}


def _fit_ingestion() -> dict[str, float]:
    found = result(INGESTED)
    note = next(note for note in found["notes"] if note.startswith("beside datasets"))
    megabytes, tokens = (float(text.replace(",", "")) for text in re.findall(r"([\d,]+) (?:MB|tokens)", note)[:2])
    return {
        "MB_PER_CPU_S": statistics.median(found["raw"]["end_to_end_mb_s"]) / found["hardware"]["cpus"],
        "FIXED_S": statistics.median(found["raw"]["fixed_cost_s"]),
        "BYTES_PER_TOKEN": megabytes * 1e6 / tokens,
    }


def constants() -> dict[str, float]:
    """What the planner has of them now."""
    names = ("PRODUCTS_SHARE", "ATTENTION_SHARE", "EAGER_BYTES", "BANDWIDTH_SHARE", "DECODE_LAYER_S", "PREFILL_LAYER_S")
    return {
        **{name: getattr(calibration, name) for name in (*names, "A100_PRODUCTS_SHARE", "ALL_REDUCE_S")},
        "cpu tflops": ACCELERATORS["cpu"].tflops,
        "cpu crowded_share": ACCELERATORS["cpu"].crowded_share,
        **{name: getattr(ingesting, name) for name in ("MB_PER_CPU_S", "FIXED_S", "BYTES_PER_TOKEN")},
    }


def _update_s(shape: ModelShape, layout: Layout, bandwidth: float) -> float:
    return 40 * shape.parameters / layout.shards / bandwidth


# ── the rows ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def rows() -> list[Row]:
    """Everything that plans are compared with."""
    return [*_trained_on_gpu(), *_trained_on_cpus(), *_served(), *_ingested(), *_published()]


def _step(found: Mapping[str, Any]) -> Step:
    """A variant of train_gpu.py; the mean length of its documents is in what it says of its arithmetic."""
    variant = found["variant"]
    computed = found["mfu_computed"] / found["mfu"] * found["gflop_per_token"] * 1e9
    attended = (computed - 6 * ONE_B.product_weights) / (12 * ONE_B.layers * ONE_B.width)
    return Step(
        row_len=variant["row_len"],
        micro_batch_rows=variant["micro_batch_rows"],
        micro_batches=variant["micro_batches"],
        document_tokens=2 * attended,
        activations=variant["activations"],
        is_compiled=variant["compile"],
        loss=variant["loss"],
        attention=variant["attention"],
    )


def _work(found: Mapping[str, Any]) -> Work:
    return work_of(ONE_B, ONE, _step(found))


def _trained_on_gpu() -> Iterator[Row]:
    chip = ACCELERATORS["h200"]
    for file in (ABLATION, TRAINED):
        for name, found in result(file)["found"].items():
            if "failed" in found:
                continue
            step = _step(found)
            rate = step.tokens(ONE) / step_time(ONE_B, ONE, step, chip).total
            is_fitted = file == ABLATION and name in FITTED_TO
            group = "own, training on one H200"
            yield Row(
                group=group,
                name=name,
                unit="tokens/s",
                known=found["tokens_per_s"],
                planned=rate,
                is_fitted=is_fitted,
                source=file,
            )
            held = memory_of(ONE_B, ONE, step, chip).total / 2**30
            yield Row(
                group="own, memory on one H200",
                name=name,
                unit="GiB",
                known=found["peak_memory_gib"],
                planned=held,
                source=file,
            )


def _on_cpu(size: str) -> ModelShape:
    """The models of benchmarks/train.py."""
    layers, hidden, heads = {"17m": (6, 384, 6), "110m": (14, 768, 12)}[size]
    return shape_of_architecture(Architecture(hidden_size=hidden, num_layers=layers, num_heads=heads), 16_384)


def _cpu_step() -> Step:
    return Step(row_len=512, micro_batch_rows=1, micro_batches=2, document_tokens=330)


def _trained_on_cpus() -> Iterator[Row]:
    raw, chip = result(ON_CPUS)["raw"], ACCELERATORS["cpu"]
    two, each = Layout(data=2), replace(_cpu_step(), micro_batches=1)
    runs = (
        ("bare_110m_fp32", "110m", ONE, _cpu_step()),
        ("bare_17m_fp32", "17m", ONE, _cpu_step()),
        ("ray_17m_fp32", "17m", ONE, _cpu_step()),
        ("ray_110m_fp32", "110m", ONE, _cpu_step()),
        ("ddp2_17m_fp32", "17m", two, each),
        ("fsdp2_17m_fp32", "17m", replace(two, shard="fsdp"), each),
    )
    for name, size, layout, step in runs:
        yield Row(
            group="own, training on CPUs",
            name=name,
            unit="tokens/s",
            known=statistics.median(raw[f"{name}_tokens_per_s"]),
            planned=step.tokens(layout) / step_time(_on_cpu(size), layout, step, chip).total,
            is_fitted=name == "bare_110m_fp32",
            source=ON_CPUS,
        )


def _served() -> Iterator[Row]:
    raw = result(SERVED)["raw"]
    replica = Replica(shape=ONE_B, accelerator=ACCELERATORS["h200"])
    for number in (1, 8, 64):
        load = load_of(replica, number, prompt_tokens=PROMPT, answer_tokens=ANSWER)
        # The benchmark sends all at once and sends nothing after them: prompts come first, and then no prompt is between tokens.
        prefill = replica.prefill_s(PROMPT)
        step = 1e3 * replica.decode_s(number, PROMPT + ANSWER / 2)
        whole = number * prefill + ANSWER * step / 1e3
        first = 1e3 * prefill * (number + 1) / 2
        for name, planned, unit in (
            (f"between_ms_p50_b{number}", step, "ms"),
            (f"ttft_ms_p50_b{number}", first, "ms"),
            (f"tokens_per_s_b{number}", number * ANSWER / whole, "tokens/s"),
        ):
            yield Row(
                group="own, serving on one H200",
                name=name,
                unit=unit,
                known=statistics.median(raw[name]),
                planned=planned,
                is_fitted=number == 1 and unit == "ms",
                source=SERVED,
            )
        assert load.tokens_per_s <= number / step * 1e3


def _ingested() -> Iterator[Row]:
    found = result(INGESTED)
    raw, cpus = found["raw"], found["hardware"]["cpus"]
    for name, is_fitted in (("end_to_end_mb_s", True), ("end_to_end_peer_data_mb_s", False)):
        yield Row(
            group="own, ingestion on two CPUs",
            name=name,
            unit="MB/s",
            known=statistics.median(raw[name]),
            planned=ingesting.ingestion(1e9, cpus).mb_per_s,
            is_fitted=is_fitted,
            source=INGESTED,
        )


def _published() -> Iterator[Row]:
    for run in published.TRAINING:
        time = step_time(run.shape, run.layout, run.step, run.accelerator).total
        yield Row(
            group="published, training",
            name=run.name,
            unit="tokens/s each",
            known=run.tokens_per_s,
            planned=run.step.tokens(run.layout) / run.layout.count / time,
            is_fitted=run.name == published.A100_FIT,
            source=run.source,
        )
        if run.memory_gib is not None:
            yield Row(
                group="published, memory",
                name=run.name,
                unit="GiB",
                known=run.memory_gib,
                planned=memory_of(run.shape, run.layout, run.step, run.accelerator).total / 2**30,
                source=run.source,
            )
        if run.num_parameters is not None:
            yield Row(
                group="published, parameters",
                name=run.name,
                unit="weights",
                known=run.num_parameters,
                planned=run.shape.parameters,
                source=run.source,
            )
    for told in published.HOURS:
        run = told.run
        time = step_time(run.shape, run.layout, run.step, run.accelerator).total
        steps = told.tokens / run.step.tokens(run.layout)
        yield Row(
            group="published, accelerator-hours",
            name=told.name,
            unit="hours",
            known=told.hours,
            planned=steps * time * run.layout.count / 3600,
            source=run.source,
        )
    for each in published.DECODING:
        chip = replace(ACCELERATORS["a100"], power_limit_watts=330)
        replica = Replica(shape=PUBLISHED[each.model], accelerator=chip, tensor=each.tensor)
        yield Row(
            group="published, decoding",
            name=f"{each.model}, tensor {each.tensor}",
            unit="tokens/s",
            known=each.tokens_per_s,
            planned=1 / replica.decode_s(1, 100),
            is_fitted=each in published.DECODING[:2],
            source=published.GPT_FAST,
        )
    for name, source, tokens, flops in published.FLOPS:
        shape = PUBLISHED[name]
        yield Row(
            group="published, operations",
            name=name,
            unit="FLOP",
            known=flops,
            planned=shape.flops_per_token(0) * tokens,
            source=source,
        )
    site = Site(pue=1.1, carbon_kg_per_kwh=0.385)
    for name, hours, tonnes in published.CARBON:
        yield Row(
            group="published, carbon of given hours",
            name=name,
            unit="tonnes",
            known=tonnes,
            planned=footprint(replace(ACCELERATORS["a100"], host_watts=0.0), 1, hours, site).tonnes_co2,
            source=published.LLAMA_2,
        )


def lines(found: Sequence[Row]) -> list[str]:
    """The table."""
    told = []
    for group in dict.fromkeys(row.group for row in found):
        of_group = [row for row in found if row.group == group]
        predicted = [abs(row.error) for row in of_group if not row.is_fitted]
        told.append(f"{group}: {len(predicted)} predicted, {_errors(predicted)}")
        for row in of_group:
            kind = "fitted" if row.is_fitted else "predicted"
            told.append(
                f"  {row.name:<42}{_number(row.known):>12}{_number(row.planned):>12} {row.unit:<14}{row.error:>+8.1%}  {kind:<10}"
                f"{row.source}"
            )
    return told


def _errors(values: Sequence[float]) -> str:
    return f"mean error {statistics.mean(values):.1%}, largest {max(values):.1%}" if values else "none"


def _number(value: float) -> str:
    return f"{value:.3g}" if value >= 1e9 or value < 100 else f"{value:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--fit", action="store_true", help="print the fitted constants beside those that the planner has"
    )
    if parser.parse_args().fit:
        now = constants()
        for name, value in fit().items():
            print(f"{name:<22}{value:.4g}  now {now[name]:.4g}")
        return
    print("\n".join(lines(rows())))


if __name__ == "__main__":
    main()
