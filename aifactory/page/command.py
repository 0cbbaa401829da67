"""`aifactory page`: serve the page until interrupted. No Ray is started or asked, so it also runs while there is none."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass

from aifactory.config import Config
from aifactory.errors import ConfigError
from aifactory.page.access import TOKEN_VARIABLE, Access
from aifactory.page.server import PageServer
from aifactory.records.books import Books
from aifactory.records.keys import NOBODY, read_token


@dataclass(frozen=True, slots=True, kw_only=True)
class PageAddress:
    """Where the page is served."""

    url: str
    is_open: bool
    """Whether whoever reaches it may look and act."""

    def lines(self) -> list[str]:
        asked = "whoever uses this machine may act on it" if self.is_open else "it asks for a key"
        return [f"The factory's page: {self.url} ({asked})"]


def access_of(books: Books) -> Access:
    """Who may see the page of this factory: whoever has a key of the scope `operate`, from when there is any key, or must be."""
    keys, required = books.keys, books.config.runtime.gateway.keys == "required"

    def check(sent: str) -> str | None:
        read = read_token(sent)
        if read is None:
            return None
        known, now = keys.known(read[0]) or NOBODY, keys.journal.clock()
        good = known.is_proved_by(read[1], now) and known.key.state(now) == "active"
        return known.key.id if good and "operate" in known.key.scopes else None

    return Access(
        host=books.config.runtime.page.host,
        token=os.environ.get(TOKEN_VARIABLE) or None,
        has_keys=lambda: required or keys.has_active(),
        check_key=check,
    )


def serve(config: Config, tell: Callable[[PageAddress], None]) -> None:
    """Serve until interrupted; `tell` is called once it listens.

    Raises   ConfigError for an address that can't be bound, or that strangers reach where nothing keeps them out.
    """
    import uvicorn

    books = Books(config)
    try:
        access = access_of(books)
        books.registry.production()  # a database that is not as expected is told before anything listens
        page = config.runtime.page
        with _bound(page.host, page.port) as listening:
            port = listening.getsockname()[1]
            host = f"[{page.host}]" if ":" in page.host else page.host
            options = uvicorn.Config(
                PageServer(books, access).app(),
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=2,
            )
            tell(PageAddress(url=f"http://{host}:{port}/", is_open=access.is_open))
            uvicorn.Server(options).run(sockets=[listening])
    finally:
        books.close()


def _bound(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        raise ConfigError(
            f"expected to listen at {host}:{port} (runtime.page), found: {error}. Choose another one: --set runtime.page.port=0 "
            "takes a free one."
        ) from error
