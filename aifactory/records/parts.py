"""Parts: what was made from one part of the data, by the fingerprint of what it was made from.

A stage that works part by part publishes every part here before it puts them together. So a run that was killed goes on
at the part where it stood, and over data of which a little has changed only the parts of that little are made anew.

Layout   <root>/parts/<first 2 digits>/<first 32 digits of the fingerprint>/{files…, part.json}
Law      part.json is written last; without it, or where it can't be read or a file has not the size that it says (a power
         cut may take what can be made again), there is no part. An artifact takes a part's files over by a hard link, or
         by a copy inside the object store; files are replaced and never written in place, so neither sees the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from aifactory.errors import StorageError
from aifactory.records.storage import Content, Storage, StoredFile

_RECORD = "part.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What was made from one part of the data."""

    fingerprint: str
    files: Mapping[str, StoredFile]
    figures: Mapping[str, Any]
    """What was counted; plain JSON."""


class PartStore:
    """The parts in one storage root. Cheap to pickle."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def find(self, fingerprint: str) -> Part | None:
        """The part that was made from what this fingerprint stands for, or None."""
        data = self.storage.read_bytes(*_folder(fingerprint), _RECORD)
        if data is None:
            return None
        try:
            values = json.loads(data)
            files = {name: StoredFile(**file) for name, file in values["files"].items()}
            part = Part(fingerprint=fingerprint, files=files, figures=values["figures"])
        except (ValueError, TypeError, KeyError, AttributeError):
            return None  # a power cut may leave the record without its content: what it was of is made anew
        whole = all(self.storage.size(*_folder(fingerprint), name) == file.num_bytes for name, file in files.items())
        return part if whole else None

    def publish(
        self,
        fingerprint: str,
        files: Mapping[str, Content],
        figures: Mapping[str, Any],
        *,
        to_be_taken: bool = False,
        hashed: bool = True,
    ) -> Part:
        """Write a part; from then on it is found.

        to_be_taken   an artifact takes its files over as soon as all parts are there
        hashed        without it its files have no hashes, and no artifact can take them: for what the next pass reads and
                      nobody else does
        """
        stored = {
            name: self.storage.write_bytes(
                data, *_folder(fingerprint), name, durable=False, on_its_way=to_be_taken, hashed=hashed
            )
            for name, data in files.items()
        }
        record = {"files": {name: asdict(file) for name, file in stored.items()}, "figures": figures}
        self.storage.write_bytes(
            json.dumps(record, sort_keys=True).encode(), *_folder(fingerprint), _RECORD, durable=False
        )
        return Part(fingerprint=fingerprint, files=stored, figures=figures)

    def read(self, part: Part, name: str) -> bytes:
        """The content of one file of a part. Raises StorageError where it is gone."""
        return bytes(self._there(part, name, self.storage.read_bytes(*_folder(part.fingerprint), name)))

    def map(self, part: Part, name: str) -> pa.Buffer:
        """The same without a copy where it lies on this machine."""
        return self._there(part, name, self.storage.map_bytes(*_folder(part.fingerprint), name))

    def _there(self, part: Part, name: str, data: Any) -> Any:
        if data is None:
            raise StorageError(
                f"expected {self.storage.path(*_folder(part.fingerprint), name)}, found no such file; delete its directory "
                "and run the same command again: the part is made anew."
            )
        return data

    def take(self, wanted: Sequence[tuple[Part, str, tuple[str, ...]]]) -> list[StoredFile]:
        """Put files of parts (part, name, target) at other places below the root, as they are, without reading them."""
        assert all(part.files[name].sha256 for part, name, _ in wanted), "what an artifact takes has a hash"
        self.storage.duplicate([((*_folder(part.fingerprint), name), target) for part, name, target in wanted])
        files = [(part.files[name], target) for part, name, target in wanted]
        return [StoredFile(name=target[-1], num_bytes=file.num_bytes, sha256=file.sha256) for file, target in files]


def made(
    store: PartStore,
    run: Callable[[Callable[..., None], Sequence[tuple[Any, ...]]], object],
    make: Callable[..., None],
    wanted: Sequence[tuple[str, tuple[Any, ...]]],
) -> list[Part]:
    """The parts with these fingerprints, in their order; what is not there yet `run` makes by `make(fingerprint, ...)`."""
    missing = {fingerprint: items for fingerprint, items in wanted if store.find(fingerprint) is None}
    run(make, [(fingerprint, *items) for fingerprint, items in missing.items()])
    found = [store.find(fingerprint) for fingerprint, _ in wanted]
    assert all(part is not None for part in found), "every task publishes its part"
    return [part for part in found if part is not None]


def _folder(fingerprint: str) -> tuple[str, str, str]:
    return "parts", fingerprint[:2], fingerprint[:32]
