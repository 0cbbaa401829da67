"""Trials as a replica sees them: how requests go while a release is on trial, and copies that one in the shadow answers.

A copy begins when the answer to its request is kept. It is bounded in every way: at most so many are under way, none
begins while anybody waits, all of them end as soon as somebody does, and what they need of threads is their own. Whatever
becomes of one, the request of which it is a copy knows nothing of it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from aifactory.engine.protocol import Delta, GenerationRequest
from aifactory.errors import AIFactoryError, BadRequestError
from aifactory.observe.events import log_event
from aifactory.records.trials import Outcome, ShadowAnswer, Trial, TrialLog
from aifactory.serve.releases import Releases, Served

if TYPE_CHECKING:
    from aifactory.serve.questions import Prompt, Question

ReadPrompts = Callable[[Served], "Sequence[Prompt]"]
"""The prompts of a request, as the tokens of a release."""
_MOST_WAITING = 20_000
"""Outcomes that are remembered while the database is away; then the oldest are forgotten."""


class Outcomes:
    """How requests went, until the registry is told. Added to in the event loop, told in any thread."""

    def __init__(self, log: TrialLog) -> None:
        self._log = log
        self._waiting: deque[Outcome] = deque(maxlen=_MOST_WAITING)

    def add(self, outcome: Outcome) -> None:
        self._waiting.append(outcome)

    def tell(self) -> None:
        """Write down all that has come. Raises StateError, and then forgets nothing."""
        told: list[Outcome] = []
        with suppress(IndexError):
            while True:
                told.append(self._waiting.popleft())
        try:
            self._log.add(told)
        except BaseException:
            self._waiting.extendleft(reversed(told))
            raise


@dataclass(slots=True, kw_only=True)
class Watch:
    """What a trial wants to know of one request."""

    trial: int
    """The entry that held when it came."""
    release: int
    """Who answers it."""
    outcomes: Outcomes
    copy: Callable[[Question], None] | None = None
    """Called when its answers are kept."""
    _begun: float | None = None
    _first: float | None = None

    def begin(self) -> None:
        """It is its turn."""
        self._begun = time.perf_counter()

    def take(self) -> None:
        """Something of the answer has come."""
        if self._first is None:
            self._first = time.perf_counter()

    def end(self, *, tokens: int, failed: bool = False) -> None:
        """It has been answered, or has failed by no fault of the client's. What never came to its turn tells nothing."""
        if self._begun is None:
            return
        first_s = None if self._first is None else self._first - self._begun
        seconds = time.perf_counter() - self._begun
        self.outcomes.add(
            Outcome(
                trial=self.trial, release=self.release, failed=failed, seconds=seconds, first_s=first_s, tokens=tokens
            )
        )


class Shadows:
    """Copies of requests, answered by the release in the shadow. One event loop calls all of it."""

    def __init__(
        self,
        releases: Releases,
        outcomes: Outcomes,
        log: TrialLog,
        *,
        most: int,
        timeout_s: float | None,
        is_busy: Callable[[], bool],
    ) -> None:
        """`most` may be under way at once, each for `timeout_s` seconds; none begins while `is_busy`."""
        self._releases = releases
        self._outcomes = outcomes
        self._log = log
        self._most = most
        self._timeout_s = timeout_s
        self._is_busy = is_busy
        self._running: set[asyncio.Task[None]] = set()
        # Their own: the threads in which live requests are read and kept are few.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shadow")

    @property
    def num_running(self) -> int:
        """Copies under way."""
        return len(self._running)

    def copy(self, question: Question, read: ReadPrompts) -> None:
        """Have a question that was answered asked once more, of the release in the shadow, if there is room for that."""
        if len(self._running) >= self._most or self._is_busy():
            return
        task = asyncio.create_task(self._answer(question, read))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def make_way(self) -> None:
        """End all that are under way: somebody waits."""
        for task in self._running:
            task.cancel()

    async def _answer(self, question: Question, read: ReadPrompts) -> None:
        with self._releases.hold_tried() as held:
            if held is None:
                return
            trial, served = held
            if trial.kind != "shadow":
                return
            watch = Watch(trial=trial.number, release=served.release.number, outcomes=self._outcomes)
            watch.begin()
            try:
                async with asyncio.timeout(self._timeout_s):
                    answers = await self._generate(question, read, trial, served, watch)
            except Exception as error:
                watch.end(tokens=0, failed=True)
                text = f"{type(error).__name__}: {error}"
                log_event("shadow_failed", release=served.release.name, completion=question.id, error=text)
                return
            watch.end(tokens=sum(answer.answer_tokens for answer in answers))
            with suppress(AIFactoryError):  # a database that is away loses a shadow's answer, and no more
                await asyncio.get_running_loop().run_in_executor(self._thread, self._log.add_shadows, answers)

    async def _generate(
        self, question: Question, read: ReadPrompts, trial: Trial, served: Served, watch: Watch
    ) -> list[ShadowAnswer]:
        """Raises BadRequestError, CapacityError, RuntimeError where there is no answer."""
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        engine, submitted = served.engine, list[str]()
        prompts = await loop.run_in_executor(self._thread, read, served)
        room = engine.context_length - max(len(prompt.ids) for prompt in prompts)
        if room < 1:
            raise BadRequestError(f"Expected prompts within the context of {engine.context_length} tokens.")
        asked = question.sampling
        sampling = replace(asked, max_tokens=min(asked.max_tokens, room), logprobs=None, echo=False)

        def submit(number: int, prompt: Prompt) -> None:
            def deliver(delta: Delta) -> None:
                loop.call_soon_threadsafe(arrived.put_nowait, (number * sampling.n + delta.index, delta))

            request_id = f"shadow-{trial.number}-{question.id}.{number}"
            submitted.append(request_id)
            engine.submit(GenerationRequest(id=request_id, prompt_ids=prompt.ids, sampling=sampling), deliver)

        texts: dict[int, list[str]] = {}
        tokens: dict[int, int] = {}
        reasons: dict[int, str] = {}
        try:
            for number, prompt in enumerate(prompts):
                await loop.run_in_executor(self._thread, submit, number, prompt)
            while len(reasons) < len(prompts) * sampling.n:
                index, delta = await arrived.get()
                watch.take()
                if delta.finish_reason in ("error", "cancelled"):
                    raise RuntimeError(delta.error or "the engine has ended it")
                texts.setdefault(index, []).append(delta.text)
                tokens[index] = tokens.get(index, 0) + len(delta.token_ids)
                if delta.finish_reason is not None:
                    reasons[index] = delta.finish_reason
        finally:
            for request_id in submitted:
                engine.cancel(request_id)
        return [
            ShadowAnswer(
                completion=question.answer_id(index),
                release=served.release.number,
                answer="".join(texts[index]),
                finish_reason=reasons[index],
                prompt_tokens=len(prompts[index // sampling.n].ids),
                answer_tokens=tokens[index],
            )
            for index in sorted(reasons)
        ]
