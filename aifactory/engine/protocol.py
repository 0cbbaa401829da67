"""The engine as others see it: values in, deltas out. Imports no torch, so that a gateway can hold these types.

What a request can ask for stands in `Sampling`. For a gateway:
n          `n` answers come under one id, told apart by `Delta.index`; each ends with a reason of its own.
logprobs   come as `TokenScore`, one for each of `Delta.token_ids`: ids and nats; the tokens' texts are the tokenizer's.
deltas     that belong to one index may be joined by `Delta.then`.
pooling    asks for the text's embedding in place of an answer: one delta, with `Delta.embedding`.
adapter    is a name that the engine knows; requests with and without one share a batch.
echo       puts the prompt's text before each answer's and, with logprobs, `Delta.prompt_scores` on its first delta.
begun      goes on with answers of which a part is known already: their deltas hold what follows that part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

from aifactory.errors import BadRequestError
from aifactory.observe.tracing import Parent

FinishReason = Literal["stop", "length", "cancelled", "error"]
Pooling = Literal["mean", "last"]

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1_024
MAX_STOP_TOKENS = 64
MAX_LOGIT_BIASES = 1_024
MAX_LOGPROBS = 20
MAX_ANSWERS = 128
MAX_GRAMMAR_CHARACTERS = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """What an answer must be, as a whole."""

    kind: Literal["json_schema", "regex"]
    text: str
    """The schema as JSON; or the expression, in the syntax of Rust's `regex` without anchors."""

    def __post_init__(self) -> None:
        """Raises BadRequestError."""
        if self.kind not in ("json_schema", "regex"):
            raise BadRequestError(f"Expected a grammar of json_schema or regex, found {self.kind!r}.", field="grammar")
        if not isinstance(self.text, str) or not 1 <= len(self.text) <= MAX_GRAMMAR_CHARACTERS:
            raise BadRequestError(
                f"Expected a grammar of 1 to {MAX_GRAMMAR_CHARACTERS} characters, found "
                f"{len(self.text) if isinstance(self.text, str) else repr(self.text)}.",
                field="grammar",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the tokens of an answer are chosen.

    Order   repetition, frequency and presence penalties, logit_bias, grammar; then temperature, top_k, top_p and min_p,
            each of what the one before has left; then the draw. Greedy takes the largest logit after grammar.
    """

    max_tokens: int = 16
    """Longest answer, tokens; the token that ends it counts. 0 only with echo: the prompt is scored, nothing is added."""
    temperature: float = 1.0
    """0 is greedy: the most probable token always."""
    top_p: float = 1.0
    """Draw from the smallest set of most probable tokens that holds this share of the probability, in (0, 1]."""
    top_k: int = 0
    """Draw from this many most probable tokens; 0 is no limit. Applied before top_p."""
    min_p: float = 0.0
    """Draw from tokens at least so probable as this share of the most probable one, in [0, 1] (arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Logits of tokens of prompt and answer are divided by it if positive, else multiplied (arXiv:1909.05858)."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each time it is in the answer, in [-2, 2] (OpenAI's definition)."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that is in the answer, in [-2, 2]."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens, each in [-100, 100]."""
    seed: int | None = None
    """The i-th draw depends on the seed, the index of the answer and on i only. None: one is taken at random."""
    stop: tuple[str, ...] = ()
    """Strings at which the answer ends; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens at which the answer ends, beside the model's own; they have no text in it."""
    grammar: Grammar | None = None
    """What the answer must match. It ends where nothing may follow; cut off by max_tokens, it is a beginning of a match."""
    n: int = 1
    """Answers to the one prompt."""
    logprobs: int | None = None
    """None: no scores. Else each token comes with its log-probability and so many most probable alternatives: the
    model's own, nats, before anything above changes them."""
    echo: bool = False
    """Whether the prompt comes before the answer: its text and, with logprobs, its scores."""

    def __post_init__(self) -> None:
        """Raises BadRequestError naming the field."""
        _require_bool(self.echo, "echo")
        _require_int(self.max_tokens, "max_tokens", low=0 if self.echo else 1)
        _require_number(self.temperature, "temperature", low=0.0, high=100.0)
        _require_number(self.top_p, "top_p", low=0.0, high=1.0)
        if self.top_p == 0.0:
            raise BadRequestError(
                "Expected top_p above 0, found 0. For greedy answers set temperature to 0.", field="top_p"
            )
        _require_int(self.top_k, "top_k", low=0)
        if self.seed is not None:
            _require_int(self.seed, "seed", low=-(2**63), high=2**64 - 1)
        _require_number(self.min_p, "min_p", low=0.0, high=1.0)
        _require_number(self.repetition_penalty, "repetition_penalty", low=0.01, high=100.0)
        _require_number(self.frequency_penalty, "frequency_penalty", low=-2.0, high=2.0)
        _require_number(self.presence_penalty, "presence_penalty", low=-2.0, high=2.0)
        _require_int(self.n, "n", low=1, high=MAX_ANSWERS)
        if self.logprobs is not None:
            _require_int(self.logprobs, "logprobs", low=0, high=MAX_LOGPROBS)
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise BadRequestError(f"Expected a Grammar in grammar, found {self.grammar!r}.", field="grammar")
        self._check_bias()
        self._check_stop()

    def _check_bias(self) -> None:
        if not isinstance(self.logit_bias, Mapping) or len(self.logit_bias) > MAX_LOGIT_BIASES:
            raise BadRequestError(
                f"Expected a mapping of at most {MAX_LOGIT_BIASES} token ids to numbers in logit_bias, found "
                f"{f'{len(self.logit_bias)} of them' if isinstance(self.logit_bias, Mapping) else self.logit_bias!r}.",
                field="logit_bias",
            )
        for token_id, bias in self.logit_bias.items():
            _require_int(token_id, "logit_bias", low=0)
            _require_number(bias, f"logit_bias[{token_id}]", low=-100.0, high=100.0)

    def _check_stop(self) -> None:
        if not isinstance(self.stop_token_ids, tuple) or len(self.stop_token_ids) > MAX_STOP_TOKENS:
            raise BadRequestError(
                f"Expected a tuple of at most {MAX_STOP_TOKENS} token ids in stop_token_ids.", field="stop_token_ids"
            )
        for index, token_id in enumerate(self.stop_token_ids):
            _require_int(token_id, f"stop_token_ids[{index}]", low=0)
        if not isinstance(self.stop, tuple) or not all(isinstance(string, str) for string in self.stop):
            raise BadRequestError(f"Expected a tuple of strings in stop, found {self.stop!r}.", field="stop")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise BadRequestError(
                f"Expected at most {MAX_STOP_STRINGS} stop strings, found {len(self.stop)}.", field="stop"
            )
        for index, string in enumerate(self.stop):
            if not 1 <= len(string) <= MAX_STOP_CHARACTERS:
                raise BadRequestError(
                    f"Expected 1 to {MAX_STOP_CHARACTERS} characters in stop[{index}], found {len(string)}.",
                    field=f"stop[{index}]",
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A prompt, as token ids with its bos, and how to go on from it."""

    id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    adapter: str | None = None
    """The name of the adapter that answers; None: the model as it is."""
    pooling: Pooling | None = None
    """Not None: no answer is wanted but the text's embedding, the model's last hidden states (after its last norm), of
    all tokens in the mean or of the last one. `sampling` plays no part then."""
    begun: tuple[tuple[int, ...], ...] = ()
    """By index, the tokens that each answer has already; none for those that are missing. They count as if they had been
    drawn here, by the same seed: for penalties, stop strings, grammar and max_tokens, and the next draw is the one after
    theirs. With echo, an answer that has begun has no prompt before it any more."""
    trace: Parent = field(default=None, compare=False, repr=False)
    """The span that its steps belong to; None where it is not traced."""

    def __post_init__(self) -> None:
        """Raises BadRequestError."""
        if self.pooling not in (None, "mean", "last"):
            raise BadRequestError(f"Expected a pooling of mean or last, found {self.pooling!r}.", field="pooling")
        if len(self.begun) > self.num_answers or (self.begun and self.pooling is not None):
            raise BadRequestError(
                f"Expected begun for at most {self.num_answers} answers without pooling, found {len(self.begun)}.",
                field="begun",
            )
        longest = max(map(len, self.begun), default=0)
        if longest > self.sampling.max_tokens:
            raise BadRequestError(
                f"Expected begun within max_tokens of {self.sampling.max_tokens}, found {longest} tokens.",
                field="begun",
            )

    @property
    def num_tokens(self) -> int:
        """The most tokens that one of its answers comes to, with the prompt."""
        return len(self.prompt_ids) + (self.sampling.max_tokens if self.pooling is None else 0)

    @property
    def num_answers(self) -> int:
        """How many come under its id."""
        return self.sampling.n if self.pooling is None else 1

    def begun_of(self, index: int) -> tuple[int, ...]:
        """The tokens that an answer has already."""
        return self.begun[index] if index < len(self.begun) else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheUse:
    """What the memory for keys and values holds."""

    num_reserved: int
    """Tokens that the requests in slots may come to, with their prompts."""
    num_used: int
    """Tokens in slots now."""
    max_tokens: int
    """The bound on num_reserved."""
    num_kept: int
    """Tokens of former requests that are kept for those that begin alike."""
    max_kept: int
    """The bound on num_kept."""
    num_reused: int
    """Prompt tokens that did not have to be read, since the start."""
    bytes_per_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScore:
    """How probable the model, by itself, finds a token at its place."""

    token_id: int
    logprob: float | None
    """Nats. None for the first token of a prompt, before which there is nothing."""
    top: tuple[tuple[int, float], ...] = ()
    """The most probable tokens of the place with theirs, falling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What was added to an answer since the delta before. The texts of all of them add up to the answer."""

    text: str
    """Whole characters, and no part of a stop string. With echo, the first of an answer begins with the prompt's."""
    token_ids: tuple[int, ...]
    """Every token sampled since, also those without text: the end token, a stop string's, a half character's."""
    finish_reason: FinishReason | None = None
    """None while the answer goes on; the one delta with a reason is the last of its index."""
    error: str | None = None
    """What went wrong, with finish_reason "error" only."""
    fault: str | None = None
    """With an error that the request has brought upon itself: its field ("grammar")."""
    index: int = 0
    """Which of the request's n answers."""
    scores: tuple[TokenScore, ...] = ()
    """With logprobs: one for each of token_ids."""
    prompt_scores: tuple[TokenScore, ...] = ()
    """With echo and logprobs, on the first delta of an answer: one for each of the prompt's tokens."""
    embedding: tuple[float, ...] = ()
    """With pooling, on the only delta, whose reason is "stop": one number for each hidden unit, fp32, not normalised."""

    def then(self, following: Delta) -> Delta:
        """This and the next one of the same answer as one, for a reader who is behind."""
        return replace(
            following,
            text=self.text + following.text,
            token_ids=self.token_ids + following.token_ids,
            scores=self.scores + following.scores,
            prompt_scores=self.prompt_scores + following.prompt_scores,
        )


OnDelta = Callable[[Delta], None]
"""Called in the engine's thread: it must return at once. If it raises, its request is dropped and nothing else."""


class Engine(Protocol):
    """Many requests at once on one model. Every method may be called from any thread."""

    @property
    def context_length(self) -> int:
        """Most tokens of a prompt and its answer together."""
        ...

    @property
    def num_unfinished(self) -> int:
        """Requests that were accepted and whose last delta is still to come."""
        ...

    @property
    def failure(self) -> str | None:
        """Why it will never answer again though nobody has closed it; None while it answers. Another must take its place."""
        ...

    def submit(self, request: GenerationRequest, on_delta: OnDelta) -> None:
        """Accept a request and return; its deltas follow.

        Raises  BadRequestError if it can never be served (prompt_ids, max_tokens, n, grammar, adapter, a token id, id
                in use, begun),
                CapacityError if the queue is full, the engine is closing or has failed.
        """
        ...

    def add_adapter(self, name: str, folder: Path) -> None:
        """Load an adapter in peft's form beside the others; requests may choose it when this returns.

        Raises  UnsafeModelError, ConfigError if it does not fit the model or the name is in use, CapacityError if the
                engine is closing.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """End each answer of a request soon with a "cancelled" delta; nothing happens if it is unknown or has ended."""
        ...

    def close(self, drain_timeout_s: float) -> None:
        """Accept no more, wait for what is in flight at most so long, cancel the rest, free the memory."""
        ...


def _require_bool(value: object, name: str) -> None:
    if not isinstance(value, bool):
        raise BadRequestError(f"Expected true or false in {name}, found {value!r}.", field=name)


def _require_int(value: object, name: str, *, low: int, high: int | None = None) -> None:
    limits = f"of at least {low}" if high is None else f"from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise BadRequestError(f"Expected an integer {limits} in {name}, found {value!r}.", field=name)


def _require_number(value: object, name: str, *, low: float, high: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high:  # type: ignore[operator]
        raise BadRequestError(f"Expected a number from {low:g} to {high:g} in {name}, found {value!r}.", field=name)
