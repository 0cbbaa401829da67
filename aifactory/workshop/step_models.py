"""The models that steps of ingest ask: what their names in the configuration stand for."""

from __future__ import annotations

from collections.abc import Iterable

from aifactory.errors import StateError
from aifactory.ingest.model_scores import StepModel, Stored
from aifactory.records.artifacts import Model
from aifactory.records.books import Books
from aifactory.records.journal import Cycle
from aifactory.records.registry import REFERENCE


class StepModels:
    """Models by the names that steps call them by: of the registry, of a folder, or of the Hub."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._folder_models: dict[str, StepModel] = {}

    def now(self) -> list[tuple[str, str]]:
        """Each name in the configuration with what it stands for now: the id of a release's model, or the digest of a folder.

        Raises   StateError for a release that is not there; ConfigError for a folder or a hub id that is not.
        """
        names = self._books.config.ingest.models
        folders = [name for name in names if not name.startswith(REFERENCE)]
        return self._books.registry.bound_models(names) + [(name, self._in_folder(name).digest) for name in folders]

    def bound(self, cycle: Cycle, names: Iterable[str]) -> tuple[dict[str, StepModel], list[Model]]:
        """The models of these names, and those of them that the factory made.

        A name of the registry stands for what it stood for when the cycle began, whatever was promoted since.
        """
        bound = dict(cycle.bound.models)
        models: dict[str, StepModel] = {}
        releases: dict[str, Model] = {}
        for name in names:
            if not name.startswith(REFERENCE):
                models[name] = self._in_folder(name)
                continue
            if name not in bound:
                raise StateError(
                    f"expected the cycle {cycle.trigger} to be bound to the model that {name} stands for, found it bound to "
                    f"{sorted(bound) or 'none'}: the steps were changed since it began. Begin a new cycle: aifactory run."
                )
            model = self._books.artifacts.get(Model, bound[name])
            releases[model.id] = model
            files = Stored(
                storage=self._books.storage,
                folder=self._books.artifacts.folder(model.kind, model.fingerprint),
                names=tuple(file.name for file in model.record.files),
            )
            models[name] = StepModel(digest=model.digest, files=files)
        return models, list(releases.values())

    def _in_folder(self, name: str) -> StepModel:
        """A model by its folder or hub id; read once."""
        if name not in self._folder_models:
            from aifactory.train.base import digest_folder, resolve_base

            folder = resolve_base(name, where="the model of a step of ingest.steps").absolute()
            self._folder_models[name] = StepModel(digest=digest_folder(folder), files=folder)
        return self._folder_models[name]
