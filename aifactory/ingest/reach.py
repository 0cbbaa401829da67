"""Reach: what a source may open, and how much of it.

Laws
  - A local source reads regular files inside its root: no link out of it, no device, no FIFO, no socket.
  - Nothing is opened at an address that is not public (loopback, link-local, private, multicast, reserved, and what
    IPv6 wraps around such a one) unless the source says `allow_private`. That goes for https:// URLs, for endpoints of
    object stores, for databases and brokers alike. For https:// every redirect is checked too, and the connection is
    made to the address that was checked, so that a name can't be answered twice.
  - A compressed file becomes at most max(1 MiB, `max_ratio` times its size) bytes, and at most `max_unpacked_bytes`.

What is not held: drivers of databases, brokers and object stores resolve names themselves, after the check; and an
object store's driver may ask the metadata service of its cloud for credentials. Proxies of the environment are not used
for https:// sources.
"""

from __future__ import annotations

import bz2
import http.client
import ipaddress
import os
import socket
import ssl
import stat
import sys
import tempfile
import urllib.parse
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Protocol

from aifactory.errors import ConfigError

MIN_UNPACKED_BYTES = 1 << 20
"""So much a compressed file may always become: a short text of equal lines packs a thousandfold."""
_BLOCK_BYTES = 1 << 20
_MAX_REDIRECTS = 5
_TIMEOUT_S = 30.0

BUCKET_SCHEMES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "hf", "oss"})
"""Schemes whose authority is a bucket, not a host."""
HOST_SCHEMES = frozenset({"hdfs", "viewfs", "webhdfs", "sftp", "ssh", "ftp", "smb"})
"""Schemes whose authority is a host; its address is checked."""


class Readable(Protocol):
    """What can be read from its beginning to its end."""

    def read(self, size: int = -1, /) -> bytes: ...


class ArchiveTooLargeError(Exception):
    """A compressed file would become more than it may; `ratio` is what it had come to."""

    def __init__(self, ratio: float, allowed: int) -> None:
        super().__init__(f"unpacks to more than {allowed} bytes")
        self.ratio = ratio


# ── files of this machine ─────────────────────────────────────────────────────────────────────────────────────────────


def open_inside(path: str | os.PathLike[str], root: str) -> IO[bytes]:
    """Open a regular file that lies inside `root` (a path without links), or is it.

    What counts is where the opened file lies, whatever path has led there. It never waits: a FIFO without a writer is
    refused at once.
    Raises   OSError if it is no regular file, or lies outside.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise PermissionError(f"{os.fspath(path)} is no regular file")
        try:
            where = os.readlink(f"/proc/self/fd/{handle}")
        except OSError:  # not on Linux
            where = os.path.realpath(path)
        if not is_inside(where, root):
            raise PermissionError(f"{os.fspath(path)} leads outside {root}")
        return os.fdopen(handle, "rb", buffering=0)
    except BaseException:
        os.close(handle)
        raise


def is_inside(path: str, root: str) -> bool:
    """Whether one path without links is the other, or lies below it."""
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)


# ── addresses ─────────────────────────────────────────────────────────────────────────────────────────────────────────

Resolve = Callable[[str, int], list[str]]


def resolve_name(host: str, port: int) -> list[str]:
    """The addresses of a host, each once, in the order in which the system gives them."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def check_address(
    host: str, port: int, *, source: str, allow_private: bool, resolve: Resolve = resolve_name
) -> list[str]:
    """The addresses of a host, all of which a source may open.

    Raises   ConfigError if there is none, or if one of them is not public and `allow_private` is false.
    """
    try:
        addresses = resolve(host, port)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"expected the name of a host at ingest source {source!r}, found {host!r}: {error}; correct it."
        ) from error
    private = [address for address in addresses if not _is_public(address)]
    if private and not allow_private:
        raise ConfigError(
            f"expected a public address at ingest source {source!r}, found {host!r} at {private[0]}; if it is meant, say "
            "allow_private: true."
        )
    return addresses


def _is_public(text: str) -> bool:
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        wrapped = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in _NAT64:
            wrapped.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if any(inner is not None and not _is_public(str(inner)) for inner in wrapped):
            return False
        if address.ipv4_mapped is not None:
            return True
        if address.is_site_local:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def check_uri(uri: str, *, source: str, allow_private: bool, endpoint: str | None = None) -> None:
    """Refuse a URI (neither file:// nor http) that a source may not open.

    Raises   ConfigError for an unknown or chained scheme, and for a host, or an endpoint, that is not public.
    """
    scheme = uri.partition("://")[0].lower()
    if "::" in uri.partition("?")[0] or scheme not in BUCKET_SCHEMES | HOST_SCHEMES:
        raise ConfigError(
            f"expected a path or a URI of {', '.join(sorted(BUCKET_SCHEMES | HOST_SCHEMES))} or https at ingest source "
            f"{source!r}, found {uri.partition('?')[0]!r}; copy the data to one of them."
        )
    if endpoint is not None:
        _check_url(endpoint if "://" in endpoint else f"https://{endpoint}", source, allow_private)
    if scheme in HOST_SCHEMES:
        _check_url(uri, source, allow_private)


