"""`aifactory plan`: what is asked by flags and a configuration, and the Plan of it. Nothing is fetched, started or paid.

Flags that stand for options of the configuration are put over it as `--set` would. A plan without a configuration begins with a
batch of 1,024 rows of 4,096 tokens, micro-batches of 8 rows, compiled blocks, and 64 slots for serving.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from aifactory.config import Config
from aifactory.errors import ConfigError
from aifactory.plan.accelerators import ACCELERATORS, Accelerator, accelerator
from aifactory.plan.ingesting import Ingestion, ingestion
from aifactory.plan.needs import left_out, require_context, shape_of, source_bytes, training_need
from aifactory.plan.plan import Plan
from aifactory.plan.serving import ServingNeed, ServingPlan, plan_serving
from aifactory.plan.shapes import ModelShape
from aifactory.plan.tradeoff import hours_words, short, tradeoff_svg
from aifactory.plan.training import TrainingNeed, TrainingPlan, counts_of, least_count, plan_training

_WITHOUT = """\
name: plan
ingest: {sources: [{name: none, kind: text, path: /nonexistent}]}
tokenize: {row_len: 4096}
train: {global_batch_rows: 1024}
runtime: {micro_batch_rows: 8, execution: {compile: true}, gpus_per_worker: 1, endpoint: {slots: 64}}
"""
_OPTIONS = {
    "row_len": "tokenize.row_len",
    "batch_rows": "train.global_batch_rows",
    "micro_batch_rows": "runtime.micro_batch_rows",
    "parallel": "runtime.parallel",
    "activations": "runtime.execution.activations",
    "slots": "runtime.endpoint.slots",
}
"""Flags and the options that they are put over."""


def run(arguments: argparse.Namespace) -> Plan | list[str]:
    """What was asked.

    Raises   ConfigError where it can't be planned as it is asked.
    """
    if arguments.list:
        return listed()
    config = _config(arguments)
    _require_model(arguments)
    name, shape = shape_of(config, arguments.model)
    chips = _accelerators(arguments, config)
    training = _training(arguments, config, shape, chips)
    serving = _serving(arguments, config, shape, chips)
    plan = Plan(
        model=name,
        shape=shape,
        accelerators=chips,
        site=config.runtime.site,
        training=training,
        tradeoff=_tradeoff(arguments, config, shape, chips) if training else (),
        serving=serving,
        ingestion=_ingestion(arguments, config),
        most_hours=_most_hours(arguments),
        left_out=[*left_out(config, shape), *_not_ours(arguments, training, serving)],
        hints=_hints(arguments, config, shape, chips, training),
        row_len=config.tokenize.row_len,
        steps=_need(arguments, config, shape, chips[0]).steps,
        batch_rows=config.train.global_batch_rows,
    )
    if not (training or serving or plan.ingestion):
        raise ConfigError(
            "expected something to plan, found nothing: name a CONFIG or --tokens (training), --users (serving) or --bytes "
            "(ingestion)."
        )
    if arguments.svg is not None:
        _draw(Path(arguments.svg), plan)
    return plan


def listed() -> list[str]:
    """The table of accelerators."""
    title = "name     TFLOP/s  memory GB     GB/s     W   link GB/s  network GB/s  source"
    return [
        title,
        *(
            f"{chip.name:<8}{chip.tflops:>8.4g}{chip.memory_gb:>11g}{chip.bandwidth_gb_s:>9g}{chip.watts:>6g}{chip.link_gb_s:>12g}"
            f"{chip.network_gb_s:>14g}  {chip.source}"
            for chip in ACCELERATORS.values()
        ),
    ]


def _config(arguments: argparse.Namespace) -> Config:
    given = {option: getattr(arguments, flag) for flag, option in _OPTIONS.items()}
    overrides = [*arguments.set, *(f"{option}={value}" for option, value in given.items() if value is not None)]
    if arguments.config_file is None:
        return Config.from_text(_WITHOUT, origin="plan", overrides=overrides)
    return Config.from_yaml(arguments.config_file, overrides)


def _require_model(arguments: argparse.Namespace) -> None:
    describes = any(override.startswith("model.") for override in arguments.set)
    needs_one = arguments.tokens is not None or arguments.users is not None
    if needs_one and arguments.config_file is None and arguments.model is None and not describes:
        raise ConfigError(
            "expected a model, found none: --model NAME or FOLDER, a CONFIG, or --set model.architecture.hidden_size=... and its "
            "like."
        )


def _most_hours(arguments: argparse.Namespace) -> float | None:
    return None if arguments.days is None else 24 * float(arguments.days)


def _accelerators(arguments: argparse.Namespace, config: Config) -> Sequence[Accelerator]:
    for name in config.runtime.site.prices:
        if name not in ACCELERATORS:
            raise ConfigError(
                f"expected names of {', '.join(ACCELERATORS)} in runtime.site.prices, found {name!r}; correct it or leave it out."
            )
    cpu = replace(ACCELERATORS["cpu"], watts=config.runtime.watts_per_cpu)
    if arguments.accelerator:
        named = [accelerator(name) for name in dict.fromkeys(arguments.accelerator)]
        return [cpu if chip.kind == "cpu" else chip for chip in named]
    if arguments.config_file is not None and not config.runtime.gpus_per_worker:
        return [cpu]
    return [chip for chip in ACCELERATORS.values() if chip.kind == "gpu"]


def _need(arguments: argparse.Namespace, config: Config, shape: ModelShape, chip: Accelerator) -> TrainingNeed:
    return training_need(
        config, shape, chip, tokens=arguments.tokens, tensor=arguments.tensor or 1, pipeline=arguments.pipeline
    )


def _training(
    arguments: argparse.Namespace, config: Config, shape: ModelShape, chips: Sequence[Accelerator]
) -> Sequence[TrainingPlan]:
    if arguments.config_file is None and arguments.tokens is None:
        return ()
    require_context(config, arguments.model, config.tokenize.row_len, "tokenize.row_len")
    plans = []
    for chip in chips:
        need = _need(arguments, config, shape, chip)
        count = arguments.count
        # On CPUs a configuration says with how many workers it runs.
        if count is None and chip.kind == "cpu" and arguments.config_file is not None:
            count = config.runtime.most_workers
        site = config.runtime.site
        plans.append(
            least_count(need, chip, site, hours=_most_hours(arguments))
            if count is None
            else plan_training(need, chip, count, site)
        )
    return plans


def _not_ours(
    arguments: argparse.Namespace, training: Sequence[TrainingPlan], serving: Sequence[ServingPlan]
) -> list[str]:
    found = []
    if training and ((arguments.tensor or 1) > 1 or arguments.pipeline > 1):
        found.append("tensor and pipeline parallelism are for another trainer: the factory's own has DDP and FSDP")
    if serving and (arguments.tensor or 1) > 1:
        found.append("replicas on several devices are for another server: the factory's engines take one each")
    return found


def _hints(
    arguments: argparse.Namespace,
    config: Config,
    shape: ModelShape,
    chips: Sequence[Accelerator],
    training: Sequence[TrainingPlan],
) -> list[str]:
    """What compiled blocks would change, on the first GPU where they are not and it fits."""
    for chip, plan in zip(chips, training, strict=False):
        if chip.kind == "gpu" and plan.fits and not plan.step.is_compiled:
            need = _need(arguments, config, shape, chip)
            need = replace(need, step=replace(need.step, is_compiled=True))
            compiled = plan_training(need, chip, plan.count, config.runtime.site)
            if compiled.fits and compiled.hours < plan.hours:
                return [
                    f"runtime.execution.compile=true would take {hours_words(compiled.hours)} on {plan.count} {chip.name}"
                ]
    return []


def _tradeoff(
    arguments: argparse.Namespace, config: Config, shape: ModelShape, chips: Sequence[Accelerator]
) -> Sequence[TrainingPlan]:
    plans = []
    for chip in chips:
        need = _need(arguments, config, shape, chip)
        plans += [plan_training(need, chip, count, config.runtime.site) for count in counts_of(need)]
    return [plan for plan in plans if plan.fits]


def _serving(
    arguments: argparse.Namespace, config: Config, shape: ModelShape, chips: Sequence[Accelerator]
) -> Sequence[ServingPlan]:
    if arguments.users is None:
        return ()
    whole = arguments.prompt_tokens + arguments.answer_tokens
    require_context(config, arguments.model, whole, "prompts and answers")
    endpoint = config.runtime.endpoint
    plans = []
    for chip in chips:
        weights = endpoint.weights if endpoint.weights != "auto" else ("float32" if chip.kind == "cpu" else "bfloat16")
        need = ServingNeed(
            shape=shape,
            users=arguments.users,
            requests_per_user_hour=arguments.per_hour,
            prompt_tokens=arguments.prompt_tokens,
            answer_tokens=arguments.answer_tokens,
            first_token_s=None if arguments.first_token_ms is None else arguments.first_token_ms / 1e3,
            token_s=None if arguments.token_ms is None else arguments.token_ms / 1e3,
            slots=endpoint.slots,
            bytes_per_weight={"float32": 4, "bfloat16": 2, "int8": 1}[weights],
            tensor=arguments.tensor or 1,
            engine=endpoint.engine,
        )
        plans.append(plan_serving(need, chip, config.runtime.site))
    return plans


def _ingestion(arguments: argparse.Namespace, config: Config) -> Ingestion | None:
    num_bytes = arguments.bytes
    if num_bytes is None and arguments.config_file is not None:
        num_bytes = source_bytes(config)
    if num_bytes is None:
        return None
    return ingestion(num_bytes, arguments.cpus or config.runtime.data_tasks * config.runtime.cpus_per_worker)


def _draw(file: Path, plan: Plan) -> None:
    if not plan.tradeoff:
        raise ConfigError(
            "expected a training plan that fits for --svg, found none; name a CONFIG or --tokens, or lower what is asked."
        )
    picture = tradeoff_svg(
        plan.tradeoff, title=f"{plan.model}: cost of {short(plan.tokens)} tokens by time", currency=plan.site.currency
    )
    try:
        file.write_text(picture, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"expected to write the picture to {file}, found: {error}; name another file.") from error
