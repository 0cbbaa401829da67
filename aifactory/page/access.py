"""Access: who may see the page and act on it.

open     on loopback, where nobody has a key and no token is set: whoever reaches the port; only under a name of this machine, so
         that a web site whose name is made to point here is answered nothing
closed   by a key with the scope `operate`, or the token in AIFACTORY_PAGE_TOKEN: in a header, or once in a form, after which a
         cookie stands for it. The key is checked again at each request: one that was revoked is worth nothing at once.

What is done must come from a form of this page: it carries a proof that only this page was given, and the browser must not say
that it comes from elsewhere.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.requests import Request

from aifactory.errors import ConfigError
from aifactory.records.journal import ANONYMOUS

TOKEN_VARIABLE = "AIFACTORY_PAGE_TOKEN"
TOKEN_KEY = "page-token"
"""What the audit calls whoever has the token."""
COOKIE = "aifactory_page"
_LEAST_TOKEN = 16
_SESSION_S = 12 * 3600.0
_MOST_SESSIONS = 1000
_LOCAL = ("localhost", "127.0.0.1", "::1")

CheckKey = Callable[[str], str | None]
"""The id of a good key with the scope `operate`, by what its holder sends; None: it is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Visitor:
    """Who looks at the page."""

    key_id: str
    """For the audit."""
    session: str
    """What stands for a key in the browser; empty where none is asked for."""
    by_header: bool = False
    """Whether the key came in a header, which no other web site can have a browser send."""


class RefusedError(Exception):
    """A request that is not answered; `status` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Access:
    """Knows visitors."""

    def __init__(
        self,
        *,
        host: str,
        token: str | None = None,
        has_keys: Callable[[], bool] = lambda: False,
        check_key: CheckKey = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises ConfigError for an address that other machines reach without anything that keeps strangers out."""
        if token is not None and len(token) < _LEAST_TOKEN:
            raise ConfigError(
                f"expected a token of at least {_LEAST_TOKEN} characters in {TOKEN_VARIABLE}, found {len(token)}; take a random "
                "one: python -c 'import secrets; print(secrets.token_urlsafe())'."
            )
        if not is_loopback(host) and token is None and not has_keys():
            raise ConfigError(
                f"expected keys or a token before the page is served at {host}, which other machines reach, found neither. "
                f"Create a key of the scope operate, set {TOKEN_VARIABLE}, or leave runtime.page.host at 127.0.0.1."
            )
        self._hosts = {*_LOCAL, host}
        self._token = token
        self._has_keys = has_keys
        self._check_key = check_key
        self._clock = clock
        self._secret = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._sessions: OrderedDict[str, tuple[str, float]] = OrderedDict()

    @property
    def is_open(self) -> bool:
        """Whether nothing is asked of a visitor. Keys may be created while the page is served."""
        return self._token is None and not self._has_keys()

    def visitor(self, request: Request) -> Visitor | None:
        """Who asks; None: whoever it is must say so first.

        Raises   RefusedError for a name that is not this machine's, where nothing else keeps strangers out.
        """
        if self.is_open:
            self._require_host(request)
            return Visitor(key_id=ANONYMOUS, session="")
        scheme, _, sent = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            key_id = self._known(sent.strip())
            return None if key_id is None else Visitor(key_id=key_id, session="", by_header=True)
        session = request.cookies.get(COOKIE, "")
        with self._lock:
            kept = self._sessions.get(session)
        if kept is None or self._clock() > kept[1]:
            return None
        key_id = self._known(kept[0])
        return None if key_id is None else Visitor(key_id=key_id, session=session)

    def enter(self, key: str) -> str | None:
        """A new session for whoever has this key or the token; None: it is neither."""
        if self._known(key) is None:
            return None
        session = secrets.token_urlsafe(32)
        with self._lock:
            self._sessions[session] = key, self._clock() + _SESSION_S
            while len(self._sessions) > _MOST_SESSIONS:
                self._sessions.popitem(last=False)
        return session

    def leave(self, session: str) -> None:
        """End a session."""
        with self._lock:
            self._sessions.pop(session, None)

    def proof(self, visitor: Visitor | None) -> str:
        """What a form of this page carries for this visitor."""
        session = "" if visitor is None else visitor.session
        return hmac.new(self._secret, session.encode(), hashlib.sha256).hexdigest()

    def require_own_form(self, request: Request, visitor: Visitor | None, proof: str) -> None:
        """Raises RefusedError for what did not come from a form that this page gave to this visitor."""
        if visitor is not None and visitor.by_header:
            return
        origin = request.headers.get("origin")
        own = urlsplit(origin).netloc == request.headers.get("host") if origin else True
        own = own and request.headers.get("sec-fetch-site", "same-origin") in ("same-origin", "none")
        if not own or not hmac.compare_digest(self.proof(visitor).encode(), proof.encode()):
            raise RefusedError(
                403,
                "expected a form of this page, found another one, or one of before it was restarted: go back, load the view again and repeat it",
            )

    def _known(self, key: str) -> str | None:
        if self._token is not None and hmac.compare_digest(key.encode(), self._token.encode()):
            return TOKEN_KEY
        return self._check_key(key)

    def _require_host(self, request: Request) -> None:
        asked = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
        if asked not in self._hosts:
            raise RefusedError(
                421,
                "expected a name of this machine, such as localhost or 127.0.0.1, found another one: without a key the page answers under no other",
            )


def is_loopback(host: str) -> bool:
    """Whether an address is one that only this machine reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
