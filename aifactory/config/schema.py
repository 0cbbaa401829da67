"""The schema of the YAML as a whole: what makes a model (the recipe), and how and where it runs (the runtime)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, model_validator

from aifactory.config.data import Ingest, Tokenize
from aifactory.config.judge import Judge
from aifactory.config.lm_eval import LmEval
from aifactory.config.reading import read_file, read_text
from aifactory.config.recipe import Evaluate, Improve, ModelBase, PromoteGate, Serve, Traffic, Train
from aifactory.config.runtime import Runtime
from aifactory.config.section import Section


class Config(Section):
    """A whole configuration."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")
    """The factory's name: its namespace in Ray, the storage root and the database. No default."""
    ingest: Ingest
    """Sources to a Corpus."""
    tokenize: Tokenize = Tokenize()
    """Corpus to a TokenSet."""
    model: ModelBase = ModelBase()
    """What training starts from."""
    train: Train = Train()
    """TokenSets to a Model."""
    evaluate: Evaluate = Evaluate()
    """Model to a Scorecard."""
    promote: PromoteGate = PromoteGate()
    """Scorecard to a Release."""
    serve: Serve = Serve()
    """Release to an endpoint."""
    improve: Improve = Improve()
    """Completions and feedback to a decision."""
    traffic: Traffic | None = None
    """Simulated users; `run` then goes on after the first release until the loop has closed. Default: none."""
    runtime: Runtime = Runtime()
    """How and where it runs."""

    @model_validator(mode="after")
    def _mixture_names_the_sources(self) -> Config:
        names = {source.name for source in self.ingest.sources}
        for mixture in (self.train.mixture, *(recipe.mixture for recipe in self.train.recipes())):
            if mixture and set(mixture) != names:
                raise ValueError(
                    f"expected train.mixture to name the sources {sorted(names)}, found {sorted(mixture)}; mend one"
                )
            if mixture and not any(share.weight for share in mixture.values()):
                raise ValueError("expected a weight above 0 in train.mixture, found none; raise one")
        return self

    @model_validator(mode="after")
    def _starts_from_a_model(self) -> Config:
        adapts = any(recipe.lora for recipe in self.train.recipes())
        asked = f"objective: {self.train.objective}" if self.train.is_preference else "lora" if adapts else ""
        if asked and self.model.base is None:
            raise ValueError(f"expected model.base beside train.{asked}, which begins with a trained model; name one")
        return self

    @model_validator(mode="after")
    def _across_workers_leaves_nothing_to_the_runtime(self) -> Config:
        if any(recipe.is_across_workers for recipe in (self.train, *self.train.recipes())):
            for name in ("micro_batch_rows", "parallel", "shard_workers", "execution"):
                # By value: a configuration that was handed on to a job has every field set.
                if getattr(self.runtime, name) != Runtime.model_fields[name].default:
                    raise ValueError(
                        f"expected no runtime.{name} beside train.reproducible: across_workers, which decides it, found "
                        f"{getattr(self.runtime, name)!r}; leave it out"
                    )
        return self

    @model_validator(mode="after")
    def _early_stopping_says_what_is_validated(self) -> Config:
        if self.train.early_stopping is not None and self.runtime.validate_every_steps is not None:
            raise ValueError(
                "expected no runtime.validate_every_steps beside train.early_stopping, whose every_steps says it, found "
                f"{self.runtime.validate_every_steps}; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _answers_are_judged_by_a_judge(self) -> Config:
        if self.improve.live_judge is not None and self.evaluate.judge is None:
            raise ValueError("expected evaluate.judge beside improve.live_judge, found none; say which judge")
        return self

    @model_validator(mode="after")
    def _preferences_take_the_plain_way(self) -> Config:
        if self.train.is_preference and self.runtime.execution.loss == "pieces":
            raise ValueError(
                f"expected no runtime.execution.loss: pieces beside train.objective: {self.train.objective}, which compares "
                "answers one by one; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _any_number_of_elastic_workers_will_do(self) -> Config:
        numbers = range(self.runtime.least_workers, self.runtime.most_workers + 1)
        rows, train = self.train.global_batch_rows, self.train
        if len(numbers) > 1:
            # A node may be lost at any time, and the workers that are left must be able to share the batch.
            wrong = [n for n in numbers if n > rows]
            if train.is_across_workers:
                wrong = [n for n in numbers if n & (n - 1) or n > rows // (train.micro_batch_rows or 1)]
            elif self.runtime.parallel == "fsdp":
                wrong = [n for n in numbers if rows % n]
            if wrong:
                raise ValueError(
                    f"expected a batch of {rows} rows (train.global_batch_rows) that every number of workers of runtime.workers "
                    f"{[numbers[0], numbers[-1]]} can share, found that {wrong[0]} can't; change one of them, or take "
                    "runtime.parallel: ddp without reproducible: across_workers, which shares any"
                )
        return self

    @model_validator(mode="after")
    def _adapters_have_names_of_their_own(self) -> Config:
        taken = re.compile(rf"{re.escape(self.name)}(-r\d+)?")
        for name in self.runtime.endpoint.adapters:
            if taken.fullmatch(name):
                raise ValueError(
                    f"expected names in runtime.endpoint.adapters that are neither the factory's nor a release's, found "
                    f"{name!r}; choose another"
                )
        return self

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
        """Read `path` and apply dotted overrides such as `train.max_steps=10`.

        Raises   ConfigError with the file and the line, or the override, that is wrong.
        """
        return read_file(cls, Path(path), overrides)

    @classmethod
    def from_text(cls, text: str, *, origin: str, overrides: Sequence[str] = ()) -> Config:
        """As `from_yaml`, for a text that came from `origin`."""
        return read_text(cls, text, origin, overrides)

    def recipe(self, *sections: str) -> dict[str, Any]:
        """The named sections as plain JSON, without what bears no identity (paths of sources, names of the steps' models)."""
        plain: dict[str, Any] = {}
        for section in sections:
            assert section != "runtime", "the runtime bears no identity"
            value = getattr(self, section)
            plain[section] = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
        if "ingest" in plain:
            plain["ingest"]["sources"] = [source.recipe() for source in self.ingest.sources]
            plain["ingest"]["steps"] = [step.recipe() for step in self.ingest.steps]
        if isinstance(self.evaluate.judge, Judge) and "evaluate" in plain:
            plain["evaluate"]["judge"] = self.evaluate.judge.recipe()
        if isinstance(self.evaluate.lm_eval, LmEval) and "evaluate" in plain:
            plain["evaluate"]["lm_eval"] = self.evaluate.lm_eval.recipe()
        if self.traffic is not None and "traffic" in plain:
            plain["traffic"]["source"] = self.traffic.source.recipe()
        return plain


def schema_json() -> str:
    """The JSON schema of a configuration, for editors."""
    return json.dumps(Config.model_json_schema(), indent=2) + "\n"
