"""Recipes as records keep them, read back into the configuration by which an artifact was made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from aifactory.config import (
    Architecture,
    Config,
    Evaluate,
    FeedbackSource,
    FeedbackTrust,
    HoldoutStratum,
    Improve,
    Source,
    Step,
    StepExecution,
    Tokenize,
    Train,
)
from aifactory.records.artifacts import Artifact, Corpus, Model, Record, Scorecard, TokenSet
from aifactory.records.books import Books
from aifactory.records.journal import Cycle
from aifactory.records.registry import REFERENCE


class NotRebuildableError(Exception):
    """Why an artifact can't be made again here."""


class Recorded:
    """What records and cycles of a factory say of how its artifacts were made."""

    def __init__(self, books: Books, today: Config) -> None:
        """`today` says where things are, and is what holds where nothing was recorded."""
        self._books = books
        self._today = today

    def config_of(self, artifact: Artifact, cycle: Cycle) -> Config:
        """The configuration by which it was made: recipes of the records, places of today, the recorded execution."""
        config, recipe = self._today, artifact.record.recipe
        told = cycle.recipe
        update: dict[str, Any] = {
            name: section.model_validate(self._with_places(told[name]))
            for name, section in (
                ("train", Train),
                ("tokenize", Tokenize),
                ("evaluate", Evaluate),
                ("improve", Improve),
            )
            if name in told
        }
        if "chat_fallback" in recipe:
            update["serve"] = config.serve.model_copy(update={"chat_fallback": recipe["chat_fallback"]})
        if isinstance(artifact, Corpus):
            update["ingest"] = config.ingest.model_copy(update=self._ingest_of(artifact, cycle))
            improve = update.get("improve", config.improve)
            trust = recipe.get("trust")
            as_then = {
                "holdout_share": recipe["holdout_share"],
                "trust": None if trust is None else FeedbackTrust.model_validate(trust),
            }
            update["improve"] = improve.model_copy(update=as_then)
        elif isinstance(artifact, TokenSet):
            names = [name for name in Tokenize.model_fields if name in recipe]
            tokenize = update.get("tokenize", config.tokenize)
            update["tokenize"] = tokenize.model_copy(update={name: recipe[name] for name in names})
        elif isinstance(artifact, Model) and "architecture" in recipe:
            architecture = Architecture.model_validate(recipe["architecture"])
            update["model"] = config.model.model_copy(update={"architecture": architecture})
        elif isinstance(artifact, Scorecard):
            values = {name: recipe[name] for name in Evaluate.model_fields if name in recipe}
            update["evaluate"] = Evaluate.model_validate(self._with_places(values))
        update["runtime"] = self._runtime_of(artifact.record)
        return config.model_copy(update=update)

    def _with_places(self, section: Mapping[str, Any]) -> dict[str, Any]:
        """A recorded section, with what bears no identity as the configuration of today has it."""
        today, told = self._today.evaluate, dict(section)
        if (judge := told.pop("judge", None)) is not None and today.judge is not None:
            places = {"url", "api_key", "labelled", "timeout_s", "concurrency"}
            told["judge"] = {**judge, **today.judge.model_dump(include=places)}
        if (tasks := told.pop("lm_eval", None)) is not None and today.lm_eval is not None:
            tasks = {name: value for name, value in tasks.items() if name != "include"}
            places = {"include_path", "batch_size", "timeout_s"}
            told["lm_eval"] = {**tasks, **today.lm_eval.model_dump(include=places)}
        return told  # where there is nobody to ask, what is made is told apart by its identity

    def _ingest_of(self, corpus: Corpus, cycle: Cycle) -> dict[str, Any]:
        recipe = corpus.record.recipe
        digests = {}
        for name, bound in cycle.bound.models:
            digests[self._books.artifacts.get(Model, bound).digest if name.startswith(REFERENCE) else bound] = name
        steps = []
        for step in recipe["steps"]:
            plain = {name: value for name, value in step.items() if name not in ("model_digest", "function_source")}
            if "model_digest" in step:
                if step["model_digest"] not in digests:
                    raise NotRebuildableError(
                        f"the model that the step {step['step']} of {corpus.id} asked (sha256 {step['model_digest'][:16]}) is "
                        f"none to which {cycle.trigger} was bound"
                    )
                plain["model"] = digests[step["model_digest"]]
            steps.append(TypeAdapter(Step).validate_python(plain))
        values: dict[str, Any] = {
            "steps": tuple(steps),
            "holdout_share": recipe["holdout_share"],
            "holdout_strata": tuple(HoldoutStratum.model_validate(each) for each in recipe["holdout_strata"]),
        }
        if "sources" in recipe:
            values["sources"] = tuple(self._source_of(each, corpus) for each in recipe["sources"])
        return values

    def _source_of(self, recorded: Mapping[str, Any], corpus: Corpus) -> Source:
        """A source by its recorded recipe, at the place that the configuration names today."""
        config = self._books.config
        today = next((source for source in config.ingest.sources if source.name == recorded["name"]), None)
        if today is None or today.kind != recorded["kind"]:
            raise NotRebuildableError(
                f"the configuration names no source {recorded['name']!r} of kind {recorded['kind']} any more, of which {corpus.id} "
                "was made"
            )
        places = {name: value for name, value in today.model_dump(mode="json").items() if name not in today.recipe()}
        source: Source = TypeAdapter(Source).validate_python({**places, **recorded})
        if isinstance(source, FeedbackSource):
            return source.belonging_to(config.name, self._books.database.url.render_as_string(hide_password=False))
        return source

    def base_of(self, cycle: Cycle) -> Path:
        from aifactory.train.base import resolve_base

        base = self.base_name(cycle)
        if base is None:
            raise NotRebuildableError(f"{cycle.trigger} does not say from which model training began")
        return resolve_base(base)

    def base_name(self, cycle: Cycle) -> str | None:
        base: str | None = cycle.recipe.get("model", {}).get("base", self._books.config.model.base)
        return base

    def _runtime_of(self, record: Record) -> Any:
        """Workers, threads, micro-batch and how a step is computed, as recorded."""
        runtime, told = self._today.runtime, record.execution
        update: dict[str, Any] = {name: told[name] for name in ("workers", "micro_batch_rows") if name in told}
        if isinstance(update.get("workers"), list):
            update["workers"] = tuple(update["workers"])
        if told.get("parallel") in ("ddp", "fsdp"):
            update["parallel"] = told["parallel"]
        if "step" in told:
            update["execution"] = StepExecution.model_validate(told["step"])
        if "threads_per_worker" in told and max(1, int(runtime.cpus_per_worker)) != told["threads_per_worker"]:
            update["cpus_per_worker"] = float(told["threads_per_worker"])
        # What is seen by the way changes no weight; where training stops early the recipe says so.
        update["validate_every_steps"] = None
        return runtime.model_copy(update=update)
