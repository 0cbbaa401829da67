"""The server of the page: HTML views, the same as JSON, actions on releases. Nothing in it starts or asks Ray.

    /  /cycles  /cycles/3  /corpora  /corpora/<name>  /training  /releases  /releases/2  /traffic  /feedback  /drift  /energy  /alerts
    /data/<view>               what the view is made of, as JSON
    /releases/act              what an action would do (GET), and doing it (POST)
    /enter  /leave             a key for a session, and its end
    /healthz                   200 while the database answers

Every answer names what may be loaded: files of this server, no script in the text, nothing from elsewhere.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from aifactory.errors import AIFactoryError, ConfigError, StateError
from aifactory.page.access import COOKIE, Access, RefusedError, Visitor
from aifactory.page.actions import carry_out, propose, read_asked
from aifactory.page.alerts import Alert, AuditWatch, alerts
from aifactory.page.audit_lines import audit_lines
from aifactory.page.corpora import corpora, report_page
from aifactory.page.cycles import cycles
from aifactory.page.drift import drift
from aifactory.page.feedback import feedback_view
from aifactory.page.loop import Loop, loop
from aifactory.page.releases import lineage, releases
from aifactory.page.rendering import Rendering, to_json
from aifactory.page.runs import runs
from aifactory.page.spending import SPANS as ENERGY_SPANS
from aifactory.page.spending import EnergyBooks
from aifactory.page.traffic import SPANS as TRAFFIC_SPANS
from aifactory.page.traffic import traffic
from aifactory.proof.cycle_page import cycle_page
from aifactory.proof.explain import explain_cycle
from aifactory.records.books import Books

VIEWS: Mapping[str, str] = {
    "loop": "Loop",
    "cycles": "Cycles",
    "corpora": "Corpora",
    "training": "Training",
    "releases": "Releases",
    "traffic": "Traffic",
    "feedback": "Feedback",
    "drift": "Drift",
    "energy": "Energy",
    "alerts": "Alerts",
}
"""Views by their address, with what they are called."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
DOCUMENT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
"""Of the pages of corpora and cycles, which have their style in themselves."""
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Not no-referrer: with that a browser does not say where a form comes from.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_LARGEST_FORM = 64 << 10
_CYCLES = 50
_MOST_SAID = 100
Handler = Callable[[Request, Visitor], Awaitable[Response]]


