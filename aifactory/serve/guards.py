"""Guards: functions of the user's that look at prompts before they are answered, and at answers before they are sent.

    def guard(text: str, asked: Mapping[str, Any]) -> str | None

None lets it pass; a text says why it does not. `asked` holds `key_id`, `team`, `user` and, of an answer, its `prompt`. A prompt that is
refused is answered 400 with the reason; an answer is sent without its text, with the finish reason `content_filter`, and is kept
like that. A guard that raises lets nothing pass: 500.
Where answers are guarded or masked they are sent when they are whole, also those that are streamed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from aifactory.config.functions import load_named
from aifactory.config.gateway import Gateway
from aifactory.observe.events import logger
from aifactory.serve.wire import StatusError

if TYPE_CHECKING:
    from aifactory.engine.protocol import Delta
    from aifactory.serve.answers import Choice
    from aifactory.serve.questions import Question

Guard = Callable[[str, Mapping[str, Any]], str | None]
Mask = Callable[[str], str]
"""A text without personal data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guards:
    """What is looked at, and what is masked."""

    prompts: Sequence[tuple[str, Guard]] = ()
    """By their names."""
    answers: Sequence[tuple[str, Guard]] = ()
    mask_answers: Mask | None = None
    mask_log: Mask | None = None

    @classmethod
    def of(cls, options: Gateway, mask: Mask | None) -> Guards:
        """Those of a configuration. Raises ConfigError where one can't be loaded."""
        where = "runtime.gateway."
        if (options.mask_answers or options.mask_log) and mask is None:
            raise ValueError("expected a way to mask personal data, found none")
        return cls(
            prompts=[(n, load_named(n, where=where + "prompt_guards")) for n in options.prompt_guards],
            answers=[(n, load_named(n, where=where + "answer_guards")) for n in options.answer_guards],
            mask_answers=mask if options.mask_answers else None,
            mask_log=mask if options.mask_log else None,
        )

    @property
    def hold_answers(self) -> bool:
        """Whether answers are sent only when they are whole."""
        return bool(self.answers) or self.mask_answers is not None

    async def require_good(self, texts: Sequence[str], asked: Mapping[str, Any], *, field: str) -> None:
        """Raises StatusError where a guard lets a prompt not pass."""
        if not self.prompts:
            return
        reason = await asyncio.to_thread(
            lambda: next((why for text in texts if (why := _refusal(self.prompts, text, asked)) is not None), None)
        )
        if reason is not None:
            raise StatusError(400, reason, kind="invalid_request_error", code="content_filter", field=field)

    async def held(
        self, deltas: AsyncGenerator[tuple[int, Delta], None], question: Question, choices: Sequence[Choice]
    ) -> AsyncGenerator[tuple[int, Delta], None]:
        """One delta for each answer, when all are whole and have been looked at."""
        whole: dict[int, Delta] = {}
        async with aclosing(deltas):
            async for index, delta in deltas:
                whole[index] = whole[index].then(delta) if index in whole else delta
        for index, delta in sorted(whole.items()):
            yield index, await asyncio.to_thread(self._looked_at, delta, question, choices[index])

    def _looked_at(self, delta: Delta, question: Question, choice: Choice) -> Delta:
        asked = {"key_id": question.key_id, "team": question.team, "user": question.user, "prompt": choice.prompt.text}
        said = delta.text
        reason = _refusal(self.answers, said, asked)
        if reason is not None:
            logger.info("refused answer=%s: %s", question.answer_id(choice.index), reason)
        masked = said if self.mask_answers is None else self.mask_answers(said)
        # Calls of tools are read from tokens, in which nothing can be masked.
        if reason is not None or (masked != said and choice.reader is not None):
            choice.refused = True
            return replace(delta, text="", scores=(), prompt_scores=())
        return delta if masked == said else replace(delta, text=masked, scores=(), prompt_scores=())


def _refusal(guards: Sequence[tuple[str, Guard]], text: str, asked: Mapping[str, Any]) -> str | None:
    for name, guard in guards:
        try:
            reason = guard(text, asked)
        except Exception as error:
            logger.exception("failed guard=%s", name)
            raise StatusError(
                500, f"The guard {name} failed; the server's log says why.", kind="server_error"
            ) from error
        if reason is not None:
            return str(reason)
    return None
