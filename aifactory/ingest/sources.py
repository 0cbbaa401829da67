"""Sources: the files of each, and the rows of each file.

What can't be read becomes a line of the ledger, never an exception: a bad file harms no other one.
"""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import io
import json
import os
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from aifactory.config import Columns, Source
from aifactory.errors import ConfigError, StorageError
from aifactory.records.identity import canonical_json, hash_text
from aifactory.records.rows import Rejected

PYTHON_STDLIB = "python:stdlib"
_INCLUDE = {
    "code": ("**/*.py",),
    "text": ("**/*.txt", "**/*.md"),
    "jsonl": ("**/*.jsonl", "**/*.jsonl.gz"),
    "parquet": ("**/*.parquet",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One file of a source, as it was when it was listed."""

    source: str
    kind: str
    origin: str
    """Path below the source's, with forward slashes; bytes of a name that are no UTF-8 are escaped."""
    path: str
    num_bytes: int
    sha256: str
    """Empty for a file that could not be read: then it stays a line of the ledger."""
    columns: Columns


@dataclass(frozen=True, slots=True, kw_only=True)
class RawRow:
    """What a file says, before any rule."""

    position: int
    prompt: str
    text: str
    cluster: str | None = None
    origin: str | None = None
    """Where it came from, if the file says so itself (a feedback batch names the completion)."""


def list_files(sources: Sequence[Source]) -> list[SourceFile]:
    """Every file of every source with the hash of its content, in the order of sources and names.

    Raises   ConfigError if a source's path is not there or holds no such file.
    """
    return [file for source in sources for file in _files_of(source)]


def digest_of_files(files: Sequence[SourceFile]) -> str:
    """The identity of what the sources hold: names and contents, no paths of this machine and no times."""
    return hash_text(canonical_json([[file.source, file.origin, file.sha256] for file in files]))


def source_root(source: Source) -> Path:
    """Where the source lies on this machine."""
    if source.path == PYTHON_STDLIB:
        return Path(sysconfig.get_paths()["stdlib"])
    return Path(source.path).expanduser()


def read_rows(file: SourceFile) -> Iterator[RawRow | Rejected]:
    """The rows of one file; what is malformed comes as a line of the ledger.

    Raises   StorageError if the file is no longer what was listed: its rows would bear a false identity.
    """
    if not file.sha256:
        yield _rejected(file, 0, "unreadable_file", "the file could not be read when it was listed")
        return
    try:
        data = Path(file.path).read_bytes()
    except OSError:
        data = None
    if data is None or hashlib.sha256(data).hexdigest() != file.sha256:
        raise StorageError(
            f"expected {file.path} as it was when the source {file.source!r} was listed, found it changed or gone; run "
            "the same command again to read it as it is now."
        )
    reader: Callable[[SourceFile, bytes], Iterator[RawRow | Rejected]]
    reader = {"code": _read_document, "text": _read_document, "jsonl": _read_jsonl, "parquet": _read_parquet}[file.kind]
    yield from reader(file, data)


# ── listing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _files_of(source: Source) -> list[SourceFile]:
    root = source_root(source)
    if not root.exists():
        raise ConfigError(
            f"expected a file or a folder at ingest source {source.name!r}, found nothing at {root}; correct its path."
        )
    if root.is_dir():
        files = [_source_file(path, root, source) for path in sorted(_walk(root, source))]
    else:  # named itself, so wanted whatever its ending
        files = [_source_file(root, root.parent, source)]
    if not files:
        patterns = ", ".join(source.include or _INCLUDE[source.kind])
        raise ConfigError(
            f"expected files that match {patterns} at ingest source {source.name!r}, found none below {root}."
        )
    return files


def _source_file(path: Path, base: Path, source: Source) -> SourceFile:
    num_bytes, sha256 = 0, ""
    try:
        with open(path, "rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            num_bytes = stream.tell()
    except OSError:
        pass  # a line of the ledger
    return SourceFile(
        source=source.name,
        kind=source.kind,
        origin=_origin(path, base),
        path=str(path),
        num_bytes=num_bytes,
        sha256=sha256,
        columns=source.columns,
    )


def _walk(root: Path, source: Source) -> Iterator[Path]:
    """The wanted files below a folder, without entering folders of which everything is excluded."""
    resolved = root.resolve()
    whole_folders = [glob for glob in source.exclude if glob.endswith("**")]
    for folder, names, files in os.walk(root):
        here = Path(folder)
        names[:] = [n for n in names if not _matches(_origin(here / n, root) + "/", whole_folders)]
        for path in (here / name for name in files):
            # A link that leads out of the source's folder is no part of the source.
            if _is_wanted(_origin(path, root), source) and path.is_file() and path.resolve().is_relative_to(resolved):
                yield path


def _origin(path: Path, base: Path) -> str:
    return os.fsencode(path.relative_to(base).as_posix()).decode("utf-8", "backslashreplace")


def _is_wanted(origin: str, source: Source) -> bool:
    return _matches(origin, source.include or _INCLUDE[source.kind]) and not _matches(origin, source.exclude)


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


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _rejected(file: SourceFile, position: int, rule: str, detail: str, text: str = "", score: float = 1.0) -> Rejected:
    return Rejected(
        source=file.source,
        origin=file.origin,
        position=position,
        rule=rule,
        score=score,
        detail=detail,
        text=text,
    )


def _decode(file: SourceFile, position: int, data: bytes) -> str | Rejected:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        escaped = data.decode("utf-8", "backslashreplace")
        detail = f"{error.reason} at byte {error.start}"
        return _rejected(file, position, "invalid_utf8", detail, escaped, score=float(error.start))


def _read_document(file: SourceFile, data: bytes) -> Iterator[RawRow | Rejected]:
    text = _decode(file, 0, data)
    yield text if isinstance(text, Rejected) else RawRow(position=0, prompt="", text=text)


def _read_jsonl(file: SourceFile, data: bytes) -> Iterator[RawRow | Rejected]:
    stream = gzip.GzipFile(fileobj=io.BytesIO(data)) if file.path.endswith(".gz") else io.BytesIO(data)
    position = -1
    try:
        for position, line in enumerate(stream):
            if line.strip():
                yield _json_row(file, position, line)
    except (OSError, EOFError, zlib.error) as error:
        yield _rejected(file, position + 1, "unreadable_file", f"{type(error).__name__}: {error}")


def _json_row(file: SourceFile, position: int, line: bytes) -> RawRow | Rejected:
    text = _decode(file, position, line.rstrip(b"\r\n"))
    if isinstance(text, Rejected):
        return text
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        return _rejected(file, position, "invalid_json", str(error), text)
    if not isinstance(values, dict):
        return _rejected(file, position, "invalid_json", f"expected an object, found {type(values).__name__}", text)
    return _checked(file, position, values, text)


def _checked(file: SourceFile, position: int, values: dict[str, object], line: str | None) -> RawRow | Rejected:
    columns = file.columns
    found = {}
    for name in filter(None, (columns.text, columns.prompt)):
        value = values.get(name)
        if isinstance(value, str) and _has_utf8(value):
            found[name] = value
            continue
        if name not in values:
            rule, detail = "missing_column", f"no {name!r} among {sorted(values)[:20]}"
        elif isinstance(value, str):
            rule, detail = "invalid_utf8", f"a lone surrogate in {name!r}"
        else:
            rule, detail = "wrong_type", f"expected text in {name!r}, found {type(value).__name__}"
        return _rejected(file, position, rule, detail, str(values) if line is None else line)
    cluster, origin = values.get("user"), values.get("completion")
    return RawRow(
        position=position,
        prompt=found[columns.prompt] if columns.prompt else "",
        text=found[columns.text],
        cluster=cluster if isinstance(cluster, str) else None,
        origin=origin if isinstance(origin, str) else None,
    )


def _has_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True


def _read_parquet(file: SourceFile, data: bytes) -> Iterator[RawRow | Rejected]:
    position = 0
    try:
        table = pq.ParquetFile(pa.BufferReader(data))
        names = table.schema_arrow.names
        asked = [name for name in (file.columns.text, file.columns.prompt) if name is not None]
        missing = [name for name in asked if name not in names]
        if missing:
            yield _rejected(file, 0, "missing_column", f"no {missing[0]!r} among {names[:20]}")
            return
        wanted = dict.fromkeys([*asked, *(name for name in ("user", "completion") if name in names)])
        for batch in table.iter_batches(columns=list(wanted)):
            for values in _dicts(batch):
                if isinstance(values, bytes):
                    escaped = values.decode("utf-8", "backslashreplace")
                    yield _rejected(file, position, "invalid_utf8", "a text that is no UTF-8", escaped)
                else:
                    yield _checked(file, position, values, None)
                position += 1
    except (OSError, pa.ArrowException) as error:
        yield _rejected(file, position, "unreadable_file", f"{type(error).__name__}: {error}")


def _dicts(batch: pa.RecordBatch) -> Iterator[dict[str, object] | bytes]:
    """Each row as a dict, or as the bytes of the text in it that is broken: Parquet does not look."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for i in range(batch.num_rows):
            try:
                (values,) = batch.slice(i, 1).to_pylist()
            except UnicodeDecodeError as error:
                values = bytes(error.object)
            yield values
