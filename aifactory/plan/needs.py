"""Needs: what a configuration asks for, in the planner's terms."""

from __future__ import annotations

import json
from pathlib import Path

from aifactory.config import Config, FileSource, Lora
from aifactory.errors import ConfigError
from aifactory.plan.accelerators import Accelerator
from aifactory.plan.layout import Step
from aifactory.plan.shapes import ModelShape, shape_named, shape_of_architecture
from aifactory.plan.training import TrainingNeed


def shape_of(config: Config, model: str | None) -> tuple[str, ModelShape]:
    """The model's name and shape: the one that is named, else the configuration's base or its own architecture.

    Raises   ConfigError where nothing here says what it is.
    """
    named = model or config.model.base
    if named is None:
        shape = shape_of_architecture(config.model.architecture, _vocabulary(config.tokenize.tokenizer, config))
        return config.name, shape
    if named.startswith("registry:"):
        raise ConfigError(
            f"expected a model whose shape can be read without the factory's books, found model.base: {named}; name its folder "
            "or its published name with --model."
        )
    return Path(named).name, shape_named(named)


def require_context(config: Config, model: str | None, tokens: int, what: str) -> None:
    """Raise ConfigError where a model from scratch is made for shorter sequences than are asked of it."""
    longest = config.model.architecture.context_length
    if model is None and config.model.base is None and tokens > longest:
        raise ConfigError(
            f"expected {what} of at most model.architecture.context_length, found {tokens:,} and {longest:,}; lower the first or "
            "raise the second."
        )


def training_need(
    config: Config, shape: ModelShape, accelerator: Accelerator, *, tokens: float | None, tensor: int, pipeline: int
) -> TrainingNeed:
    """A run of the section `train`, or of so many tokens.

    Raises   ConfigError for what plans don't know on this accelerator.
    """
    train, runtime = config.train, config.runtime
    execution = runtime.execution
    if accelerator.kind == "gpu" and train.precision == "fp32":
        raise ConfigError(
            f"expected train.precision auto, bf16 or fp8 for a plan on {accelerator.name}, found fp32: plans know products in bf16; "
            "change it."
        )
    step = Step(
        row_len=config.tokenize.row_len,
        micro_batch_rows=train.micro_batch_rows or runtime.micro_batch_rows,
        activations=execution.activations,
        is_compiled=execution.compile,
        loss="plain" if execution.loss == "plain" or train.is_preference else "pieces",
        attention="mask" if execution.attention == "mask" else "varlen",
        gradient_bytes=2 if execution.gradients == "bf16" else 4,
        trained_share=1.0 if train.lora is None else adapter_weights(shape, train.lora) / shape.parameters,
    )
    steps = train.max_steps if tokens is None else max(1, round(tokens / (train.global_batch_rows * step.row_len)))
    return TrainingNeed(
        shape=shape,
        steps=steps,
        global_batch_rows=train.global_batch_rows,
        step=step,
        shard=runtime.parallel,
        shard_groups=runtime.shard_workers,
        tensor=tensor,
        pipeline=pipeline,
        checkpoint_every_steps=runtime.checkpoint_every_steps,
    )


def adapter_weights(shape: ModelShape, lora: Lora) -> int:
    """Numbers of the two thin matrices beside each chosen one."""
    hidden, inner = shape.hidden, shape.intermediate
    sides = {
        "q_proj": (hidden, shape.width),
        "k_proj": (hidden, shape.kv_width),
        "v_proj": (hidden, shape.kv_width),
        "o_proj": (shape.width, hidden),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
        **({"gate_proj": (hidden, inner)} if shape.gated else {}),
    }
    names = tuple(sides) if lora.target_modules == "all-linear" else lora.target_modules
    if unknown := [name for name in names if name not in sides]:
        raise ConfigError(
            f"expected names of {', '.join(sides)} in train.lora.target_modules for a plan, found {', '.join(unknown)}; correct "
            "them."
        )
    return shape.layers * sum(lora.rank * sum(sides[name]) for name in names)


def source_bytes(config: Config) -> float | None:
    """Bytes of all sources' files, where all of them are files of this machine; None otherwise: a plan asks no network.

    Raises   ConfigError where one of them is not there.
    """
    from aifactory.ingest.places import open_place

    total = 0.0
    for source in config.ingest.sources:
        if not isinstance(source, FileSource) or "://" in source.path or getattr(source, "hub", None):
            return None
        total += sum(entry.num_bytes for entry in open_place(source).entries())
    return total


def left_out(config: Config, shape: ModelShape) -> list[str]:
    """What the configuration asks for and a plan does not reckon."""
    found = []
    if config.train.is_preference:
        found.append(
            f"train.objective: {config.train.objective} is reckoned as one answer a row; its reference model's forward passes are not"
        )
    if config.train.precision == "fp8":
        found.append("train.precision: fp8 is reckoned as bf16, which takes longer")
    if shape.experts > 1:
        found.append("no run of a model with experts was compared with a plan")
    if len(config.train.candidates) > 1:
        found.append(f"one of {len(config.train.candidates)} train.candidates is reckoned")
    if config.train.is_across_workers:
        found.append("what train.reproducible: across_workers costs is not reckoned")
    return found


def _vocabulary(tokenizer: str, config: Config) -> int:
    if tokenizer == "train":
        return config.tokenize.vocab_size
    file = Path(tokenizer) / "tokenizer.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return len(values["model"]["vocab"]) + sum(
            token["content"] not in values["model"]["vocab"] for token in values.get("added_tokens", ())
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"expected a tokenizer.json with a vocabulary at tokenize.tokenizer, {file}, found: {error!r}; name its folder."
        ) from error
