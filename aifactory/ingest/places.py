"""Places: where the files of a source lie, and how one is opened: this machine, an object store, the web."""

from __future__ import annotations

import fnmatch
import os
import re
import sysconfig
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Protocol

from pyarrow import fs as pafs

from aifactory.config import expand_environment
from aifactory.config.sources import FileSource, Option
from aifactory.errors import ConfigError
from aifactory.ingest.reach import check_uri, download, is_inside, open_inside, without_secrets

PYTHON_STDLIB = "python:stdlib"
INCLUDE: dict[str, tuple[str, ...]] = {
    "code": ("**/*.py",),
    "text": ("**/*.txt", "**/*.md"),
    "markdown": ("**/*.md", "**/*.markdown", "**/*.mdx"),
    "html": ("**/*.html", "**/*.htm", "**/*.xhtml"),
    "pdf": ("**/*.pdf",),
    "jsonl": ("**/*.{jsonl,ndjson}", "**/*.{jsonl,ndjson}.{gz,zst,bz2}"),
    "csv": ("**/*.{csv,tsv}", "**/*.{csv,tsv}.{gz,zst,bz2}"),
    "parquet": ("**/*.parquet",),
    "warc": ("**/*.warc", "**/*.warc.{gz,zst}"),
    "dataset": ("**/*.arrow",),
}
"""The files that a kind implies."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a source, as its place tells of it."""

    origin: str
    """Path below the source's, with forward slashes; bytes of a name that are no UTF-8 are escaped."""
    path: str
    """What opens it."""
    num_bytes: int
    stamp: tuple[int | str, ...]
    """What changes when the content does, as far as the place can tell without reading; empty if it can't."""


class Place(Protocol):
    """Where the files of a source lie."""

    def entries(self) -> list[Entry]:
        """The wanted files, in the order of their names."""
        ...

    def open(self, path: str) -> IO[bytes]:
        """A file of the place, to be read from anywhere in it."""
        ...


def open_place(source: FileSource) -> Place:
    """The place of a source.

    Raises   ConfigError if there is nothing, or nothing that the source may open.
    """
    uri = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", source.path, re.DOTALL)
    if uri is None or uri[1].lower() == "file":
        return _local(source, source.path if uri is None else _path_of_file_uri(source, uri[2]))
    if uri[1].lower() in ("http", "https"):
        return _Web(source)
    return _store(source)


def choose(origins: Sequence[str], source: FileSource, include: Sequence[str]) -> list[bool]:
    """Which of the files a source wants."""
    globs = source.include or include or INCLUDE[source.kind]
    return [_matches(origin, globs) and not _matches(origin, source.exclude) for origin in origins]


def no_files(source: FileSource, include: Sequence[str], where: str) -> ConfigError:
    """The error of a source without a file."""
    patterns = ", ".join(source.include or include or INCLUDE[source.kind])
    return ConfigError(
        f"expected files that match {patterns} at ingest source {source.name!r}, found none below {where}."
    )


def nothing_there(source: FileSource, where: str) -> ConfigError:
    """The error of a source that is not there."""
    return ConfigError(
        f"expected a file or a folder at ingest source {source.name!r}, found nothing at {where}; correct its path."
    )


# ── this machine ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _path_of_file_uri(source: FileSource, rest: str) -> str:
    host, slash, path = rest.partition("/")
    if host not in ("", "localhost"):
        raise ConfigError(
            f"expected a file of this machine at ingest source {source.name!r}, found one of {host!r}; mount it, or "
            "write a URI of its store."
        )
    return slash + path


def _local(source: FileSource, text: str) -> Place:
    if text == PYTHON_STDLIB:
        return _Local(source, Path(sysconfig.get_paths()["stdlib"]), ())
    path = Path(text).expanduser()
    if os.path.lexists(path) or not re.search(r"[*?\[{]", text):
        return _Local(source, path, ())
    root, pattern = _split_glob(str(path))
    return _Local(source, Path(root or "."), (pattern,))


def _split_glob(text: str) -> tuple[str, str]:
    """The folder before the first wildcard, and the pattern below it."""
    before = re.split(r"[*?\[{]", text, maxsplit=1)[0]
    folder = before.rpartition("/")[0]
    if before.startswith("/") and not folder:
        folder = "/"
    return folder, text[len(folder) :].lstrip("/")


