"""Checks of a factory: its configuration, the storage, the database, and the packages that the configuration needs. Nothing is
changed: a database is not migrated, and what is written to the storage is deleted again."""

from __future__ import annotations

import re
import secrets
import shutil
import sqlite3
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aifactory.doctor.check import Check, ok, wrong
from aifactory.errors import AIFactoryError, ConfigError

if TYPE_CHECKING:
    from aifactory.config import Config
    from aifactory.records.storage import Storage

_GB = 1e9
_LITTLE = 5 * _GB
_TOO_LITTLE = 0.5 * _GB
_NETWORKS = ("nfs", "cifs", "smb", "fuse.sshfs", "fuse.glusterfs", "lustre", "ceph", "beegfs", "gpfs", "9p", "afs")
"""Filesystems of several machines, by the beginnings of their names in /proc/mounts."""
_CLOCK_S = 0.5
_CONNECT_S = 5
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:")


def checks(config: Config, mounts: str | None = None) -> Iterator[Check]:
    """`mounts`: the text of /proc/mounts."""
    from aifactory.records.books import state_url, storage_root
    from aifactory.records.storage import Storage

    mounts = _mounts() if mounts is None else mounts
    yield ok("configuration", f"factory {config.name}")
    try:
        storage = Storage(storage_root(config))
        url = state_url(config, storage)
    except ConfigError as error:
        remedy = "Mend runtime.storage or runtime.state_url as the message says."
        yield wrong("storage", str(error), expected="a storage root and a database", remedy=remedy, is_error=True)
        return
    yield from storage_checks(storage, mounts)
    yield from database_checks(url, mounts)
    yield from package_checks(config)
    yield _sources_check(config)


def storage_checks(storage: Storage, mounts: str) -> Iterator[Check]:
    """Whether it can be written to, and has room."""
    there = _nearest(Path(storage.path())) if storage.is_local else None
    name = f"doctor-{secrets.token_hex(8)}"
    try:
        if there is not None and str(there) != storage.path():
            # What is not there yet is not made: a file beside it tells as much.
            (there / name).write_bytes(b"doctor")
            (there / name).unlink()
        else:
            storage.write_bytes(b"doctor", name)
            storage.delete_file(name)
    except (AIFactoryError, OSError) as error:
        yield wrong(
            "storage",
            f"{storage.root} can't be written to: {error}",
            expected="a folder that this user may write to, or an object store with its keys in the environment",
            remedy="Set runtime.storage to another place, or mend its permissions (chown, bucket policy).",
            is_error=True,
        )
        return
    kind = None if there is None else filesystem_of(there, mounts)
    yield ok("storage", f"{storage.root} can be written to" + ("" if kind is None else f" ({kind})"))
    if there is not None:
        free = shutil.disk_usage(there).free
        found = f"{free / _GB:,.1f} GB are free in {there}"
        if free < _LITTLE:
            yield wrong(
                "disk space",
                found,
                expected=f"{_LITTLE / _GB:g} GB at least: a full disk ends runs, and feedback is not acknowledged",
                remedy="Make room, or set runtime.storage to a larger disk.",
                is_error=free < _TOO_LITTLE,
            )
        else:
            yield ok("disk space", found)


def database_checks(url: str, mounts: str) -> Iterator[Check]:
    """Whether it can be used, lies where it may, and has the same time."""
    from sqlalchemy.engine import make_url

    parsed = make_url(url)
    shown = parsed.render_as_string(hide_password=True)
    if parsed.get_backend_name() == "sqlite":
        yield from _of_sqlite(Path(parsed.database or ""), mounts)
        return
    if find_spec("psycopg") is None:
        yield wrong(
            "database",
            f"{shown}, and psycopg is not installed",
            expected="the driver of PostgreSQL",
            remedy="pip install 'aifactory[postgres]'.",
            is_error=True,
        )
        return
    try:
        found, offset_s = _ask_postgres(url)
    except Exception as error:
        yield wrong(
            "database",
            f"{shown} does not answer: {str(error).splitlines()[0]}",
            expected="PostgreSQL, and a user that may write",
            remedy="Start it, open its port to this machine, or mend user and password in runtime.state_url.",
            is_error=True,
        )
        return
    yield ok("database", f"{shown}, schema {found or 'not made yet'}")
    yield clock_check("database", offset_s)


def clock_check(of: str, offset_s: float) -> Check:
    """How far another clock is from this one."""
    found = f"{abs(offset_s):.2f} s {'ahead of' if offset_s > 0 else 'behind'} this machine's"
    if abs(offset_s) > _CLOCK_S:
        return wrong(
            f"clock of the {of}",
            found,
            expected=f"at most {_CLOCK_S:g} s: the order of events and of batches goes by clocks",
            remedy="Run chrony or systemd-timesyncd on both machines.",
            is_error=abs(offset_s) > 60,
        )
    return ok(f"clock of the {of}", found)