class PageServer:
    """The views of one factory."""

    def __init__(self, books: Books, access: Access) -> None:
        self.books = books
        self.access = access
        self._rendering = Rendering()
        self._audit = AuditWatch(books)
        self._energy = EnergyBooks(books)
        self._said: OrderedDict[str, str] = OrderedDict()
        self._views: Mapping[str, Callable[[Request], Any]] = {
            "loop": lambda _: loop(books, audit=self._audit.faults()),
            "cycles": lambda request: cycles(books, limit=_CYCLES, before=_whole(request, "before")),
            "corpora": lambda _: corpora(books),
            "training": lambda _: runs(books),
            "releases": lambda _: releases(books),
            "traffic": lambda request: traffic(books, request.query_params.get("span", "1h")),
            "feedback": lambda _: feedback_view(books),
            "drift": lambda _: drift(books),
            "energy": lambda request: self._energy.view(request.query_params.get("span", "all")),
            "alerts": lambda _: alerts(books, audit=self._audit.faults()),
        }

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/healthz", self._health),
            Route("/files/{name}", self._file),
            Route("/enter", self._enter, methods=["GET", "POST"]),
        ]
        routes.append(Route("/leave", self._guarded(self._leave, changes=True), methods=["POST"]))
        routes.append(Route("/releases/act", self._guarded(self._propose)))
        routes.append(Route("/releases/act", self._guarded(self._carry_out, changes=True), methods=["POST"]))
        routes.append(Route("/cycles/{number:int}", self._guarded(self._cycle)))
        routes.append(Route("/corpora/{name}", self._guarded(self._corpus)))
        routes.append(Route("/releases/{number:int}", self._guarded(self._release)))
        for name in VIEWS:
            path = "/" if name == "loop" else f"/{name}"
            routes.append(Route(path, self._guarded(self._shown_as_html(name)), name=name))
            routes.append(Route(f"/data/{name}", self._guarded(self._told_as_json(name))))
        app = Starlette(
            routes=routes,
            exception_handlers={HTTPException: self._failed, AIFactoryError: self._failed, Exception: self._failed},
        )
        return app

    # ── views ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _shown_as_html(self, name: str) -> Handler:
        async def show(request: Request, visitor: Visitor) -> Response:
            def render() -> str:
                values: dict[str, Any] = {"view": self._views[name](request)}
                if name == "releases":
                    values["audit"] = audit_lines(self.books)
                if name in ("traffic", "energy"):
                    values["spans"] = list(TRAFFIC_SPANS if name == "traffic" else ENERGY_SPANS)
                return self._page(name, visitor, said=self._said_to(request), **values)

            return self._html(await run_in_threadpool(render))

        return show

    def _told_as_json(self, name: str) -> Handler:
        async def tell(request: Request, visitor: Visitor) -> Response:
            data = await run_in_threadpool(lambda: to_json(self._views[name](request)))
            return Response(data, media_type="application/json", headers=_HEADERS)

        return tell

    async def _cycle(self, request: Request, visitor: Visitor) -> Response:
        number = str(request.path_params["number"])
        try:
            page = await run_in_threadpool(lambda: cycle_page(explain_cycle(self.books, number)))
        except ConfigError as error:
            raise HTTPException(404, str(error)) from error
        return self._document(page, "cycles", f"Cycle {number}")

    async def _corpus(self, request: Request, visitor: Visitor) -> Response:
        name = request.path_params["name"]
        page = await run_in_threadpool(report_page, self.books, name)
        if page is None:
            raise HTTPException(404, f"expected a corpus with a page at this address, found none: corpus/{name}.")
        return self._document(page, "corpora", f"Corpus {name[:12]}")

    async def _release(self, request: Request, visitor: Visitor) -> Response:
        number = request.path_params["number"]

        def render() -> str:
            found = releases(self.books)
            line = next((each for each in found.lines if each.number == number), None)
            if line is None:
                raise HTTPException(404, f"expected a release of this number, found none: {number}.")
            tree = lineage(self.books, line.name)
            return self._page(
                "releases", visitor, template="release", title=line.name, release=line, all=found, tree=tree.to_json()
            )

        return self._html(await run_in_threadpool(render))

    def _document(self, page: bytes, view: str, title: str) -> Response:
        """A page that stands alone, with the way back on top of it."""
        nav = self._rendering.html("document", view=view, label=VIEWS[view], title=title)
        framed = page.replace(b"<body>\n", b"<body>\n" + nav.encode(), 1)
        return HTMLResponse(framed, headers=_HEADERS | {"Content-Security-Policy": DOCUMENT_POLICY})

    # ── actions ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _propose(self, request: Request, visitor: Visitor) -> Response:
        def render() -> str:
            return self._confirmation(request.query_params, visitor)

        return self._html(await run_in_threadpool(render))

    async def _carry_out(self, request: Request, visitor: Visitor) -> Response:
        form = await _form(request)

        def act() -> str:
            return carry_out(self.books, read_asked(form), key_id=visitor.key_id)

        try:
            said = await run_in_threadpool(act)
        except StateError as error:
            wrong = str(error)
            page = await run_in_threadpool(lambda: self._confirmation(form, visitor, wrong=wrong))
            return self._html(page, status=409)
        return RedirectResponse(f"/releases?said={self._say(said)}", status_code=303, headers=_HEADERS)

    def _confirmation(self, form: Mapping[str, str], visitor: Visitor, *, wrong: str = "") -> str:
        try:
            proposal = propose(self.books, read_asked(form))
        except StateError as error:
            return self._page(
                "releases", visitor, template="refused", title="Not possible now", wrong=wrong or str(error)
            )
        found = releases(self.books)
        compared = [each for each in found.lines if each.number == proposal.asked.release or each.role == "production"]
        return self._page(
            "releases",
            visitor,
            template="confirm",
            title=proposal.title,
            proposal=proposal,
            trial=found.trial,
            compared=compared,
            wrong=wrong,
            form=dict(form),
        )

    def _say(self, text: str) -> str:
        """Keep what was done for the view that comes next; nobody else can make it say anything."""
        name = secrets.token_urlsafe(12)
        self._said[name] = text
        while len(self._said) > _MOST_SAID:
            self._said.popitem(last=False)
        return name

    def _said_to(self, request: Request) -> str:
        return self._said.get(request.query_params.get("said", ""), "")

    # ── who may ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _guarded(self, handler: Handler, *, changes: bool = False) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            try:
                visitor = await run_in_threadpool(self.access.visitor, request)
                if visitor is None:
                    if request.method == "GET" and not request.url.path.startswith("/data/"):
                        return RedirectResponse("/enter", status_code=303, headers=_HEADERS)
                    raise RefusedError(401, "expected a key of the scope operate, or the page's token, found none")
                if changes:
                    proof = (await _form(request)).get("proof", "")
                    self.access.require_own_form(request, visitor, proof)
                return await handler(request, visitor)
            except RefusedError as error:
                raise HTTPException(error.status, str(error)) from error

        return answer

    async def _enter(self, request: Request) -> Response:
        if self.access.is_open:
            return RedirectResponse("/", status_code=303, headers=_HEADERS)
        wrong = ""
        if request.method == "POST":
            form = await _form(request)
            try:
                self.access.require_own_form(request, None, form.get("proof", ""))
            except RefusedError as error:
                raise HTTPException(error.status, str(error)) from error
            session = await run_in_threadpool(self.access.enter, form.get("key", "").strip())
            if session is not None:
                entered = RedirectResponse("/", status_code=303, headers=_HEADERS)
                entered.set_cookie(
                    COOKIE, session, httponly=True, samesite="lax", secure=request.url.scheme == "https", path="/"
                )
                return entered
            wrong = "That is neither a good key of the scope operate nor the page’s token."
        page = self._rendering.html(
            "enter", factory=self.books.config.name, proof=self.access.proof(None), wrong=wrong, title="Enter"
        )
        return self._html(page, status=401 if wrong else 200)

    async def _leave(self, request: Request, visitor: Visitor) -> Response:
        self.access.leave(visitor.session)
        left = RedirectResponse("/enter", status_code=303, headers=_HEADERS)
        left.delete_cookie(COOKIE, path="/")
        return left

    # ── how ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _page(self, name: str, visitor: Visitor, *, template: str | None = None, title: str = "", **values: Any) -> str:
        view = values.get("view")
        if name == "alerts" and view is not None:
            found: Sequence[Alert] = view
        elif isinstance(view, Loop):
            found = view.alerts
        else:
            found = alerts(self.books, audit=self._audit.faults())
        production = self.books.registry.production()
        return self._rendering.html(
            template or name,
            factory=self.books.config.name,
            name=name,
            views=VIEWS,
            title=title or VIEWS[name],
            now=self.books.journal.clock(),
            wrong_now=sum(alert.severity == "now" for alert in found),
            production=None if production is None else production.name,
            refresh_ms=round(1000 * self.books.config.runtime.page.refresh_s),
            proof=self.access.proof(visitor),
            session=visitor.session,
            **{"said": "", **values},
        )

    def _html(self, page: str, *, status: int = 200) -> Response:
        return HTMLResponse(page, status_code=status, headers=_HEADERS | {"Content-Security-Policy": POLICY})

    async def _file(self, request: Request) -> Response:
        found = self._rendering.files.get(request.path_params["name"])
        if found is None:
            raise HTTPException(404, "expected a file of the page, found none of this name.")
        media_type, data = found
        # The address has a hash of the content in it.
        return Response(
            data, media_type=media_type, headers=_HEADERS | {"Cache-Control": "private, max-age=31536000, immutable"}
        )

    async def _health(self, request: Request) -> Response:
        await run_in_threadpool(self.books.registry.production)
        return Response("ok\n", media_type="text/plain", headers=_HEADERS)

    async def _failed(self, request: Request, error: Exception) -> Response:
        status, said = 500, "Something went wrong that should not; the page’s own log has more of it."
        if isinstance(error, HTTPException):
            status, said = error.status_code, str(error.detail)
        elif isinstance(error, AIFactoryError):
            status, said = 503, str(error)
        if request.url.path.startswith("/data/"):
            return Response(
                to_json({"error": said}), status_code=status, media_type="application/json", headers=_HEADERS
            )
        page = self._rendering.html(
            "failed", factory=self.books.config.name, status=status, wrong=said, title=f"{status}"
        )
        return self._html(page, status=status)


async def _form(request: Request) -> Mapping[str, str]:
    """The fields of a form, text alone. Raises RefusedError for one that is larger than any of this page's."""
    length = request.headers.get("content-length", "")
    if not length.isdecimal() or int(length) > _LARGEST_FORM:
        raise HTTPException(
            413, f"expected a form of at most {_LARGEST_FORM:,} bytes that says its length, found another one."
        )
    if not request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
        raise HTTPException(415, "expected a form (application/x-www-form-urlencoded), found something else.")
    form = await request.form(max_files=0, max_fields=20)
    return {name: value for name, value in form.items() if isinstance(value, str)}


def _whole(request: Request, name: str) -> int | None:
    text = request.query_params.get(name, "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else None
