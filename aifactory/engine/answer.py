"""Answer: the tokens of one request -> deltas, ended by an end token, a stop string or the length. Knows no torch.

Laws     no delta ever holds a part of a stop string, nor half a character; their texts add up to the text before
         the first stop string;
         an answer that goes on from its first k tokens adds what the whole one adds after them.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING

from aifactory.engine.protocol import Delta, FinishReason, GenerationRequest, OnDelta, TokenScore
from aifactory.errors import BadRequestError
from aifactory.text.tokenizer import IncrementalDecoder, TextTokenizer

if TYPE_CHECKING:
    from aifactory.engine.grammar import Matcher

_log = logging.getLogger(__name__)


class StopFilter:
    """Holds back the end of a text as long as a stop string may begin there."""

    def __init__(self, stop: Collection[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found = False
        """Whether a stop string has come; nothing is passed on after it."""

    def feed(self, text: str) -> str:
        """What of the text so far is certainly before any stop string."""
        if self.found:
            return ""
        if not self._stop:
            return text
        self._held += text
        begins = [begin for string in self._stop if (begin := self._held.find(string)) >= 0]
        if begins:
            self.found = True
            return self._release(min(begins))
        return self._release(len(self._held) - self._num_pending())

    def flush(self) -> str:
        """What was held back and, the text being at its end, is no stop string."""
        return "" if self.found else self._release(len(self._held))

    def _num_pending(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(len(self._held), max(map(len, self._stop)) - 1)
        for length in range(longest, 0, -1):
            end = self._held[-length:]
            if any(string.startswith(end) for string in self._stop):
                return length
        return 0

    def _release(self, length: int) -> str:
        released, self._held = self._held[:length], self._held[length:]
        return released


class Answer:
    """One of a request's answers on its way: from acceptance to the delta with a finish reason."""

    def __init__(
        self,
        request: GenerationRequest,
        on_delta: OnDelta,
        tokenizer: TextTokenizer,
        eos_ids: Collection[int],
        *,
        index: int = 0,
        matcher: Matcher | None = None,
    ) -> None:
        """Raises BadRequestError if it can't have begun as the request says."""
        self.request = request
        self.index = index
        self.matcher = matcher
        """Where it stands in its grammar, if it has one."""
        self.token_ids: list[int] = []
        """Tokens so far, those with which it began first."""
        self.cancelled = False
        """Set from any thread; the engine's thread ends the answer when it next looks."""
        self.finished = False
        self._on_delta = on_delta
        self._end_ids = {*eos_ids, *request.sampling.stop_token_ids}
        self._decoder = IncrementalDecoder(tokenizer, continues=not request.sampling.echo)
        self._stop = StopFilter(request.sampling.stop)
        self._pending_ids: list[int] = []
        self._pending_scores: list[TokenScore] = []
        self._prompt_scores: tuple[TokenScore, ...] = ()
        self.begun = request.begun_of(index)
        """Tokens that it had before it came here."""
        self.read_ids = request.prompt_ids + self.begun
        """What the model reads before the first token that is drawn here."""
        self.ended_before: FinishReason | None = None
        """Why it had ended when it came here; None: it goes on."""
        self._take_up()

    def _take_up(self) -> None:
        for place, token_id in enumerate(self.begun, start=1):
            delta = self.push(token_id)
            if delta is not None and delta.finish_reason is not None:
                if delta.error is not None or place < len(self.begun):
                    why = f": {delta.error}" if delta.error else ""
                    raise BadRequestError(
                        f"Expected in begun the beginning of an answer to this request, found that it ends at token {place} "
                        f"of {len(self.begun)}{why}.",
                        field="begun",
                    )
                self.ended_before = delta.finish_reason
        # They were told of before.
        self._pending_ids.clear()
        self.finished = False

    def push(self, token_id: int, score: TokenScore | None = None) -> Delta | None:
        """Take the next token; returns what it adds, None while that is held back."""
        echoed = self._echo()
        self.token_ids.append(token_id)
        self._pending_ids.append(token_id)
        if score is not None:
            self._pending_scores.append(score)
        ended = is_end = token_id in self._end_ids
        if self.matcher is not None and not is_end:
            error = self.matcher.take(token_id)
            if error is not None:
                return self._delta(self._rest(), "error", error, fault="grammar")
            ended = self.matcher.is_complete
        text = echoed + ("" if is_end else self._stop.feed(self._decoder.feed(token_id)))
        if self._stop.found:
            return self._delta(text, "stop")
        if ended or len(self.token_ids) == self.request.sampling.max_tokens:
            text += self._rest()
            return self._delta(text, "stop" if ended or self._stop.found else "length")
        return self._delta(text) if text else None

    def embed(self, embedding: tuple[float, ...]) -> Delta:
        """The only delta of a request with pooling."""
        return replace(self._delta("", "stop"), embedding=embedding)

    @property
    def reads_whole_prompt(self) -> bool:
        """Whether something is wanted of each token of the prompt, so that none of them may be skipped."""
        return self.scores_prompt or self.request.pooling is not None

    @property
    def scores_prompt(self) -> bool:
        """Whether the log-probabilities of the prompt's tokens are wanted."""
        sampling = self.request.sampling
        return self.request.pooling is None and sampling.echo and sampling.logprobs is not None and not self.begun

    def take_prompt_scores(self, scores: tuple[TokenScore, ...]) -> None:
        """Keep what the prompt's tokens scored for the first delta."""
        self._prompt_scores = scores

    def end(self, reason: FinishReason, error: str | None = None, *, fault: str | None = None) -> Delta:
        """The last delta of an answer that ends from outside: cancelled, failed, or nothing but its prompt."""
        return self._delta((self._echo() if reason == "length" else "") + self._rest(), reason, error, fault=fault)

    def deliver(self, delta: Delta) -> None:
        """Hand a delta over. A callback that raises is called no more, and its request is cancelled."""
        try:
            self._on_delta(delta)
        except Exception:
            _log.exception("delivery failed request=%s", self.request.id)
            self._on_delta = _ignore
            self.cancelled = True

    def _echo(self) -> str:
        """The prompt's text before the first token; a character that it only begins is ended by the answer."""
        if not self.request.sampling.echo or self.token_ids:
            return ""
        return "".join([self._decoder.feed(token_id) for token_id in self.request.prompt_ids])

    def _rest(self) -> str:
        text = self._stop.feed(self._decoder.flush())
        return text + self._stop.flush()

    def _delta(
        self, text: str, reason: FinishReason | None = None, error: str | None = None, *, fault: str | None = None
    ) -> Delta:
        token_ids, self._pending_ids = tuple(self._pending_ids), []
        scores, self._pending_scores = tuple(self._pending_scores), []
        prompt_scores, self._prompt_scores = self._prompt_scores, ()
        self.finished = reason is not None
        return Delta(
            text=text,
            token_ids=token_ids,
            finish_reason=reason,
            error=error,
            fault=fault,
            index=self.index,
            scores=scores,
            prompt_scores=prompt_scores,
        )


def _ignore(delta: Delta) -> None:
    del delta
