"""The storage root: where artifacts lie, on a local path or any filesystem that pyarrow or fsspec opens.

Layout    <root>/<kind>/<fingerprint, 16 digits>/{files…, record.json}      one artifact
          <root>/runs/<fingerprint, 16 digits>/…                            checkpoints of a training run
Law       The record is written last and atomically; without it there is no artifact, and a stage that was killed
          writes the same files again under the same names. Every file appears whole or not at all: it is written
          beside its name and renamed (local), or put in one request (object stores).
Raises    StorageError.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.fs as pafs

from aifactory.errors import StorageError

RECORD_NAME = "record.json"
Content = bytes | memoryview | Sequence[bytes | memoryview]
"""The bytes of a file, in one piece or in several that follow one another."""
_PIECE_BYTES = 8 << 20
_WAITING = 16
"""Files that are put on disk at once where there are many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """One file of an artifact."""

    name: str
    """Path below the artifact's directory, with forward slashes."""
    num_bytes: int
    sha256: str


class Storage:
    """One storage root. Cheap to pickle: it holds the URI alone and opens the filesystem where it is used."""

    def __init__(self, root: str) -> None:
        scheme, separator, rest = root.partition("://")
        self.root = scheme + separator + rest.rstrip("/") if separator else str(Path(root).expanduser().absolute())
        self._opened: tuple[pafs.FileSystem, str] | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Storage) and other.root == self.root

    def __hash__(self) -> int:
        return hash(self.root)

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return Storage, (self.root,)

    @property
    def is_local(self) -> bool:
        """Whether the root is a path of this machine (or one that is mounted into it)."""
        return "://" not in self.root or self.root.startswith("file://")

    def path(self, *parts: str) -> str:
        """The URI or local path of something below the root."""
        root = self.root.removeprefix("file://") if self.is_local else self.root
        return "/".join([root, *parts])

    # ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def read_bytes(self, *parts: str) -> bytes | None:
        """The content of one file; None where there is none."""
        filesystem, base = self._filesystem()
        try:
            # As it is: by default Arrow would unpack what is called *.gz.
            with filesystem.open_input_stream("/".join([base, *parts]), compression=None) as stream:
                return bytes(stream.read())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"expected to read {self.path(*parts)}, found: {error}.") from error

    def map_bytes(self, *parts: str) -> pa.Buffer | None:
        """As `read_bytes`, without a copy on a local path: the file's pages themselves, which must not be written to."""
        if not self.is_local:
            data = self.read_bytes(*parts)
            return None if data is None else pa.py_buffer(data)
        try:
            with pa.memory_map(self.path(*parts)) as file:
                return file.read_buffer()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"expected to read {self.path(*parts)}, found: {error}.") from error

    @contextmanager
    def open_file(self, *parts: str) -> Iterator[BinaryIO]:
        """One file, open for reading anywhere in it: for whoever needs a part of a large one.

        Raises   StorageError also where there is none, and for what goes wrong while it is read.
        """
        filesystem, base = self._filesystem()
        try:
            with filesystem.open_input_file("/".join([base, *parts])) as file:
                yield file
        except (OSError, EOFError) as error:
            raise StorageError(f"expected to read {self.path(*parts)}, found: {error}.") from error

    def write_bytes(
        self, data: Content, *parts: str, durable: bool = True, on_its_way: bool = False, hashed: bool = True
    ) -> StoredFile:
        """Write one file so that it appears whole or not at all; on a local path it is on disk when this returns.

        durable      without it a power cut may take the file, or a part of it: for what can be made again
        on_its_way   that is made durable later on: the system begins to write it now, so that nobody waits then
        hashed       without it the file has no hash ("")
        """
        pieces = [data] if isinstance(data, bytes | memoryview) else data
        with self._explained(*parts):
            if self.is_local:
                _write_whole(Path(self.path(*parts)), pieces, durable=durable, on_its_way=on_its_way)
            else:
                filesystem, base = self._filesystem()
                target = "/".join([base, *parts])
                try:
                    stream = filesystem.open_output_stream(target)
                except FileNotFoundError:  # not an object store: the folder must be there first
                    filesystem.create_dir(target.rpartition("/")[0], recursive=True)
                    stream = filesystem.open_output_stream(target)
                with stream:
                    for piece in pieces:
                        stream.write(piece)
        num_bytes = sum(memoryview(piece).nbytes for piece in pieces)
        state = hashlib.sha256()
        for piece in pieces if hashed else ():
            state.update(piece)
        return StoredFile(name=parts[-1], num_bytes=num_bytes, sha256=state.hexdigest() if hashed else "")

    def duplicate(self, places: Sequence[tuple[tuple[str, ...], tuple[str, ...]]]) -> None:
        """Give files (source, target) a second place: by hard links (local; copies where the filesystem has none), else by copies.

        Several at a time, since most of it is waiting for the disk.
        """
        with ThreadPoolExecutor(_WAITING) as pool:
            for _ in pool.map(self._duplicate, *zip(*places, strict=True)) if places else ():
                pass
        if self.is_local:
            for folder in sorted({Path(self.path(*target)).parent for _, target in places}):
                sync_folder(folder)

    def _duplicate(self, source: tuple[str, ...], target: tuple[str, ...]) -> None:
        """One file; on a local path its name is not durable yet."""
        if not self.is_local:
            filesystem, base = self._filesystem()
            first, second = "/".join([base, *source]), "/".join([base, *target])
            with self._explained(*target):
                try:
                    filesystem.copy_file(first, second)
                except FileNotFoundError:  # not an object store: the folder must be there first
                    filesystem.create_dir(second.rpartition("/")[0], recursive=True)
                    filesystem.copy_file(first, second)
            return
        place = Path(self.path(*target))
        partial = place.with_name(f".{place.name}.{secrets.token_hex(6)}")
        with self._explained(*target):
            for folder in reversed(_made_folders(place)):
                sync_folder(folder.parent)
            try:
                os.link(self.path(*source), partial)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV):
                    raise
                _write_durably(place, Path(self.path(*source)).read_bytes())
                return
            try:
                with open(partial, "rb") as stream:
                    os.fsync(stream.fileno())  # the first place may not have been durable
                os.replace(partial, place)
            finally:
                partial.unlink(missing_ok=True)  # a rename onto another name of the same file leaves both

    def upload(self, folder: Path, *parts: str) -> list[StoredFile]:
        """Write every file below a local folder to a directory of the root, in order of their names."""
        files = []
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            name = file.relative_to(folder).as_posix()
            stored = self.write_bytes(file.read_bytes(), *parts, *name.split("/"))
            files.append(StoredFile(name=name, num_bytes=stored.num_bytes, sha256=stored.sha256))
        return files

    def fetch(self, names: list[str], *parts: str, version: str = "") -> Path:
        """A local folder that holds the named files of a directory: itself if it is local, else a cached copy.

        `version` tells apart what lay in the same directory at different times.
        """
        if self.is_local:
            return Path(self.path(*parts))
        cache = self._cache(*parts, version=version)
        for name in names:
            target = cache / name
            if not target.exists():
                data = self.read_bytes(*parts, *name.split("/"))
                if data is None:
                    raise StorageError(f"expected {self.path(*parts, name)}, found no such file; publish it again.")
                _write_durably(target, data)
        return cache

    def drop_cache(self, *parts: str, version: str = "") -> None:
        """Delete what this machine has fetched of a directory."""
        if not self.is_local:
            remove_folder(self._cache(*parts, version=version))

    def _cache(self, *parts: str, version: str) -> Path:
        name = hashlib.sha256(f"{self.path(*parts)}@{version}".encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"aifactory-cache-{os.getuid()}" / name

    def names(self, *parts: str, hidden: bool = False) -> list[str]:
        """Names directly below a directory, sorted, without partial files unless `hidden`; empty where there is none."""
        filesystem, base = self._filesystem()
        selector = pafs.FileSelector("/".join([base, *parts]), allow_not_found=True)
        found = (info.base_name for info in filesystem.get_file_info(selector))
        return sorted(name for name in found if hidden or not name.startswith("."))

    def size(self, *parts: str) -> int | None:
        """Bytes of one file; None where there is none."""
        filesystem, base = self._filesystem()
        info = filesystem.get_file_info("/".join([base, *parts]))
        return int(info.size) if info.type == pafs.FileType.File else None

    def written_at(self, *parts: str) -> float | None:
        """When a file, or the newest file below a directory, was written, seconds since 1970; None where there is none."""
        filesystem, base = self._filesystem()
        place = "/".join([base, *parts])
        info = filesystem.get_file_info(place)
        found = [info]
        if info.type != pafs.FileType.File:
            found = filesystem.get_file_info(pafs.FileSelector(place, allow_not_found=True, recursive=True))
        times = [one.mtime_ns for one in found if one.type == pafs.FileType.File and one.mtime_ns is not None]
        return max(times) / 1e9 if times else None

    def sizes(self, *parts: str, hidden: bool = False) -> dict[str, int]:
        """Bytes of every file below a directory, by its path below it; without partial files unless `hidden`."""
        filesystem, base = self._filesystem()
        folder = "/".join([base, *parts])
        found = filesystem.get_file_info(pafs.FileSelector(folder, allow_not_found=True, recursive=True))
        return {
            info.path.removeprefix(folder).lstrip("/"): int(info.size)
            for info in sorted(found, key=lambda info: str(info.path))
            if info.type == pafs.FileType.File and (hidden or not info.base_name.startswith("."))
        }

    def freed(self, *parts: str) -> int:
        """Bytes that would be free if a file, or a directory with all that is in it, were deleted: what has a second name stays."""
        if self.is_local:
            root = Path(self.path(*parts))
            files = [root] if root.is_file() else root.rglob("*")
            told = [file.lstat() for file in files if file.is_file()]
            return sum(one.st_size for one in told if one.st_nlink == 1)
        own = self.size(*parts)
        return sum(self.sizes(*parts, hidden=True).values()) if own is None else own

    def put_away(self, target: Sequence[str], *parts: str) -> None:
        """Take a directory from its place at once: to another one below the root (local), else it is deleted.

        Nothing happens where there is none.
        """
        if not self.is_local:
            # There is no rename; what says that something is there goes first.
            self.delete_file(*parts, RECORD_NAME)
            self.delete(*parts)
            return
        source, place = Path(self.path(*parts)), Path(self.path(*target))
        with self._explained(*parts), suppress(FileNotFoundError):
            place.parent.mkdir(parents=True, exist_ok=True)
            os.rename(source, place)
            sync_folder(source.parent)

    def copy_from(self, other: Storage, source: Sequence[str], target: Sequence[str]) -> StoredFile:
        """Copy one file of another root, piece by piece; it appears whole or not at all.

        Raises   StorageError where there is none.
        """
        digest, size = hashlib.sha256(), 0
        filesystem, base = self._filesystem()
        place = "/".join([base, *target])
        with other.open_file(*source) as stream, self._explained(*target):
            if self.is_local:
                final = Path(place)
                new_folders = _made_folders(final)
                partial = final.with_name(f".{final.name}.{secrets.token_hex(6)}")
                try:
                    with open(partial, "wb") as written:
                        while piece := stream.read(_PIECE_BYTES):
                            digest.update(piece)
                            size += written.write(piece)
                        written.flush()
                        os.fsync(written.fileno())
                    os.replace(partial, final)
                finally:
                    partial.unlink(missing_ok=True)
                _sync_names(final, new_folders)
            else:
                try:
                    sink = filesystem.open_output_stream(place)
                except FileNotFoundError:  # not an object store: the folder must be there first
                    filesystem.create_dir(place.rpartition("/")[0], recursive=True)
                    sink = filesystem.open_output_stream(place)
                with sink:
                    while piece := stream.read(_PIECE_BYTES):
                        digest.update(piece)
                        size += sink.write(piece)
        return StoredFile(name=target[-1], num_bytes=size, sha256=digest.hexdigest())

    def delete(self, *parts: str) -> None:
        """Delete a directory with all that is in it; nothing happens where there is none."""
        filesystem, base = self._filesystem()
        with suppress(FileNotFoundError):
            filesystem.delete_dir("/".join([base, *parts]))

    def delete_file(self, *parts: str) -> None:
        """Delete one file; nothing happens where there is none."""
        filesystem, base = self._filesystem()
        with suppress(FileNotFoundError):
            filesystem.delete_file("/".join([base, *parts]))

    def delete_any(self, *parts: str) -> None:
        """Delete a file, or a directory with all that is in it; nothing happens where there is neither."""
        filesystem, base = self._filesystem()
        info = filesystem.get_file_info("/".join([base, *parts]))
        if info.type == pafs.FileType.Directory:
            self.delete(*parts)
        elif info.type == pafs.FileType.File:
            self.delete_file(*parts)

    def make_folder(self, *parts: str) -> str:
        """Create a directory (a no-op on object stores) and return its path."""
        if self.is_local:
            with self._explained(*parts):
                Path(self.path(*parts)).mkdir(parents=True, exist_ok=True)
        return self.path(*parts)

    # ── how ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _filesystem(self) -> tuple[pafs.FileSystem, str]:
        if self._opened is None:
            self._opened = (pafs.LocalFileSystem(), self.path()) if self.is_local else _open(self.root)
        return self._opened

    @contextmanager
    def _explained(self, *parts: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageError(
                    f"expected room for {self.path(*parts)}, found the disk or the quota full; what was published is "
                    "intact: free some room and run the same command again."
                ) from error
            raise StorageError(f"expected to write {self.path(*parts)}, found: {error}.") from error


def _open(root: str) -> tuple[pafs.FileSystem, str]:
    try:
        filesystem, path = pafs.FileSystem.from_uri(root)
        return filesystem, path
    except (ValueError, OSError) as arrow_error:
        try:
            import fsspec

            filesystem, path = fsspec.core.url_to_fs(root)
        except (ImportError, ValueError) as error:
            raise StorageError(
                f"expected a path or a URI that pyarrow or fsspec opens, found {root!r}: {arrow_error}; {error}."
            ) from error
        return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


def _write_durably(target: Path, data: bytes) -> None:
    _write_whole(target, [data], durable=True)


def _write_whole(
    target: Path, pieces: Sequence[bytes | memoryview], *, durable: bool, on_its_way: bool = False
) -> None:
    new_folders = _made_folders(target)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(6)}")
    try:
        with open(partial, "wb") as stream:
            for piece in pieces:
                stream.write(piece)
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
            elif on_its_way and hasattr(os, "posix_fadvise"):
                # Linux begins to write what is not on disk yet and does not wait for it.
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if durable:
        _sync_names(target, new_folders)


def _made_folders(target: Path) -> list[Path]:
    """Make the folders above a file; those that were not there before."""
    new_folders = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    return new_folders


def _sync_names(target: Path, new_folders: list[Path]) -> None:
    """Make the name of a file durable, and those of the folders that were made for it."""
    for folder in [target.parent, *(folder.parent for folder in new_folders)]:
        sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Make the names in a local folder durable; without it a rename may be forgotten by a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_folder(folder: Path) -> None:
    """Delete a local scratch folder, whatever is in it."""
    shutil.rmtree(folder, ignore_errors=True)


def describe(value: Any) -> str:
    """A short form of a value for error messages."""
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
