"""Adapters beside a release: found by the configuration, checked, and put on its engine before it takes requests.

    runtime.endpoint.adapters ─find─▶ folder ─fit?─▶ engine ─parity?─▶ Served.adapters, by name
                                                └────────┴─ no ─▶ not served with this release; the journal says why

An adapter changes the weights that it was trained beside. Where the model into which it was merged is known, its golden
answers tell whether these are those weights; of an adapter that came alone, only names and shapes can be compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from aifactory.engine.golden import GOLDEN_NAME, check_golden_adapter
from aifactory.engine.protocol import Engine
from aifactory.errors import ConfigError
from aifactory.observe.events import log_event
from aifactory.records.artifacts import Model
from aifactory.records.books import Books
from aifactory.records.identity import hash_text
from aifactory.records.registry import REFERENCE, Release
from aifactory.text.tokenizer import TextTokenizer

ADAPTER_FOLDER = "adapter"
"""Where an exported model has the adapter that was merged into it."""
_CONFIG_NAME = "adapter_config.json"
_WEIGHTS_NAME = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedAdapter:
    """An adapter beside a release."""

    name: str
    release: Release
    digest: str
    """SHA-256 over its two files."""
    origin: str | None = None
    """Id of the model that was exported with it, where the factory made it."""

    @property
    def model(self) -> str:
        """What answers call it: the release, and the name."""
        return f"{self.release.name}:{self.name}"

    @property
    def fingerprint(self) -> str:
        """What answers carry as `system_fingerprint`: it changes if the release's model or the adapter does."""
        return "fp_" + hash_text(f"{self.release.model}:{self.digest}")[:12]


def put_on(
    engine: Engine, tokenizer: TextTokenizer, release: Release, books: Books
) -> tuple[Mapping[str, ServedAdapter | None], frozenset[str]]:
    """The adapters that the engine of a release now has, by name, None for one that is the release itself; and the names of
    those that it does not have, of which the log and the journal say why."""
    adapters: dict[str, ServedAdapter | None] = {}
    refused = set()
    for name, place in books.config.runtime.endpoint.adapters.items():
        try:
            adapters[name] = _put_one(name, place, engine, tokenizer, release, books)
        except Exception as error:  # whatever is wrong with an adapter, the release is served
            refused.add(name)
            detail = {"adapter": name, "place": place, "reason": f"{type(error).__name__}: {error}"}
            log_event("adapter_refused", release=release.name, **detail)
            books.journal.write("adapter_refused", subject=release.name, detail=detail)
    return adapters, frozenset(refused)


def _put_one(
    name: str, place: str, engine: Engine, tokenizer: TextTokenizer, release: Release, books: Books
) -> ServedAdapter | None:
    origin = None
    if place.startswith(REFERENCE):
        ((_, model_id),) = books.registry.bound_models([place])
        if model_id == release.model:
            # It is in the weights already.
            return None
        origin = model_id
        model = books.artifacts.get(Model, model_id)
        names = [f.name for f in model.record.files if f.name == GOLDEN_NAME or f.name.startswith(ADAPTER_FOLDER + "/")]
        merged = books.artifacts.fetch(model, names)
    else:
        merged = Path(place).expanduser()
    folder = next((each for each in (merged / ADAPTER_FOLDER, merged) if (each / _CONFIG_NAME).is_file()), None)
    if folder is None:
        raise ConfigError(
            f"Expected {_CONFIG_NAME} or {ADAPTER_FOLDER}/{_CONFIG_NAME} in {merged}, found none. Name the folder of an "
            "adapter, or a model that was trained with train.lora."
        )
    engine.add_adapter(name, folder)
    # Of an adapter that came alone nothing says which weights it was trained beside.
    if folder.name == ADAPTER_FOLDER and (folder.parent / GOLDEN_NAME).is_file():
        tolerance = books.config.promote.parity_tolerance
        check_golden_adapter(folder.parent, engine, tokenizer, adapter=name, tolerance=tolerance)
    state = hashlib.sha256()
    for each in (_CONFIG_NAME, _WEIGHTS_NAME):
        state.update(hashlib.sha256((folder / each).read_bytes()).digest())
    return ServedAdapter(name=name, release=release, digest=state.hexdigest(), origin=origin)
