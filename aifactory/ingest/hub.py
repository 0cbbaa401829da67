"""Hub: the files of a dataset of the library `datasets`.

A folder that `save_to_disk` wrote is read without the library: its `state.json` names the Arrow streams in it, and where
it holds several splits `dataset_dict.json` names those. A dataset of the hub is loaded by the library into its cache,
whose Arrow streams are then read in the same way; so the machines that read its pieces must see the same cache
(HF_HOME), and the version of the library decides how its rows are divided into streams. No code of a dataset is run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import IO

from aifactory.config.sources import DatasetSource
from aifactory.errors import ConfigError
from aifactory.ingest.places import Entry, Place, open_place, stamp_of
from aifactory.ingest.reach import open_inside

_STATE = "state.json"
_SPLITS = "dataset_dict.json"
_MAX_STATE_BYTES = 16 << 20


def list_saved(section: DatasetSource) -> tuple[Place, list[Entry]]:
    """The streams of a folder that `save_to_disk` wrote, split by split.

    Raises   ConfigError if it is none, or does not have the split.
    """
    # What lies there is listed with the rest, so nothing that a file names can lead elsewhere.
    everything = section.model_copy(update={"include": ("**/*.arrow", f"**/{_STATE}", f"**/{_SPLITS}")})
    place = open_place(everything)
    entries = {entry.origin: entry for entry in place.entries()}
    splits = [""]
    if _SPLITS in entries:
        told = _read_json(place, entries[_SPLITS], section)
        names = told.get("splits")
        splits = [f"{name}/" for name in names] if isinstance(names, list) else []
    if section.split is not None:
        if f"{section.split}/" not in splits:
            raise ConfigError(
                f"expected the split {section.split!r} at ingest source {section.name!r}, found "
                f"{[split.rstrip('/') for split in splits if split] or 'a dataset without splits'}; correct it."
            )
        splits = [f"{section.split}/"]
    found: list[Entry] = []
    for split in splits:
        if split + _STATE not in entries:
            raise ConfigError(
                f"expected a folder that save_to_disk wrote at ingest source {section.name!r}, found no "
                f"{split}{_STATE} in it; save the dataset again, or read its files as another kind."
            )
        for name in _names_in(_read_json(place, entries[split + _STATE], section)):
            if split + name not in entries:
                raise ConfigError(
                    f"expected {split}{name} at ingest source {section.name!r}, found no such file; save the dataset "
                    "again."
                )
            found.append(entries[split + name])
    return open_place(section), found


def list_hub(section: DatasetSource) -> list[Entry]:
    """The streams of a dataset of the hub, in the cache of the library.

    Raises   ConfigError if the extra `hub` is not installed, or the dataset can't be had.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            "expected the library datasets for a dataset of the hub, found none; install aifactory[hub]."
        ) from error
    assert section.hub is not None
    try:
        loaded = datasets.load_dataset(section.hub, name=section.config, split=section.split, revision=section.revision)
    except Exception as error:  # the hub's and the network's errors are many
        raise ConfigError(
            f"expected the dataset {section.hub!r} of the hub at ingest source {section.name!r}, found "
            f"{type(error).__name__}: {error}; correct its id, its config, its split or its revision."
        ) from error
    splits = loaded if isinstance(loaded, dict) else {section.split or "data": loaded}
    found = []
    for split, rows in splits.items():
        for file in rows.cache_files:
            path = str(file["filename"])
            known = os.stat(path)
            found.append(Entry(f"{split}/{os.path.basename(path)}", path, known.st_size, stamp_of(known)))
    return found


def _read_json(place: Place, entry: Entry, section: DatasetSource) -> dict[str, object]:
    try:
        with place.open(entry.path) as file:
            told = json.loads(file.read(_MAX_STATE_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"expected {entry.origin} of ingest source {section.name!r} in JSON, found: {error}; save the dataset again."
        ) from error
    return told if isinstance(told, dict) else {}


def _names_in(state: dict[str, object]) -> Sequence[str]:
    files = state.get("_data_files")
    names = [file.get("filename") for file in files if isinstance(file, dict)] if isinstance(files, list) else []
    return [str(name) for name in names]


class CachePlace:
    """The cache of the library: what it says it has loaded is opened as it is."""

    def entries(self) -> list[Entry]:
        raise NotImplementedError("the library knows what belongs to a dataset: see list_hub")

    def open(self, path: str) -> IO[bytes]:
        return open_inside(path, os.path.realpath(path))
