"""A server of OpenAI's chat form on loopback that says which of two answers is better, as a test would have it."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Verdict = Callable[[str, str, str], str]
"""From the question and the two answers, in the order in which they are shown, to what is said."""


@dataclass(slots=True)
class JudgeServer:
    """What it says, and what it was asked."""

    verdict: Verdict
    url: str = ""
    grade: Callable[[str, str], str] = lambda prompt, answer: "A"
    """From a question and one answer to what is said."""
    version: str = "judge-1"
    fails: list[int] = field(default_factory=list)
    """Statuses with which it answers first."""
    body: bytes | None = None
    """What it answers in place of a completion."""
    asked: list[tuple[dict[str, Any], str | None]] = field(default_factory=list)
    """Bodies, and the header with the key."""


@contextmanager
def judging(verdict: Verdict) -> Iterator[JudgeServer]:
    """A judge for as long as the block lasts."""
    state = JudgeServer(verdict)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.asked.append((asked, self.headers["Authorization"]))
            if state.fails:
                self.send_response(state.fails.pop(0))
                self.end_headers()
                return
            shown = re.fullmatch(
                r"Question:\n(.*)\n\nAnswer A:\n(.*)\n\nAnswer B:\n(.*)\n\nWhich is better, A, B or C\?",
                asked["messages"][1]["content"],
                re.DOTALL,
            )
            alone = re.fullmatch(
                r"Question:\n(.*)\n\nAnswer:\n(.*)\n\nIs it good \(A\) or not \(B\)\?",
                asked["messages"][1]["content"],
                re.DOTALL,
            )
            assert shown is not None or alone is not None, asked
            said = state.verdict(*shown.groups()) if shown is not None else state.grade(*alone.groups())
            message = {"role": "assistant", "content": said}
            answer = {
                "object": "chat.completion",
                "model": state.version,
                "choices": [{"index": 0, "message": message}],
            }
            body = json.dumps(answer).encode() if state.body is None else state.body
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
