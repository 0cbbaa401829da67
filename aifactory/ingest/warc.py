"""WARC: rows from web archives: the main text of each response that is HTML, with its URL and date.

Read by FastWARC, which comes with resiliparse. Records of another kind, and responses that are no HTML or no success,
are no rows; they count. (ISO 28500, WARC 1.0 and 1.1.)
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from aifactory.ingest.blocks import MAX_ROW_BYTES, BlockBuilder, Problem, Raw
from aifactory.ingest.documents import html_text
from aifactory.ingest.json_lines import BROKEN_FILE
from aifactory.ingest.reach import ArchiveTooLargeError, BlockReader, unpack

_HTML = frozenset({"text/html", "application/xhtml+xml"})


def read_warc(blocks: Iterator[bytes], max_ratio: float, origin: str, builder: BlockBuilder) -> Iterator[None]:
    """Add the rows of an archive that comes unpacked; a row's origin is the URL, after the file."""
    from fastwarc.warc import ArchiveIterator, WarcRecordType

    position = 0
    try:
        stream: Any = BlockReader(blocks)
        for record in ArchiveIterator(stream, parse_http=True, strict_mode=False):
            if record.record_type == WarcRecordType.response and record.is_http and _is_page(record):
                where = f"{origin}#{str(record.headers.get('WARC-Target-URI', '')).strip('<>')}"
                where = where.encode("utf-8", "replace").decode()
                page = _body(record, max_ratio)
                text = page if isinstance(page, Problem) else html_text(page, record.http_charset)
                if isinstance(text, str):
                    builder.add_row(where, position, Raw(text=text, timestamp=str(record.headers.get("WARC-Date", ""))))
                else:
                    kept = b"" if isinstance(page, Problem) else page
                    builder.reject(where, position, text, kept.decode("utf-8", "backslashreplace"))
                yield
            position += 1
    except ArchiveTooLargeError as error:
        builder.reject(origin, position, Problem("archive_too_large", error.ratio, str(error)))
    except (UnicodeError, ValueError, *BROKEN_FILE) as error:
        builder.reject(origin, position, Problem("unreadable_file", 1.0, f"{type(error).__name__}: {error}"))


def _is_page(record: Any) -> bool:
    return record.http_content_type in _HTML and record.http_headers.status_code in (200, None)


def _body(record: Any, max_ratio: float) -> bytes | Problem:
    """The page of a response, decoded."""
    whole = int(record.content_length)
    body: bytes = record.reader.read(MAX_ROW_BYTES + 1)
    if len(body) > MAX_ROW_BYTES:
        return Problem("row_too_large", float(whole), f"more than {MAX_ROW_BYTES} bytes")
    if len(body) < whole:
        return Problem("unreadable_file", 1.0, f"{len(body)} of {whole} bytes are there")
    encoding = record.http_headers.get("Content-Encoding", "").strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "x-gzip"):
        return Problem("wrong_type", 1.0, f"expected a body in gzip or as it is, found {encoding!r}")
    try:
        unpacked = unpack(
            io.BytesIO(body),
            "gzip",
            packed_bytes=len(body),
            max_ratio=max_ratio,
            max_unpacked_bytes=MAX_ROW_BYTES,
        )
        return b"".join(unpacked)
    except ArchiveTooLargeError as error:
        return Problem("archive_too_large", error.ratio, str(error))
    except BROKEN_FILE as error:
        return Problem("unreadable_file", 1.0, f"{type(error).__name__}: {error}")
