"""Limiting: requests are let in by what their keys and teams may use, and what they have used is told.

    admit ─▶ waits with those that came meanwhile ─▶ one transaction for all of them (records/allowances.py) ─▶ Grant | 429, 402, 400
    Grant.end(used) ─▶ in the next one, before the client is told that its answer has ended

One transaction of a replica is under way at a time; those that come meanwhile go together with the next. Whoever has no limits waits
for none: what he used is told a moment later, unless he has no key.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from aifactory.config.gateway import Gateway
from aifactory.errors import AIFactoryError, StateError
from aifactory.observe.events import log_event
from aifactory.records.allowances import HOLD_S, Allowances, Ask, Meter, Refusal, Use
from aifactory.records.journal import ANONYMOUS
from aifactory.serve.access import Caller
from aifactory.serve.wire import StatusError

_RENEW_S = HOLD_S / 4
_SWEEP_S = 600.0
_LATER_S = 0.5
"""What nobody waits for goes together for so long."""
_LONGEST_BREATH_S = 0.005
"""Between two transactions it is as quiet as one took, this long at most: more come together, and answers get on meanwhile."""
_AGAIN_S = 0.5
"""Pause before what the database did not take is told again."""
_MOST_UNTOLD = 100_000
"""Uses that are remembered while the database is away; then the oldest are forgotten."""
_WHAT: Mapping[Meter, str] = {
    "requests_per_minute": "requests a minute",
    "tokens_per_minute": "tokens a minute",
    "concurrent": "open requests",
    "budget_tokens": "tokens",
    "budget_money": "of money",
    "budget_joules": "joules",
}


class Grant:
    """What a request was let in with, until it ends."""

    def __init__(self, limiter: Limiter, caller: Caller, identity: str, *, is_limited: bool) -> None:
        self._limiter = limiter
        self._caller = caller
        self._identity = identity
        self._is_limited = is_limited
        self._ended = False

    async def end(self, *, prompt_tokens: int = 0, answer_tokens: int = 0) -> None:
        """It has used so many tokens, and uses no more. Where limits hold they know it when this returns."""
        if self._ended:
            return
        self._ended = True
        if self._caller.key_id == ANONYMOUS and not self._is_limited:
            return  # the log of answers has it, and nobody's budget
        use = self._limiter.use(self._caller, self._identity, prompt_tokens, answer_tokens)
        told = self._limiter.tell_later(use, is_awaited=self._is_limited)
        if self._is_limited:
            await asyncio.shield(told)


class Limiter:
    """Lets the requests of one replica in."""

    def __init__(self, allowances: Allowances, options: Gateway, *, holder: str) -> None:
        """`holder` is a name of this replica that no other has."""
        self._allowances = allowances
        self._options = options
        self._holder = holder
        self._asks: list[tuple[Ask, asyncio.Future[Refusal | None]]] = []
        self._uses: list[tuple[Use, asyncio.Future[None] | None]] = []
        self._open: set[str] = set()
        """Ids of those that limits hold for."""
        self._renewed = self._swept = time.monotonic()
        self._rested_at = 0.0
        self._worker: asyncio.Task[None] | None = None
        self._came: asyncio.Event | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="limits")

    async def admit(
        self,
        caller: Caller,
        identity: str,
        *,
        prompt_tokens: int = 0,
        answer_tokens: int = 0,
        behind: bool = False,
        brief: bool = False,
    ) -> Grant:
        """Let a request in that uses at most so many tokens.

        behind   it is work in the background, which rates don't hold for
        brief    it is over at once
        Raises   StatusError: 429, 402; 400 where it asks for more than it can ever get; 503 where the database does not answer.
        """
        if caller.is_limited:
            ask = Ask(
                id=identity,
                key_id=caller.key_id,
                team=caller.team,
                tokens=prompt_tokens + answer_tokens,
                money=self._options.money_for(prompt_tokens=prompt_tokens, answer_tokens=answer_tokens),
                is_rated=not behind,
                is_brief=brief,
            )
            refusal = await self._ask(ask)
            if refusal is not None:
                raise _refused(refusal)
        return Grant(self, caller, identity, is_limited=caller.is_limited and not brief)

    def use(self, caller: Caller, identity: str, prompt_tokens: int, answer_tokens: int) -> Use:
        """What a request of this caller has used."""
        return Use(
            id=identity,
            key_id=caller.key_id,
            team=caller.team,
            prompt_tokens=prompt_tokens,
            answer_tokens=answer_tokens,
            money=self._options.money_for(prompt_tokens=prompt_tokens, answer_tokens=answer_tokens),
        )

    def tell_later(self, use: Use, *, is_awaited: bool) -> asyncio.Future[None]:
        """Done when it was told; at once where nobody waits for it."""
        told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._uses.append((use, told if is_awaited else None))
        if not is_awaited:
            told.set_result(None)
        self._wake()
        return told

    def close(self) -> None:
        """Tell what was not told yet, and end. Raises StateError."""
        uses, self._uses = [use for use, _ in self._uses], []
        self._thread.shutdown(wait=True)
        if uses:
            self._allowances.turn([], uses, holder=self._holder)

    # ── how ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _ask(self, ask: Ask) -> Refusal | None:
        answer: asyncio.Future[Refusal | None] = asyncio.get_running_loop().create_future()
        self._asks.append((ask, answer))
        self._wake()
        try:
            return await answer
        except StateError as error:
            raise StatusError(
                503,
                "Expected the database of the limits to answer, found that it does not. Ask again later.",
                kind="server_error",
                code="limits_unavailable",
            ) from error

    def _wake(self) -> None:
        if self._worker is None or self._worker.done():
            self._came = asyncio.Event()
            self._worker = asyncio.create_task(self._work())
        assert self._came is not None
        self._came.set()

    async def _work(self) -> None:
        """One transaction after another, until there is nothing to do."""
        while self._asks or self._uses or self._open:
            assert self._came is not None
            self._came.clear()
            await self._wait_for_more(self._came)
            await asyncio.sleep(max(0.0, self._rested_at - time.monotonic()))
            asks, self._asks = self._asks, []
            uses, self._uses = self._uses[:_MOST_UNTOLD], []
            await self._turn(asks, uses)

    async def _wait_for_more(self, came: asyncio.Event) -> None:
        """Until somebody waits, or it is time for what nobody waits for."""
        begun = time.monotonic()
        while not self._asks and not any(told is not None for _, told in self._uses):
            until = begun + _LATER_S if self._uses else self._renewed + _RENEW_S
            left = until - time.monotonic()
            if left <= 0:
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(came.wait(), left)
            came.clear()

    async def _turn(
        self,
        asks: list[tuple[Ask, asyncio.Future[Refusal | None]]],
        uses: list[tuple[Use, asyncio.Future[None] | None]],
    ) -> None:
        now = time.monotonic()
        renew = now - self._renewed >= _RENEW_S
        self._open -= {use.id for use, _ in uses}
        try:
            found = await asyncio.get_running_loop().run_in_executor(
                self._thread, self._write, [ask for ask, _ in asks], [use for use, _ in uses], renew
            )
        except Exception as error:
            log_event("warned", of=f"limits were not kept: {type(error).__name__}: {error}")
            for _, answer in asks:
                if not answer.done():
                    answer.set_exception(error if isinstance(error, AIFactoryError) else StateError(str(error)))
            # Answers go out all the same; what they used is told when the database is back.
            for _, told in uses:
                if told is not None and not told.done():
                    told.set_result(None)
            self._uses = [(use, None) for use, _ in uses] + self._uses
            await asyncio.sleep(_AGAIN_S)
            return
        ended = time.monotonic()
        self._rested_at = ended + min(ended - now, _LONGEST_BREATH_S)
        if renew:
            self._renewed = now
        for _, told in uses:
            if told is not None and not told.done():
                told.set_result(None)
        for (ask, answer), refusal in zip(asks, found, strict=True):
            if refusal is None and not ask.is_brief:
                self._open.add(ask.id)
            if not answer.done():
                answer.set_result(refusal)
            elif refusal is None and not ask.is_brief:  # whoever asked has gone meanwhile
                self._uses.append((Use(id=ask.id, key_id=ask.key_id, team=ask.team), None))

    def _write(self, asks: list[Ask], uses: list[Use], renew: bool) -> list[Refusal | None]:
        found = self._allowances.turn(asks, uses, holder=self._holder, renew=renew)
        if renew and time.monotonic() - self._swept >= _SWEEP_S:
            self._swept = time.monotonic()
            self._allowances.sweep()
        return found


def _refused(refusal: Refusal) -> StatusError:
    what, whose = _WHAT[refusal.meter], str(refusal.subject)
    if refusal.window is not None:
        ends = {"day": "the next day begins (UTC)", "month": "the next month begins (UTC)", "total": ""}[refusal.window]
        again = f" Ask for less, or again when {ends}" if ends else " Ask for less"
        left = f"{refusal.left:,.6g} {what} left" if refusal.left else "nothing left"
        return StatusError(
            402,
            f"Expected room in the budget of {refusal.limit:,.15g} {what} of the {whose}, found {left}, and a request that may "
            f"take {refusal.asked:,.6g}.{again}, or have the budget raised.",
            kind="insufficient_quota",
            code="budget_empty",
        )
    if refusal.retry_after_s is None:
        return StatusError(
            400,
            f"Expected a request of at most {refusal.limit:,.15g} tokens, prompt and answer, which is what the {whose} may use in "
            f"a minute; found one that may take {refusal.asked:,.15g}. Lower max_tokens or shorten the prompt.",
            kind="invalid_request_error",
            code="request_too_large",
        )
    return StatusError(
        429,
        f"Expected at most {refusal.limit:,.15g} {what} of the {whose}, found no room for this one. Ask again in "
        f"{refusal.retry_after_s} s.",
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        retry_after_s=refusal.retry_after_s,
    )
