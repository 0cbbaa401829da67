"""Progress: how far a client has come with what it asked, so that another replica can go on where one was lost.

    client ──▶ front ──Call──▶ replica           the front knows no model, and forgets nothing until the client has its end
               front ◀──Head, then Said…── replica

What a replica tells is what the client is sent, with what it adds to the answers; both arrive together or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PROGRESS = "aifactory.progress"
"""In the scope of a request that comes from a front: its `Progress`."""


@dataclass(slots=True)
class Told:
    """What a client has been told of one of its answers."""

    text: str = ""
    """With echo, the prompt's and the answer's."""
    token_ids: list[int] = field(default_factory=list)
    opened: bool = False
    """Of a chat: whether the event with the role was sent."""
    ended: bool = False
    """Whether the event with its reason was sent, before which it was kept."""

    def add(self, more: Told) -> None:
        """Take what another message has told."""
        self.text += more.text
        self.token_ids += more.token_ids
        self.opened = self.opened or more.opened
        self.ended = self.ended or more.ended


@dataclass(slots=True, kw_only=True)
class Progress:
    """A request that may pass through several replicas."""

    identity: str
    """Its id, without what stands before it."""
    created: int
    """Seconds since the epoch."""
    seed: int
    """Takes the place of one that was not asked for, so that draws can be gone on with."""
    spent_s: float = 0.0
    """How long it has been under way, seconds."""
    attempt: int = 0
    """How many replicas have been lost with it. What they kept is replaced."""
    headed: bool = False
    """Whether the client has the head of a stream."""
    release: int | None = None
    """Whose answer the client is being told; None: nothing was told yet."""
    fingerprint: str = ""
    """Of the release, or of the adapter beside it."""
    told: dict[int, Told] = field(default_factory=dict)
    """By the index of the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A request, whole, as a front hands it on."""

    method: str
    path: str
    """Below where the endpoint is mounted."""
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    progress: Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What an answer begins with."""

    status: int
    headers: list[tuple[bytes, bytes]]
    stream: bool = False
    """Whether events follow, one by one."""
    release: int | None = None
    """Of a stream, who answers."""
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class Said:
    """A piece of a body, and what it tells of which answers."""

    data: bytes
    told: dict[int, Told] = field(default_factory=dict)


Part = Head | Said


def begun_with(told: dict[int, Told], indices: range) -> tuple[tuple[int, ...], ...]:
    """The tokens that these answers have already, as the engine takes them; nothing where none of them has any."""
    begun = tuple(tuple(told[index].token_ids) if index in told else () for index in indices)
    return begun if any(begun) else ()


def scope_of(call: Call) -> dict[str, Any]:
    """The scope of the request in the replica."""
    return {
        "type": "http",
        "http_version": "1.1",
        "method": call.method,
        "path": call.path,
        "root_path": "",
        "query_string": call.query,
        "headers": call.headers,
        PROGRESS: call.progress,
    }