def package_checks(config: Config) -> Iterator[Check]:
    """What is not installed and asked for."""
    runtime, missing = config.runtime, []
    wanted: list[tuple[bool, str, str, str]] = [
        (runtime.endpoint.engine == "vllm", "vllm", "vllm", "runtime.endpoint.engine: vllm"),
        (bool(config.train.lora), "peft", "lora", "train.lora"),
        (config.train.precision == "fp8", "torchao", "fp8", "train.precision: fp8"),
        ("mlflow" in runtime.trackers, "mlflow", "mlflow", "runtime.trackers"),
        ("wandb" in runtime.trackers, "wandb", "wandb", "runtime.trackers"),
        (runtime.traces is not None, "opentelemetry.sdk", "otel", "runtime.traces"),
        (
            config.evaluate.lm_eval is not None and runtime.lm_eval_python is None,
            "lm_eval",
            "lm-eval",
            "evaluate.lm_eval",
        ),
        (runtime.endpoint.gpus_per_replica > 0 or runtime.gpus_per_worker > 0, "pynvml", "nvidia", "joules of GPUs"),
    ]
    for is_asked, package, extra, option in wanted:
        if is_asked and not _is_installed(package):
            missing.append(extra)
            yield wrong(
                f"package {package}",
                "not installed",
                expected=f"asked for by {option}",
                remedy=f"pip install 'aifactory[{extra}]'.",
                is_error=package != "pynvml",
            )
    if not missing:
        yield ok("packages", "all that the configuration asks for are installed")


def filesystem_of(path: Path, mounts: str) -> str | None:
    """The kind of filesystem on which a path lies."""
    best, found = "", None
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        place = fields[1].replace("\\040", " ")
        is_above = path == Path(place) or Path(place) in path.parents
        if is_above and len(place) >= len(best):
            best, found = place, fields[2]
    return found


def _of_sqlite(file: Path, mounts: str) -> Iterator[Check]:
    kind = filesystem_of(_nearest(file.parent), mounts)
    if kind is not None and kind.startswith(_NETWORKS):
        yield wrong(
            "database",
            f"SQLite at {file}, on {kind}",
            expected="a disk of this machine: SQLite's write-ahead log needs memory that all writers share, and locks of network "
            "filesystems lose writes",
            remedy="Set runtime.state_url to sqlite:////a/local/disk/state.db, or to PostgreSQL.",
            is_error=True,
        )
        return
    if not file.exists():
        yield ok("database", f"SQLite at {file}, not made yet")
        return
    try:
        connection = sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=_CONNECT_S)
        try:
            (damage,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            versions = _versions(connection)
        finally:
            connection.close()
    except sqlite3.Error as error:
        damage, versions = str(error), []
    if damage != "ok":
        yield wrong(
            "database",
            f"SQLite at {file}: {damage}",
            expected="a file that SQLite finds whole",
            remedy="Restore it from a backup; sqlite3 FILE .recover saves what can be read.",
            is_error=True,
        )
        return
    yield ok("database", f"SQLite at {file}, whole, schema {versions[0] if versions else 'not made yet'}")


def _versions(connection: sqlite3.Connection) -> list[str]:
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchall():
        return []
    return [str(row[0]) for row in connection.execute("SELECT version_num FROM alembic_version")]


def _ask_postgres(url: str) -> tuple[str | None, float]:
    """The schema's version, and how far its clock is ahead."""
    import sqlalchemy as sa

    engine = sa.create_engine(url, connect_args={"connect_timeout": _CONNECT_S})
    try:
        with engine.connect() as connection:
            before = time.time()
            there = float(connection.scalar(sa.text("SELECT extract(epoch FROM clock_timestamp())")) or 0)
            offset_s = there - (before + time.time()) / 2
            has_schema = connection.scalar(sa.text("SELECT to_regclass('alembic_version')")) is not None
            schema: Any = connection.scalar(sa.text("SELECT version_num FROM alembic_version")) if has_schema else None
            return schema, offset_s
    finally:
        engine.dispose()


def _sources_check(config: Config) -> Check:
    paths: Sequence[str] = [
        str(path) for source in config.ingest.sources if (path := getattr(source, "path", None)) is not None
    ]
    # A scheme is what its reader looks for: s3://…, python:stdlib.
    gone = [path for path in paths if not _SCHEME.match(path) and not Path(path).expanduser().exists()]
    if gone:
        return wrong(
            "sources",
            f"not there: {', '.join(gone)}",
            expected="files or folders at ingest.sources",
            remedy="Mend the paths, or mount what they lie on.",
            is_error=True,
        )
    return ok("sources", f"{len(config.ingest.sources)}, of which those on this machine are there")


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # of a package in a package
        return False


def _nearest(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(each for each in (path, *path.parents) if each.exists())


def _mounts() -> str:
    try:
        return Path("/proc/mounts").read_text()
    except OSError:
        return ""
