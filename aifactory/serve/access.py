"""Access: who asks, by the key that comes as `Authorization: Bearer`, and what that key is good for.

What was read of a key is believed for `runtime.gateway.keys_refresh_s`; halfway through that it is read anew beside the requests, so
that whoever asks steadily never waits for the database. A key that is revoked answers nothing more, on any replica, when that
time is over; what it has begun goes on to its end.

    401   no key where one is required, or one that is no good        403   a good one that may not do this
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from starlette.requests import Request

from aifactory.config.gateway import Gateway
from aifactory.errors import StateError
from aifactory.records.identity import hash_text
from aifactory.records.journal import ANONYMOUS
from aifactory.records.keys import NOBODY, SCOPES, Keys, KnownKey, Scope, is_ours, read_token
from aifactory.records.limits import Subject
from aifactory.serve.wire import StatusError

CALLER = "aifactory.caller"
"""In the scope of a request: its `Caller`."""
_MOST_KNOWN = 10_000
"""Keys, and ids that are no keys, of which is remembered what was read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks."""

    key_id: str
    team: str | None = None
    scopes: frozenset[Scope] = frozenset(SCOPES)
    who: str = ""
    """What stands in line as one before the engine: the key; of those without one, whatever they send in its place."""
    is_limited: bool = False
    """Whether limits hold for it."""

    def may_see(self, key_id: str, team: str | None) -> bool:
        """Whether what belongs to a key and its team is for it, too."""
        is_ours = team == self.team if team is not None else key_id == self.key_id
        return is_ours or (self.key_id != ANONYMOUS and "operate" in self.scopes)

    @property
    def subjects(self) -> list[Subject]:
        """Whose limits hold for it."""
        return [Subject("key", self.key_id), *([] if self.team is None else [Subject("team", self.team)])]


def caller_of(request: Request) -> Caller:
    """Who asks this."""
    caller: Caller = request.scope[CALLER]
    return caller


@dataclass(slots=True)
class _Read:
    """What was read of a key, and when."""

    key: KnownKey | None
    at: float


class Access:
    """Knows callers by their keys."""

    def __init__(self, keys: Keys, options: Gateway, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._keys = keys
        self._options = options
        self._clock = clock
        self._read: dict[str, _Read] = {}
        self._reading: dict[str, asyncio.Task[KnownKey | None]] = {}
        # Of its own: what waits for the log of answers must not hold up who asks.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="keys")

    async def caller(self, headers: Mapping[str, str], scope: Scope | None) -> Caller:
        """Who sends these headers.

        scope    what the caller must be allowed to do
        Raises   StatusError: 401, 403; 503 where the database does not answer.
        """
        said = headers.get("authorization", "")
        kind, _, token = said.partition(" ")
        token = token.strip()
        is_key = kind.lower() == "bearer" and is_ours(token)
        if not is_key:
            # Clients of OpenAI's interface always send something.
            if self._options.keys == "required":
                raise _unauthorized(
                    "Expected an API key of this factory in Authorization: Bearer, found none.", "missing"
                )
            return await self._anonymous(said)
        named = read_token(token)
        if named is None:
            raise _unauthorized("Expected a whole API key, found one that is cut off or misspelt.", "invalid")
        key_id, secret = named
        known = await self._known(key_id)
        now = self._keys.journal.clock()
        # In the same time, whether there is such a key or not.
        is_proved = (known or NOBODY).is_proved_by(secret, now)
        if known is None or not is_proved:
            raise _unauthorized(
                "Expected a good API key, found one that nobody was given, or that was replaced.", "invalid"
            )
        self._require_active(known, now)
        if scope is not None and scope not in known.key.scopes:
            raise StatusError(
                403,
                f"Expected a key with the scope {scope!r}, found {known.key.id} with {', '.join(known.key.scopes)}.",
                kind="permission_error",
                code="insufficient_scope",
            )
        return _caller(known)

    async def owner(self, key_id: str) -> Caller:
        """Whoever asked for work in the background by this key. Raises StatusError where it is good for nothing any more."""
        if key_id == ANONYMOUS:
            return await self._anonymous("")
        known = await self._known(key_id)
        if known is None:
            raise _unauthorized(f"Expected the key {key_id}, by which this was asked for, found none.", "invalid")
        self._require_active(known, self._keys.journal.clock())
        return _caller(known)

    def close(self) -> None:
        """End its threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    # ── how ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _anonymous(self, said: str) -> Caller:
        # Limits may hold for those without keys as well; they are read as those of a key are.
        known = await self._known(ANONYMOUS)
        return Caller(key_id=ANONYMOUS, who=hash_text(said), is_limited=known is not None and known.is_limited)

    def _require_active(self, known: KnownKey, now: float) -> None:
        state = known.key.state(now)
        if state != "active":
            raise _unauthorized(f"Expected a good API key, found that {known.key.id} has {_ENDED[state]}.", state)

    async def _known(self, key_id: str) -> KnownKey | None:
        found, now = self._read.get(key_id), self._clock()
        age = float("inf") if found is None else now - found.at
        if age >= self._options.keys_refresh_s:
            return await asyncio.shield(self._reader(key_id))
        if age >= self._options.keys_refresh_s / 2:
            self._reader(key_id)
        assert found is not None
        return found.key

    def _reader(self, key_id: str) -> asyncio.Task[KnownKey | None]:
        """Reads a key, once for all who want it now."""
        task = self._reading.get(key_id)
        if task is None:
            task = self._reading[key_id] = asyncio.create_task(self._look_up(key_id))
            task.add_done_callback(lambda done: self._was_read(key_id, done))
        return task

    def _was_read(self, key_id: str, done: asyncio.Task[KnownKey | None]) -> None:
        self._reading.pop(key_id, None)
        if not done.cancelled():
            done.exception()  # whoever waits is told; where nobody does, the next one is

    async def _look_up(self, key_id: str) -> KnownKey | None:
        asked_at = self._clock()
        try:
            key = await asyncio.get_running_loop().run_in_executor(self._threads, self._keys.known, key_id)
        except StateError as error:
            raise StatusError(
                503,
                "Expected the database of the keys to answer, found that it does not. Ask again later.",
                kind="server_error",
                code="keys_unavailable",
            ) from error
        self._read.pop(key_id, None)
        self._read[key_id] = _Read(key, asked_at)
        while len(self._read) > _MOST_KNOWN:
            del self._read[next(iter(self._read))]
        return key


_ENDED = {"revoked": "been revoked", "expired": "expired"}


def _caller(known: KnownKey) -> Caller:
    key = known.key
    return Caller(key_id=key.id, team=key.team, scopes=frozenset(key.scopes), who=key.id, is_limited=known.is_limited)


def _unauthorized(message: str, why: str) -> StatusError:
    return StatusError(401, message, kind="invalid_request_error", code=f"{why}_api_key")