def _check_url(url: str, source: str, allow_private: bool) -> None:
    parts = _split(url, source)
    if parts.hostname:
        check_address(parts.hostname, _port(parts, source) or 443, source=source, allow_private=allow_private)


def _split(url: str, source: str) -> urllib.parse.SplitResult:
    try:
        return urllib.parse.urlsplit(url)
    except ValueError as error:
        raise ConfigError(f"expected a URL at ingest source {source!r}, found {url!r}: {error}; correct it.") from error


def _port(parts: urllib.parse.SplitResult, source: str) -> int | None:
    try:
        return parts.port
    except ValueError as error:
        raise ConfigError(f"expected a port at ingest source {source!r}, found none: {error}; correct it.") from error


# ── https ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Page:
    """What lies behind a URL."""

    stamp: tuple[str, ...]
    """What the server says that changes with the content; empty where it says nothing."""
    file: IO[bytes] | None
    """The content in a file without a name, at its beginning; None where the stamp is the one that was known."""


def download(
    url: str,
    *,
    source: str,
    allow_private: bool,
    max_bytes: int,
    known_stamp: tuple[str, ...] = (),
    resolve: Resolve = resolve_name,
) -> Page:
    """What lies behind an http:// or https:// URL, every redirect checked.

    Raises   ConfigError if it may not be opened, or answers with an error.
             OSError if the connection fails or ends early.
    """
    for _ in range(_MAX_REDIRECTS + 1):
        connection = _connect(url, source, allow_private, resolve)
        try:
            parts = urllib.parse.urlsplit(url)
            target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
            connection.request("GET", target, headers={"User-Agent": "aifactory", "Accept-Encoding": "identity"})
            response = connection.getresponse()
            if response.status in (301, 302, 303, 307, 308):
                url = urllib.parse.urljoin(url, response.headers.get("Location", ""))
                continue
            if response.status != 200:
                raise ConfigError(
                    f"expected a file at ingest source {source!r}, found HTTP {response.status} at {without_secrets(url)}; "
                    "correct its path."
                )
            stamp = _stamp(response)
            if stamp and stamp == tuple(known_stamp):
                return Page(stamp=stamp, file=None)
            return Page(stamp=stamp, file=_spool(response, url, source, max_bytes))
        except http.client.HTTPException as error:
            raise ConnectionError(f"{type(error).__name__}: {error}") from error
        finally:
            connection.close()
    raise ConfigError(
        f"expected at most {_MAX_REDIRECTS} redirects at ingest source {source!r}, found more; name where they lead."
    )


def _connect(url: str, source: str, allow_private: bool, resolve: Resolve) -> http.client.HTTPConnection:
    parts = _split(url, source)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"expected an http:// or https:// URL at ingest source {source!r}, found {without_secrets(url)}; correct it."
        )
    if any(ord(character) <= 32 or ord(character) == 127 for character in url):
        raise ConfigError(f"expected a URL without white space at ingest source {source!r}, found {url!r}; escape it.")
    secure = parts.scheme == "https"
    port = _port(parts, source) or (443 if secure else 80)
    addresses = check_address(parts.hostname, port, source=source, allow_private=allow_private, resolve=resolve)
    # The name stands in the request and in the certificate; the connection goes to an address that was checked.
    connection: http.client.HTTPConnection
    if secure:
        context = ssl.create_default_context()
        connection = http.client.HTTPSConnection(parts.hostname, port, timeout=_TIMEOUT_S, context=context)
    else:
        connection = http.client.HTTPConnection(parts.hostname, port, timeout=_TIMEOUT_S)
    plain = _first_that_answers(addresses, port)
    try:
        connection.sock = context.wrap_socket(plain, server_hostname=parts.hostname) if secure else plain
    except BaseException:
        plain.close()
        raise
    return connection


def _first_that_answers(addresses: list[str], port: int) -> socket.socket:
    problem: OSError = ConnectionError("no address")
    for address in addresses:
        try:
            return socket.create_connection((address, port), timeout=_TIMEOUT_S)
        except OSError as error:
            problem = error
    raise problem


