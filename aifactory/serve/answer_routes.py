"""The routes of answers: texts, chats, embeddings and tokens, by the release in production.

POST /v1/completions  /v1/chat/completions  /v1/embeddings  /tokenize  /detokenize
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from aifactory.config import Config
from aifactory.engine.protocol import Pooling, Sampling
from aifactory.errors import BadRequestError, CapacityError
from aifactory.observe import tracing
from aifactory.observe.events import logger
from aifactory.serve.access import caller_of
from aifactory.serve.answers import Answering
from aifactory.serve.asking import BEHIND, RELEASE, asker, gone, holding, identity, who
from aifactory.serve.bodies import (
    MOST_SECONDS,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    TokenizeBody,
)
from aifactory.serve.guards import Guards
from aifactory.serve.limiting import Limiter
from aifactory.serve.outside import OutsideEndpoints
from aifactory.serve.progress import PROGRESS, Progress
from aifactory.serve.prompts import read_messages, read_prompts, require_known, tokens_of
from aifactory.serve.questions import Prompt, Question
from aifactory.serve.releases import Releases, Served
from aifactory.serve.routing import is_outside, may_do_better, prompt_bytes, targets, texts_of
from aifactory.serve.tool_calls import require_tools
from aifactory.serve.trials import Outcomes, ReadPrompts, Shadows, Watch
from aifactory.serve.wire import StatusError, json_response, parse
from aifactory.text.chat import takes_tools

_DEFAULT_COMPLETION_TOKENS = 16
_POOLING: Pooling = "mean"
_LONGEST_BEHIND_S = 30.0
"""How long a replica that has not loaded a new release yet is waited for, where another one has answered by it."""
_TIMEOUT_HEADER = "X-Request-Timeout"
Handler = Callable[[Request], Awaitable[Response]]
Body = TypeVar("Body", CompletionBody, ChatBody)


class AnswerRoutes:
    """Answers over HTTP."""

    def __init__(
        self,
        config: Config,
        releases: Releases,
        answering: Answering,
        *,
        limiter: Limiter,
        guards: Guards,
        outcomes: Outcomes,
        shadows: Shadows,
        read: Callable[[Request], Awaitable[bytes]],
    ) -> None:
        self._recipe = config.serve
        self._longest_s = config.runtime.endpoint.request_timeout_s
        self._releases = releases
        self._answering = answering
        self._options = config.runtime.gateway
        self._outside = OutsideEndpoints(self._options.outside)
        self._limiter = limiter
        self._guards = guards
        self._outcomes = outcomes
        self._shadows = shadows
        self._read = read
        self.handlers: Mapping[tuple[str, str], Handler] = {
            ("POST", "/v1/completions"): self._complete,
            ("POST", "/v1/chat/completions"): self._chat,
            ("POST", "/v1/embeddings"): self._embed,
            ("POST", "/tokenize"): self._tokenize,
            ("POST", "/detokenize"): self._detokenize,
        }

    async def _complete(self, request: Request) -> Response:
        """Go on from a text, or from several."""
        data = await self._read(request)
        return await self._routed(request, parse(CompletionBody, data), data, self._answer_texts)

    async def _chat(self, request: Request) -> Response:
        """The next message of a conversation."""
        data = await self._read(request)
        return await self._routed(request, parse(ChatBody, data), data, self._answer_chat)

    async def _routed(
        self,
        request: Request,
        body: Body,
        data: bytes,
        answer: Callable[[Request, Body], Awaitable[Response]],
    ) -> Response:
        """Have it answered by whoever routes name, or by those who come after where that one can't."""
        names = targets(self._options.routes, body, identity(request))
        for name in names[:-1]:
            try:
                return await self._answer_by(name, request, body, data, answer)
            except (CapacityError, StatusError) as error:
                if not may_do_better(error):
                    raise
                logger.info("passed_on request=%s from=%s: %s", identity(request), name, error)
        return await self._answer_by(names[-1], request, body, data, answer)

    async def _answer_by(
        self,
        name: str,
        request: Request,
        body: Body,
        data: bytes,
        answer: Callable[[Request, Body], Awaitable[Response]],
    ) -> Response:
        if not is_outside(name):
            return await answer(request, body if name == body.model else body.model_copy(update={"model": name}))
        limit, caller = self._recipe.max_answer_tokens, caller_of(request)
        default = limit if isinstance(body, ChatBody) else _DEFAULT_COMPLETION_TOKENS
        sampling = body.sampling(default=default, limit=limit)
        asked = {"key_id": caller.key_id, "team": caller.team, "user": body.user}
        await self._guards.require_good(
            texts_of(body), asked, field="messages" if isinstance(body, ChatBody) else "prompt"
        )
        num_prompts = 1 if isinstance(body, ChatBody) else len(body.prompts)
        # No tokenizer gives a text more tokens than it has bytes.
        prompt_tokens, most = prompt_bytes(body), sampling.max_tokens * sampling.n * num_prompts
        grant = await self._limiter.admit(
            caller,
            identity(request),
            prompt_tokens=prompt_tokens,
            answer_tokens=most,
            behind=BEHIND in request.scope,
        )
        return await self._outside.answer(
            request,
            name,
            json.loads(data),
            chat=isinstance(body, ChatBody),
            longest=sampling.max_tokens,
            wants_usage=body.include_usage,
            most_prompt_tokens=prompt_tokens,
            most_answer_tokens=most,
            grant=grant,
            whole=PROGRESS in request.scope,
        )

    async def _answer_texts(self, request: Request, body: CompletionBody) -> Response:
        sampling = body.sampling(default=_DEFAULT_COMPLETION_TOKENS, limit=self._recipe.max_answer_tokens)
        asked = body.prompts
        await self._come_to(request)
        with holding(self._releases, body.model, request, asker=asker(request, body.user)) as served:
            prompts = await asyncio.to_thread(read_prompts, served, asked)
            question = self._question(
                request, served, body, sampling, prompts, read=lambda other: read_prompts(other, asked)
            )
            question = await self._let_in(request, question)
            return _response(await self._answering.answer(request, question, stream=bool(body.stream)))

    async def _answer_chat(self, request: Request, body: ChatBody) -> Response:
        sampling = body.sampling(default=self._recipe.max_answer_tokens, limit=self._recipe.max_answer_tokens)
        fallback, tools = self._recipe.chat_fallback, body.shown_tools
        if tools and sampling.stop:
            raise BadRequestError("Expected stop without tools: a call is read to its end.", field="stop")
        if tools and sampling.grammar is not None:
            raise BadRequestError(
                f"Expected {body.grammar_field} without tools: an answer that matches it calls none.",
                field=body.grammar_field,
            )
        await self._come_to(request)
        read = partial(read_messages, messages=body.messages, fallback=fallback, tools=tools)
        with holding(self._releases, body.model, request, asker=asker(request, body.user)) as served:
            if tools:
                require_tools(served.tokenizer, tools)
            prompt = await asyncio.to_thread(read, served)
            question = self._question(
                request, served, body, sampling, [prompt], read=lambda other: [read(other)], tools=tools
            )
            question = await self._let_in(request, question)
            return _response(await self._answering.answer(request, question, stream=bool(body.stream)))

    async def close(self) -> None:
        """Close the connections to endpoints elsewhere."""
        await self._outside.close()

    async def _let_in(self, request: Request, question: Question) -> Question:
        """The question, with what it is let in with. Raises StatusError where guards or limits are in its way."""
        asked = {"key_id": question.key_id, "team": question.team, "user": question.user}
        texts = [prompt.text for prompt in question.prompts]
        await self._guards.require_good(texts, asked, field=question.fields["prompt_ids"])
        most = 0 if question.pooling is not None else question.sampling.max_tokens * question.num_choices
        grant = await self._limiter.admit(
            caller_of(request),
            identity(request),
            prompt_tokens=question.prompt_tokens,
            answer_tokens=most,
            behind=question.behind,
        )
        return replace(question, grant=grant)

    def _question(
        self,
        request: Request,
        served: Served,
        body: CompletionBody | ChatBody,
        sampling: Sampling,
        prompts: Sequence[Prompt],
        *,
        read: ReadPrompts,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Question:
        """The request as the engine takes it; `read` gives its prompts in the tokens of another release.

        Raises   StatusError if the context is too short for it.
        """
        chat = isinstance(body, ChatBody)
        context, wanted = served.engine.context_length, body.wanted_length
        longest = max(len(prompt.ids) for prompt in prompts)
        room, least = context - longest, min(1, sampling.max_tokens)
        if room < least or (wanted is not None and wanted > room):
            raise StatusError(
                400,
                f"Expected prompt and answer within the context of {context} tokens, found a prompt of {longest} and "
                f"{body.length_field} of {1 if wanted is None else wanted}. Shorten the prompt or lower "
                f"{body.length_field}.",
                kind="invalid_request_error",
                code="context_length_exceeded",
                field=body.length_field if room >= 1 else "messages" if chat else "prompt",
            )
        behind = request.scope.get(BEHIND)
        request.scope[RELEASE] = served.release.name
        progress: Progress | None = request.scope.get(PROGRESS)
        question = Question(
            id=("chatcmpl-" if chat else "cmpl-") + identity(request),
            created=int(time.time() if progress is None else progress.created),
            served=served,
            prompts=prompts,
            sampling=replace(sampling, max_tokens=min(sampling.max_tokens, room)),
            user=body.user,
            chat=chat,
            include_usage=body.include_usage,
            fields={"grammar": body.grammar_field, "prompt_ids": "messages" if chat else "prompt"},
            tools=tools,
            who=who(request, body.user),
            key_id=caller_of(request).key_id,
            team=caller_of(request).team,
            behind=behind is not None,
            timeout_s=self._timeout(request, body.timeout),
            adapter=served.names[body.model],
            progress=progress,
            trace=tracing.current(),
            watch=self._watch(request, served, body, sampling, read),
        )
        if progress is not None and progress.release is not None and progress.fingerprint != question.fingerprint:
            raise gone(question.model)
        return question

    def _watch(
        self, request: Request, served: Served, body: CompletionBody | ChatBody, sampling: Sampling, read: ReadPrompts
    ) -> Watch | None:
        """What the trial that is on wants to know of a request that asks for whatever is in production."""
        tried = self._releases.tried
        if tried is None or BEHIND in request.scope or body.model != served.release.factory:
            return None
        trial, _ = tried
        watch = Watch(trial=trial.number, release=served.release.number, outcomes=self._outcomes)
        if trial.kind == "shadow" and sampling.max_tokens and trial.takes(identity(request)):
            watch.copy = lambda question: self._shadows.copy(question, read)
        return watch

    def _timeout(self, request: Request, asked: float | None) -> float | None:
        """How long a request may take: what it asks for, in its body or its header, and the endpoint's at most.

        In the background it may wait for as long as others come.
        """
        if BEHIND in request.scope:
            return None
        header = request.headers.get(_TIMEOUT_HEADER)
        if asked is None and header is not None:
            try:
                asked = float(header)
            except ValueError:
                asked = -1.0
            if not 0 < asked <= MOST_SECONDS:
                raise BadRequestError(
                    f"Expected a number of seconds up to {MOST_SECONDS:g} in {_TIMEOUT_HEADER}, found {header[:40]!r}.",
                    field="timeout",
                )
        allowed = min((each for each in (asked, self._longest_s) if each is not None), default=None)
        progress: Progress | None = request.scope.get(PROGRESS)
        if allowed is None or progress is None:
            return allowed
        return max(0.0, allowed - progress.spent_s)

    async def _embed(self, request: Request) -> Response:
        """The embeddings of texts: vectors of length 1, of which the dot product is the cosine."""
        body = parse(EmbeddingBody, await self._read(request))
        asked = body.inputs
        with holding(self._releases, body.model) as served:
            request.scope[RELEASE] = served.release.name
            prompts = await asyncio.to_thread(read_prompts, served, asked, field="input")
            longest, context = max(len(prompt.ids) for prompt in prompts), served.engine.context_length
            if longest > context:
                raise StatusError(
                    400,
                    f"Expected texts within the context of {context} tokens, found one of {longest}. Shorten it.",
                    kind="invalid_request_error",
                    code="context_length_exceeded",
                    field="input",
                )
            question = Question(
                id="embd-" + secrets.token_hex(12),
                created=int(time.time()),
                served=served,
                prompts=prompts,
                sampling=Sampling(),
                user=body.user,
                chat=False,
                pooling=_POOLING,
                fields={"prompt_ids": "input"},
                behind=BEHIND in request.scope,
                who=who(request, body.user),
                key_id=caller_of(request).key_id,
                team=caller_of(request).team,
                timeout_s=self._timeout(request, body.timeout),
                adapter=served.names[body.model],
                trace=tracing.current(),
            )
            question = await self._let_in(request, question)
            found = await self._answering.embed(request, question)
            data = [
                {"object": "embedding", "index": index, "embedding": _vector(each, body.encoding_format)}
                for index, each in enumerate(found)
            ]
            used = {"prompt_tokens": question.prompt_tokens, "total_tokens": question.prompt_tokens}
            return json_response({"object": "list", "data": data, "model": question.model, "usage": used})

    # ── tokens ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _tokenize(self, request: Request) -> Response:
        """The tokens that the model reads of a prompt or of messages."""
        body = parse(TokenizeBody, await self._read(request))
        if (body.prompt is None) == (body.messages is None):
            raise BadRequestError("Expected a prompt or messages, one of the two.", field="prompt")
        with holding(self._releases, body.model) as served:
            if body.tools and (body.messages is None or not takes_tools(served.tokenizer.chat_template)):
                raise BadRequestError(
                    "Expected tools with messages, and with a model whose chat template writes them.", field="tools"
                )
            ids = await asyncio.to_thread(tokens_of, served, body, fallback=self._recipe.chat_fallback)
            names = [served.tokenizer.name_of(token) for token in ids] if body.return_token_strs else None
            return json_response(
                {
                    "count": len(ids),
                    "max_model_len": served.engine.context_length,
                    "tokens": ids,
                    "token_strs": names,
                }
            )

    async def _detokenize(self, request: Request) -> Response:
        """The text of tokens."""
        body = parse(DetokenizeBody, await self._read(request))
        with holding(self._releases, body.model) as served:
            require_known(served, body.tokens, "tokens")
            return json_response({"prompt": await asyncio.to_thread(served.tokenizer.decode, body.tokens)})

    async def _come_to(self, request: Request) -> None:
        """Wait for the release by which the client has been told a part of its answer, where this replica is behind."""
        progress: Progress | None = request.scope.get(PROGRESS)
        if progress is not None and progress.release is not None:
            await self._releases.come_to(progress.release, _LONGEST_BEHIND_S)


def _vector(embedding: Sequence[float], encoding: str | None) -> list[float] | str:
    vector = np.asarray(embedding, np.float32)
    # A length of 0 stays: there is no direction to keep.
    vector /= np.linalg.norm(vector) or np.float32(1)
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(each) for each in vector]


def _response(answer: Response | Mapping[str, Any]) -> Response:
    return answer if isinstance(answer, Response) else json_response(answer)
