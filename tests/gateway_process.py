"""python gateway_process.py CONFIG: a gateway over the books of a factory without a release, on a free port, which it prints."""

from __future__ import annotations

import sys
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.routing import Route

from aifactory.config import Config
from aifactory.records.books import Books
from aifactory.serve.gateway import Gateway
from aifactory.serve.releases import Releases


def no_engine(folder: Path) -> None:
    raise AssertionError(f"there is no release, found {folder}")


if __name__ == "__main__":
    books = Books(Config.from_text(Path(sys.argv[1]).read_text(), origin=sys.argv[1]))
    gateway = Gateway(books, Releases(books, no_engine), books.config.serve)  # type: ignore[arg-type]
    app = Starlette(routes=[Route("/{path:path}", gateway.handle, methods=["GET", "POST"])])
    config = uvicorn.Config(app, port=0, log_level="error")
    socket = config.bind_socket()
    print(socket.getsockname()[1], flush=True)
    uvicorn.Server(config).run(sockets=[socket])