class _Local:
    """A file or a folder of this machine (or one that is mounted into it)."""

    def __init__(self, source: FileSource, root: Path, include: tuple[str, ...]) -> None:
        self._source = source
        self._root = root
        self._resolved = os.path.realpath(root)
        self._include = include

    def entries(self) -> list[Entry]:
        if not os.path.exists(self._root):
            raise nothing_there(self._source, str(self._root))
        if not self._root.is_dir():  # named itself, so wanted whatever its ending
            if not self._root.is_file():
                raise ConfigError(
                    f"expected a regular file or a folder at ingest source {self._source.name!r}, found neither at "
                    f"{self._root}; correct its path."
                )
            return [_entry(str(self._root), _escaped(self._root.name))]
        found = sorted(self._walk(), key=lambda entry: entry.origin.split("/"))
        if not found:
            raise no_files(self._source, self._include, str(self._root))
        return found

    def open(self, path: str) -> IO[bytes]:
        return open_inside(path, self._resolved)

    def _walk(self) -> Iterator[Entry]:
        """The wanted files, without entering folders of which everything is excluded."""
        whole_folders = [glob for glob in self._source.exclude if glob.endswith("**")]
        waiting = [(str(self._root), "")]
        while waiting:
            folder, below = waiting.pop()
            try:
                names = list(os.scandir(folder))
            except OSError:  # a folder that may not be read, or is gone
                continue
            files = []
            for name in names:
                origin = below + _escaped(name.name)
                if name.is_dir(follow_symlinks=False):
                    if not _matches(origin + "/", whole_folders):
                        waiting.append((name.path, origin + "/"))
                elif self._is_part(name):
                    files.append((name.path, origin))
            wanted = choose([origin for _, origin in files], self._source, self._include)
            yield from (_entry(path, origin) for (path, origin), want in zip(files, wanted, strict=True) if want)

    def _is_part(self, name: os.DirEntry[str]) -> bool:
        """Whether it is a regular file, or a link to one that lies inside the source's folder too."""
        try:
            return name.is_file() and (not name.is_symlink() or is_inside(os.path.realpath(name.path), self._resolved))
        except OSError:  # a link that leads to itself
            return False


def _entry(path: str, origin: str) -> Entry:
    try:
        found = os.stat(path)
    except OSError:  # gone meanwhile: reading it will say so
        return Entry(origin, path, 0, ())
    return Entry(origin, path, found.st_size, stamp_of(found))


def stamp_of(found: os.stat_result) -> tuple[int, ...]:
    """What changes when a file of this machine does: size, times, inode."""
    # The time of the inode's last change can't be set back, as that of the content's can.
    return (found.st_size, found.st_mtime_ns, found.st_ino, found.st_ctime_ns)


def is_unchanged(file: IO[bytes], stamp: tuple[int | str, ...]) -> bool:
    """Whether an open file is for certain what it was; false where its place can't tell."""
    if len(stamp) != 4:
        return False
    try:
        return stamp_of(os.fstat(file.fileno())) == stamp
    except (OSError, AttributeError):
        return False


