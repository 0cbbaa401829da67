"""The route of feedback: what users say of answers, on disk before it is acknowledged.

POST /v1/feedback
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

from starlette.requests import Request
from starlette.responses import Response

from aifactory.engine.protocol import MAX_ANSWERS
from aifactory.errors import BadRequestError
from aifactory.observe import metrics
from aifactory.records.feedback import Feedback, FeedbackLog
from aifactory.records.identity import canonical_json, hash_text
from aifactory.serve.access import caller_of
from aifactory.serve.asking import identity
from aifactory.serve.bodies import FeedbackBody
from aifactory.serve.limiting import Limiter
from aifactory.serve.wire import json_response, parse

Handler = Callable[[Request], Awaitable[Response]]


class FeedbackRoutes:
    """Feedback over HTTP."""

    def __init__(self, log: FeedbackLog, *, limiter: Limiter, read: Callable[[Request], Awaitable[bytes]]) -> None:
        self._log = log
        self._limiter = limiter
        self._read = read
        self.handlers: Mapping[tuple[str, str], Handler] = {("POST", "/v1/feedback"): self._feedback}

    async def _feedback(self, request: Request) -> Response:
        """Say of an answer how good it is, what it should have been, or to which others it is preferred."""
        body = parse(FeedbackBody, await self._read(request))
        completion = body.subject
        if body.score is None and body.correction is None and body.comment is None and body.preferred is None:
            raise BadRequestError(
                "Expected a score, a correction, a comment or a choice, found none of them.", field="score"
            )
        rejected: Sequence[str] = ()
        if isinstance(body.preferred, int):
            answers = await asyncio.to_thread(self._log.answers_of, completion, most=MAX_ANSWERS)
            completion, rejected = _chosen(answers, body)
        elif isinstance(body.rejected, str):
            rejected = [body.rejected]
        # What was not there before choices were is left out, so that a key derived then is derived again.
        new = {name for name in ("index", "preferred", "rejected") if getattr(body, name) is None}
        derived = hash_text(canonical_json(body.model_dump(exclude={"idempotency_key", *new})))
        key = request.headers.get("idempotency-key") or body.idempotency_key or derived
        entry = Feedback(
            completion=completion,
            idempotency_key=key,
            score=body.score,
            correction=body.correction,
            comment=body.comment,
            user=body.user,
            key_id=caller_of(request).key_id,
            rejected=rejected,
        )
        await self._limiter.admit(caller_of(request), identity(request), brief=True)
        counted = await asyncio.to_thread(self._log.record, entry)
        metrics.FEEDBACK.add(outcome="counted" if counted else "repeated")
        return json_response({"object": "feedback", "idempotency_key": key, "counted": counted})


def _chosen(answers: Mapping[int, tuple[str, str]], body: FeedbackBody) -> tuple[str, list[str]]:
    """The id of the answer that was preferred by its index, and those of the others. Raises BadRequestError."""
    for field, index in (("preferred", body.preferred), ("rejected", body.rejected)):
        if index is not None and index not in answers:
            known = f"from 0 to {max(answers)}" if answers else "of several answers, of which this id has none,"
            raise BadRequestError(f"Expected in {field} an index {known}, found {index!r}.", field=field)
    assert isinstance(body.preferred, int)
    preferred, prompt = answers[body.preferred]
    if isinstance(body.rejected, int):
        return preferred, [answers[body.rejected][0]]
    others = [other for other, asked in answers.values() if asked == prompt and other != preferred]
    if not others:
        raise BadRequestError("Expected another answer to the same prompt, found none.", field="preferred")
    return preferred, others
