"""Documents: files of which each is a row: text, code, Markdown, HTML, PDF.

Text and code are as they stand, in UTF-8. Markdown loses its front matter (YAML between lines of `---`, TOML between
lines of `+++`, at the very beginning). Of HTML the main text is taken, without navigation, side bars and footers, by
resiliparse: measured against trafilatura and a plain walk of the tree it was as good as the first (paragraphs kept,
boilerplate left out), and ten times as fast. Of PDF the text of every page, by pypdf.
(J. Bevendorff et al., An Empirical Comparison of Web Content Extraction Algorithms, SIGIR 2023; WHATWG HTML.)
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

from aifactory.errors import ConfigError
from aifactory.ingest.blocks import MAX_ROW_BYTES, BlockBuilder, Problem, Raw, head_of
from aifactory.ingest.json_lines import BROKEN_FILE
from aifactory.ingest.reach import ArchiveTooLargeError

MAX_HTML_DEPTH = 512
"""Deepest HTML that is read: extraction takes time by the square of the depth, and browsers stop there too."""
_FRONT_MATTER = re.compile(r"\A\ufeff?(---|\+\+\+)[ \t]*\r?\n(?:.*?\r?\n)??\1[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_DEEPER = " > ".join(["*"] * (MAX_HTML_DEPTH + 1))
_MAX_PDF_PAGES = 10_000


def read_document(blocks: Iterator[bytes], kind: str, origin: str, builder: BlockBuilder) -> Iterator[None]:
    """Add the row that a file is."""
    row = _row_of(blocks, kind)
    if isinstance(row, Raw):
        builder.add_row(origin, 0, row)
    else:
        problem, text = row
        builder.reject(origin, 0, problem, text)
    yield


def _row_of(blocks: Iterator[bytes], kind: str) -> Raw | tuple[Problem, str]:
    parts: list[bytes] = []
    size = 0
    try:
        for block in blocks:
            size += len(block)
            if size <= MAX_ROW_BYTES:
                parts.append(block)
    except ArchiveTooLargeError as error:
        return Problem("archive_too_large", error.ratio, str(error)), ""
    except BROKEN_FILE as error:
        return Problem("unreadable_file", 1.0, f"{type(error).__name__}: {error}"), ""
    if size > MAX_ROW_BYTES:
        problem = Problem("row_too_large", float(size), f"{size} bytes, more than {MAX_ROW_BYTES}")
        return problem, head_of(b"".join(parts)[:1000])
    data = b"".join(parts)
    if kind == "html":
        text = html_text(data)
    elif kind == "pdf":
        text = pdf_text(data)
    else:
        text = plain_text(data)
        if kind == "markdown" and isinstance(text, str):
            text = _FRONT_MATTER.sub("", text, count=1)
    if isinstance(text, Problem):
        return text, "" if kind == "pdf" else data.decode("utf-8", "backslashreplace")
    return Raw(text=text)


def plain_text(data: bytes) -> str | Problem:
    """Text in UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return Problem("invalid_utf8", float(error.start), f"{error.reason} at byte {error.start}")


def html_text(data: bytes, charset: str | None = None) -> str | Problem:
    """The main text of a page; `charset` is what the server said."""
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding
    from resiliparse.parse.html import HTMLTree

    try:
        page = data.decode()
    except UnicodeDecodeError:
        page = bytes_to_str(data, charset or detect_encoding(data) or "utf-8", errors="replace")
    tree = HTMLTree.parse(page.replace("\0", ""))
    # So few tags can't nest so deeply; else the tree is asked, which knows what was closed.
    root = tree.document if page.count("<") > MAX_HTML_DEPTH else None
    if root is not None and root.query_selector(_DEEPER) is not None:
        return Problem("nested_too_deep", float(MAX_HTML_DEPTH), f"elements nested deeper than {MAX_HTML_DEPTH}")
    return str(extract_plain_text(tree, main_content=True, alt_texts=False))


def pdf_text(data: bytes) -> str | Problem:
    """The text of a PDF, page by page.

    Raises   ConfigError if the extra `pdf` is not installed.
    """
    try:
        import pypdf
    except ImportError as error:
        raise ConfigError("expected pypdf for a source of kind pdf, found none; install aifactory[pdf].") from error
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            return Problem("unreadable_file", 1.0, "it needs a password")
        if len(reader.pages) > _MAX_PDF_PAGES:
            return Problem("row_too_large", float(len(reader.pages)), f"{len(reader.pages)} pages")
        text = "\n\n".join(page.extract_text() for page in reader.pages)
    except Exception as error:  # of a broken file it raises what it happens to stumble over
        return Problem("unreadable_file", 1.0, f"{type(error).__name__}: {error}")
    return text.encode("utf-8", "replace").decode()