def _escaped(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


# ── object stores ─────────────────────────────────────────────────────────────────────────────────────────────────────


def expand_options(options: dict[str, Option], source: str) -> dict[str, Option]:
    """Options with `${NAME}` replaced by the environment.

    Raises   ConfigError if a variable is not set.
    """
    try:
        return {name: expand_environment(value) if isinstance(value, str) else value for name, value in options.items()}
    except ValueError as error:
        raise ConfigError(f"ingest source {source!r}: {error}.") from error


def _store(source: FileSource) -> Place:
    uri, question, query = source.path.partition("?")
    scheme, _, below = uri.partition("://")
    scheme = {"s3a": "s3"}.get(scheme.lower(), scheme.lower())
    options = expand_options(source.storage_options, source.name)
    if query and options:
        raise ConfigError(
            f"expected options at ingest source {source.name!r} in one place, found some in storage_options and some after "
            "the question mark of its path; put all of them into storage_options."
        )
    check_uri(
        uri, source=source.name, allow_private=source.allow_private, endpoint=_endpoint_of(scheme, query, options)
    )
    base = below
    include: tuple[str, ...] = ()
    if re.search(r"[*?\[{]", below):
        base, pattern = _split_glob(below)
        include = (pattern,)
    try:
        filesystem, root = _open_filesystem(scheme, base, question + query, tuple(sorted(options.items())))
    except Exception as error:  # each filesystem has errors of its own
        raise ConfigError(
            f"expected a URI that pyarrow or fsspec opens at ingest source {source.name!r}, found {without_secrets(uri)}: "
            f"{type(error).__name__}: {error}."
        ) from error
    return _Store(source, filesystem, root, include)


def _endpoint_of(scheme: str, query: str, options: dict[str, Option]) -> str | None:
    """The server that is asked instead of the one that the scheme stands for."""
    told = urllib.parse.parse_qs(query)
    names = ("endpoint_override", "endpoint_url", "endpoint")
    found = [str(options[name]) for name in names if options.get(name)] + [
        v for name in names for v in told.get(name, ())
    ]
    if not found and scheme == "s3":
        found = [v for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") if (v := os.environ.get(name))]
    return found[0] if found else None


@lru_cache(maxsize=64)
def _open_filesystem(
    scheme: str, base: str, query: str, options: tuple[tuple[str, Option], ...]
) -> tuple[pafs.FileSystem, str]:
    if scheme == "s3" and options:
        return pafs.S3FileSystem(**dict(options)), base.rstrip("/")
    if not options:
        try:
            filesystem, root = pafs.FileSystem.from_uri(f"{scheme}://{base}{query}")
            return filesystem, str(root)
        except (ValueError, NotImplementedError):
            pass  # pyarrow knows no such scheme; fsspec may
    import fsspec

    filesystem, root = fsspec.core.url_to_fs(f"{scheme}://{base}{query}", **dict(options))
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), str(root)


class _Store:
    """A file or a folder of a filesystem that pyarrow or fsspec opens."""

    def __init__(self, source: FileSource, filesystem: pafs.FileSystem, root: str, include: tuple[str, ...]) -> None:
        self._source = source
        self._filesystem = filesystem
        self._root = root.rstrip("/")
        self._include = include

    def entries(self) -> list[Entry]:
        try:
            root = self._filesystem.get_file_info(self._root)
            if root.type == pafs.FileType.File:
                return [self._entry(root, root.base_name)]
            if root.type == pafs.FileType.NotFound:
                raise nothing_there(self._source, self._root)
            infos = self._filesystem.get_file_info(pafs.FileSelector(self._root, recursive=True))
        except OSError as error:
            raise ConfigError(
                f"expected to list ingest source {self._source.name!r}, found: {error}; correct its path, its options or "
                "its credentials."
            ) from error
        files = [(info, info.path[len(self._root) + 1 :]) for info in infos if info.type == pafs.FileType.File]
        wanted = choose([origin for _, origin in files], self._source, self._include)
        found = [self._entry(info, origin) for (info, origin), want in zip(files, wanted, strict=True) if want]
        if not found:
            raise no_files(self._source, self._include, self._root)
        return sorted(found, key=lambda entry: entry.origin.split("/"))

    def open(self, path: str) -> IO[bytes]:
        opened: IO[bytes] = self._filesystem.open_input_file(path)
        return opened

    def _entry(self, info: pafs.FileInfo, origin: str) -> Entry:
        size = info.size or 0
        return Entry(origin, info.path, size, (size, info.mtime_ns) if info.mtime_ns else ())


# ── the web ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Web:
    """One file behind a URL. It is downloaded whenever it is opened."""

    def __init__(self, source: FileSource) -> None:
        self._source = source

    def entries(self) -> list[Entry]:
        name = urllib.parse.unquote(urllib.parse.urlsplit(self._source.path).path.rpartition("/")[2], errors="replace")
        return [Entry(name or "index.html", self._source.path, 0, ())]

    def open(self, path: str) -> IO[bytes]:
        page = download(
            path,
            source=self._source.name,
            allow_private=self._source.allow_private,
            max_bytes=self._source.max_unpacked_bytes,
        )
        assert page.file is not None, "no stamp was known"
        return page.file


# ── globs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _matches(origin: str, globs: Sequence[str]) -> bool:
    return any(_pattern(glob).fullmatch(origin) for glob in globs)


@lru_cache(maxsize=1024)
def _pattern(glob: str) -> re.Pattern[str]:
    """A glob as a regular expression: `**/` crosses folders, `*` does not, `{a,b}` is either."""
    return re.compile("|".join(map(_regex, _choices(glob))), re.DOTALL)


def _choices(glob: str) -> list[str]:
    """The globs that one with braces stands for."""
    braces = re.search(r"\{([^{}]*)\}", glob)
    if braces is None:
        return [glob]
    before, after = glob[: braces.start()], glob[braces.end() :]
    return [whole for choice in braces[1].split(",") for whole in _choices(before + choice + after)]


def _regex(glob: str) -> str:
    parts = []
    for piece in re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]*\])", glob):
        if piece == "**/":
            parts.append(r"(?:[^/]+/)*")
        elif piece == "**":
            parts.append(r".*")
        elif piece == "*":
            parts.append(r"[^/]*")
        elif piece == "?":
            parts.append(r"[^/]")
        elif piece.startswith("["):
            parts.append(fnmatch.translate(piece)[4:-3])
        else:
            parts.append(re.escape(piece))
    return "".join(parts)