def _stamp(response: http.client.HTTPResponse) -> tuple[str, ...]:
    names = ("ETag", "Last-Modified", "Content-Length")
    tag, changed, length = (response.headers.get(name, "") for name in names)
    return (tag, changed, length) if tag or changed else ()


def _spool(response: http.client.HTTPResponse, url: str, source: str, max_bytes: int) -> IO[bytes]:
    file = tempfile.TemporaryFile()  # noqa: SIM115 - it is handed on open, and has no name
    try:
        size = 0
        while block := response.read(_BLOCK_BYTES):
            size += len(block)
            if size > max_bytes:
                raise ConfigError(
                    f"expected at most {max_bytes} bytes at ingest source {source!r}, found more at "
                    f"{without_secrets(url)}; raise max_unpacked_bytes if it is meant."
                )
            file.write(block)
        if response.length:
            raise ConnectionError(f"{response.length} bytes of {without_secrets(url)} did not come")
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def without_secrets(url: str) -> str:
    """A URL without user, password and query, for messages."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


# ── archives ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def packing_of(name: str) -> str | None:
    """How a file is compressed, by the ending of its name: gzip, zstd, bz2, or None."""
    endings = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2"}
    return endings.get(os.path.splitext(name)[1].lower())


def unpack(
    packed: Readable, packing: str, *, packed_bytes: int, max_ratio: float, max_unpacked_bytes: int
) -> Iterator[bytes]:
    """What a compressed file holds, in blocks of at most about 1 MiB.

    Raises   ArchiveTooLargeError as soon as it would become more than it may; OSError, EOFError or zlib.error where it
             is damaged. What came before the damage has come.
    """
    allowed = int(min(max_unpacked_bytes, max(MIN_UNPACKED_BYTES, max_ratio * packed_bytes)))
    unpackers: dict[str, Callable[[Readable], Iterator[bytes]]]
    unpackers = {"gzip": _unpack_gzip, "zstd": _unpack_zstd, "bz2": _unpack_bz2}
    size = 0
    for block in unpackers[packing](packed):
        size += len(block)
        if size > allowed:
            raise ArchiveTooLargeError(size / max(packed_bytes, 1), allowed)
        yield block


def _unpack_gzip(packed: Readable) -> Iterator[bytes]:
    waiting = packed.read(_BLOCK_BYTES)
    while waiting:
        member = zlib.decompressobj(wbits=31)
        while not member.eof:
            if not waiting and not (waiting := packed.read(_BLOCK_BYTES)):
                raise EOFError("the compressed file ends before its end-of-stream marker")
            block = member.decompress(waiting, _BLOCK_BYTES)
            waiting = member.unconsumed_tail
            if block:
                yield block
        waiting = member.unused_data or packed.read(_BLOCK_BYTES)
        while waiting and not waiting.strip(b"\0"):  # tapes pad with zeros
            waiting = packed.read(_BLOCK_BYTES)


def _unpack_bz2(packed: Readable) -> Iterator[bytes]:
    waiting = packed.read(_BLOCK_BYTES)
    while waiting:
        member = bz2.BZ2Decompressor()
        while not member.eof:
            if member.needs_input and not waiting and not (waiting := packed.read(_BLOCK_BYTES)):
                raise EOFError("the compressed file ends before its end-of-stream marker")
            block = member.decompress(waiting, _BLOCK_BYTES)
            waiting = b""
            if block:
                yield block
        waiting = member.unused_data or packed.read(_BLOCK_BYTES)


def _unpack_zstd(packed: Readable) -> Iterator[bytes]:
    import pyarrow as pa

    with pa.CompressedInputStream(pa.PythonFile(packed, mode="r"), "zstd") as stream:
        while block := stream.read(_BLOCK_BYTES):
            yield block


class BlockReader:
    """A file to read from, made of blocks: what parsers of streams ask for."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._waiting = memoryview(b"")
        self._at = 0
        self.closed = False

    def read(self, size: int = -1, /) -> bytes:
        """So many bytes, fewer only at the end; all of them where it is negative."""
        taken: list[bytes | memoryview] = []
        wanted = size if size >= 0 else sys.maxsize
        while wanted:
            if not self._waiting:
                block = next(self._blocks, None)
                if block is None:
                    break
                self._waiting = memoryview(block)
            taken.append(self._waiting[:wanted])
            wanted -= len(taken[-1])
            self._waiting = self._waiting[len(taken[-1]) :]
        data = b"".join(taken)
        self._at += len(data)
        return data

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def tell(self) -> int:
        return self._at

    def flush(self) -> None:
        """Nothing waits to be written."""

    def close(self) -> None:
        self.closed = True
