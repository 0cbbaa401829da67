"""Bodies: what a request carries, under OpenAI's names and, for what OpenAI does not have, vLLM's.

Source   OpenAI API reference, "Completions" and "Chat" (2026-11); vLLM, "OpenAI-Compatible Server", extra parameters.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from aifactory.engine.protocol import MAX_ANSWERS, MAX_LOGPROBS, Grammar, Sampling
from aifactory.errors import BadRequestError
from aifactory.serve.wire import ClosedBody

MAX_TOOLS = 128
"""Most tools of a request (OpenAI's limit)."""
MOST_SECONDS = 86_400.0
"""Longest timeout that a request may name."""
_LONGEST_ID = 10
"""Digits of a token id in logit_bias."""


def _refuse_nul(value: Any) -> Any:
    """PostgreSQL neither keeps nor looks for a text with NUL."""
    if isinstance(value, str) and "\0" in value:
        raise ValueError("Input should be a string without NUL")
    return value


class StreamOptions(ClosedBody):
    """What a stream carries beside the text."""

    include_usage: bool = False
    """Whether it ends with what was read and written."""


class JsonSchema(ClosedBody):
    """The schema of `response_format`."""

    name: str = Field(max_length=64)
    """What it describes."""
    description: str | None = None
    """What it is for."""
    schema_: dict[str, Any] = Field(alias="schema")
    """The JSON schema that the answer must match."""
    strict: bool | None = None
    """Answers match the schema in any case."""


class ResponseFormat(ClosedBody):
    """What an answer must be: text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    """Which of them."""
    json_schema: JsonSchema | None = None
    """The schema, of json_schema alone."""


class StructuredOutputs(ClosedBody):
    """What an answer must match, in vLLM's form: one of the two."""

    schema_: dict[str, Any] | None = Field(default=None, alias="json")
    """A JSON schema."""
    regex: str | None = None
    """A regular expression (the syntax of Rust's `regex`, without anchors) of the whole answer."""


class GenerationBody(ClosedBody):
    """What the two kinds of completion share."""

    SAMPLING: ClassVar[tuple[str, ...]] = (
        "temperature",
        "top_p",
        "min_p",
        "repetition_penalty",
        "frequency_penalty",
        "presence_penalty",
        "seed",
        "n",
    )
    """Fields that the engine knows by the same name; what is null has the engine's default."""

    model: str
    """The factory's name, that of its release in production, or that of an adapter beside it."""
    max_tokens: int | None = None
    """Longest answer, tokens."""
    temperature: float | None = None
    """0 is greedy. Default: 1."""
    top_p: float | None = None
    """Share of the probability that is drawn from. Default: 1."""
    top_k: int | None = None
    """How many tokens are drawn from; 0 and -1 are no limit, the default. (vLLM)"""
    min_p: float | None = None
    """Least probability of what is drawn, as a share of the most probable token's. Default: 0. (vLLM)"""
    repetition_penalty: float | None = None
    """What logits of tokens that were there are divided by. Default: 1. (vLLM)"""
    frequency_penalty: float | None = None
    """Subtracted from a logit for each time that its token is in the answer. Default: 0."""
    presence_penalty: float | None = None
    """Subtracted from the logits of tokens that are in the answer. Default: 0."""
    logit_bias: dict[str, float] | None = None
    """Added to the logits of these token ids. Default: none."""
    seed: int | None = None
    """The same seed gives the same answer. Default: one at random."""
    stop: str | list[str] | None = None
    """Where the answer ends, which is not part of it. Default: nowhere."""
    stop_token_ids: list[int] | None = None
    """Tokens at which it ends, beside the model's own. Default: none. (vLLM)"""
    response_format: ResponseFormat | None = None
    """What the answer must be. Default: text."""
    structured_outputs: StructuredOutputs | None = None
    """What the answer must match, a regular expression among it. Default: anything. (vLLM)"""
    n: int | None = None
    """Answers to each prompt. Default: 1."""
    stream: bool | None = None
    """Whether the answer is sent as it comes. Default: false."""
    stream_options: StreamOptions | None = None
    """What a stream carries beside the text."""
    user: str | None = Field(default=None, max_length=256)
    """Who asks; kept with the answer. The users of a key are served in turn."""
    timeout: float | None = Field(default=None, gt=0, le=MOST_SECONDS)
    """Longest time to the last token, seconds; then the work ends, with 504. As the header X-Request-Timeout. Default:
    the endpoint's `request_timeout_s`, which is also the longest."""

    # It is kept with the answer: refused before there is one.
    _without_nul = field_validator("user")(_refuse_nul)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with what was read and written."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def length_field(self) -> str:
        """The field that says how long the answer may be."""
        return "max_tokens"

    @property
    def wanted_length(self) -> int | None:
        """What that field says."""
        return self.max_tokens

    @property
    def grammar_field(self) -> str:
        """The field that says what the answer must match."""
        return "response_format" if self.response_format is not None else "structured_outputs"

    @property
    def grammar(self) -> Grammar | None:
        """What the answer must match. Raises BadRequestError naming the field."""
        asked, other = self.response_format, self.structured_outputs
        if asked is not None and other is not None:
            raise BadRequestError(
                "Expected one of response_format and structured_outputs, found both; leave one out.",
                field="structured_outputs",
            )
        if asked is not None:
            if (asked.type == "json_schema") != (asked.json_schema is not None):
                raise BadRequestError(
                    "Expected response_format.json_schema with the type json_schema, and with it alone.",
                    field="response_format.json_schema",
                )
            if asked.json_schema is not None:
                return _grammar("json_schema", json.dumps(asked.json_schema.schema_), "response_format")
            return _grammar("json_schema", '{"type": "object"}', "response_format")
        if other is not None:
            if (other.schema_ is None) == (other.regex is None):
                raise BadRequestError(
                    "Expected one of json and regex in structured_outputs.", field="structured_outputs"
                )
            if other.regex is not None:
                return _grammar("regex", other.regex, "structured_outputs.regex")
            return _grammar("json_schema", json.dumps(other.schema_), "structured_outputs.json")
        return None

    @property
    def echoes(self) -> bool:
        """Whether the prompt comes before the answer."""
        return False

    @property
    def num_logprobs(self) -> int | None:
        """The engine's `logprobs`. Raises BadRequestError naming the field."""
        return None

    def sampling(self, *, default: int, limit: int) -> Sampling:
        """The engine's form.

        default   longest answer where the request names none, tokens
        limit     longest answer that a request may name
        Raises    BadRequestError naming the field.
        """
        if self.stream_options is not None and not self.stream:
            raise BadRequestError("Expected stream_options with stream only.", field="stream_options")
        wanted, least = self.wanted_length, 0 if self.echoes else 1
        if wanted is not None and not least <= wanted <= limit:
            raise BadRequestError(
                f"Expected {self.length_field} from {least} to {limit}, found {wanted}.", field=self.length_field
            )
        given = {name: value for name in self.SAMPLING if (value := getattr(self, name)) is not None}
        return Sampling(
            max_tokens=max(1, min(default, limit)) if wanted is None else wanted,
            top_k=0 if self.top_k in (None, -1) else self.top_k,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias={_token_id(token): bias for token, bias in (self.logit_bias or {}).items()},
            grammar=self.grammar,
            logprobs=self.num_logprobs,
            echo=self.echoes,
            **given,
        )


def _prompt_kind(prompt: object) -> str:
    """Which of the forms of a prompt was meant, by its first element."""
    if not isinstance(prompt, list):
        return "str"
    first = prompt[0] if prompt else 0
    return "list[str]" if isinstance(first, str) else "list[list[int]]" if isinstance(first, list) else "list[int]"


Texts = Annotated[
    Annotated[str, Tag("str")]
    | Annotated[list[int], Tag("list[int]")]
    | Annotated[list[str], Tag("list[str]")]
    | Annotated[list[list[int]], Tag("list[list[int]]")],
    Discriminator(_prompt_kind),
]


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Texts
    """A text, or its token ids with their bos; or several of them."""
    best_of: int | None = None
    """What `n` is: answers are not ranked here, so no more can be made than are given."""
    echo: bool | None = None
    """Whether the prompt comes before the answer: its text and, with logprobs, its tokens' scores. Default: false."""
    logprobs: int | None = None
    """How many most probable alternatives come with each token; 0: the token's own log-probability alone. Default: no
    scores."""

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, of which there is at least one. Raises BadRequestError if they, or their answers, are too many."""
        prompts, most = _listed(self.prompt), MAX_ANSWERS // (self.n or 1)
        if most == 0:
            raise BadRequestError(f"Expected n of at most {MAX_ANSWERS}, found {self.n}.", field="n")
        if len(prompts) > most:
            raise BadRequestError(
                f"Expected at most {most} prompts with n of {self.n or 1} in a request, found {len(prompts)}.",
                field="prompt",
            )
        return prompts

    @property
    def echoes(self) -> bool:
        return bool(self.echo)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    def sampling(self, *, default: int, limit: int) -> Sampling:
        if self.best_of not in (None, self.n or 1):
            raise BadRequestError(
                f"Expected best_of of {self.n or 1}, as n: answers are not ranked, found {self.best_of}; leave it out.",
                field="best_of",
            )
        return super().sampling(default=default, limit=limit)


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    """The conversation; the answer is its next message."""
    max_completion_tokens: int | None = None
    """Longest answer, tokens: the newer of OpenAI's two names."""
    logprobs: bool | None = None
    """Whether each token comes with its log-probability. Default: false."""
    top_logprobs: int | None = None
    """How many most probable alternatives come with each token, where logprobs is true. Default: 0."""
    tools: list[dict[str, Any]] | None = Field(default=None, max_length=MAX_TOOLS)
    """Functions that the model may call, where its tokenizer says how calls are written and read. Default: none."""
    tool_choice: Any = None
    """auto: the model decides, the default with tools; none: no tools are shown to it."""
    parallel_tool_calls: bool | None = None
    """Whether the model may call several at once; false is not supported. Default: true."""

    @field_validator("tool_choice")
    @classmethod
    def _known_choice(cls, choice: Any) -> Any:
        if choice not in (None, "none", "auto"):
            raise ValueError("Input should be 'none' or 'auto': a call can't be forced")
        return choice

    @field_validator("parallel_tool_calls")
    @classmethod
    def _known_calls(cls, parallel: bool | None) -> bool | None:
        if parallel is False:
            raise ValueError("Input should be true: the number of calls can't be limited")
        return parallel

    @property
    def length_field(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def wanted_length(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def shown_tools(self) -> list[dict[str, Any]]:
        """The tools that the model is shown. Raises BadRequestError for a choice without tools."""
        if not self.tools and self.tool_choice == "auto":
            raise BadRequestError("Expected tool_choice with tools only.", field="tool_choice")
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def num_logprobs(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise BadRequestError("Expected top_logprobs with logprobs only.", field="top_logprobs")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_LOGPROBS:
            raise BadRequestError(
                f"Expected top_logprobs from 0 to {MAX_LOGPROBS}, found {self.top_logprobs}.", field="top_logprobs"
            )
        return (self.top_logprobs or 0) if self.logprobs else None


class EmbeddingBody(ClosedBody):
    """POST /v1/embeddings."""

    model: str
    """The factory's name, that of its release in production, or that of an adapter beside it."""
    input: Texts
    """A text, or its token ids with their bos; or several of them."""
    encoding_format: Literal["float", "base64"] | None = None
    """float: a list of numbers; base64: their bytes, fp32 in little-endian order. Default: float."""
    user: str | None = Field(default=None, max_length=256)
    """Who asks."""
    timeout: float | None = Field(default=None, gt=0, le=MOST_SECONDS)
    """As that of a completion."""

    @property
    def inputs(self) -> list[str | list[int]]:
        """The texts, of which there is at least one. Raises BadRequestError if they are too many."""
        inputs = _listed(self.input)
        if len(inputs) > MAX_ANSWERS:
            raise BadRequestError(f"Expected at most {MAX_ANSWERS} texts, found {len(inputs)}.", field="input")
        return inputs


class TokenizeBody(ClosedBody):
    """POST /tokenize: a prompt or messages as the model reads them. (vLLM)"""

    model: str | None = None
    """The factory's name, or that of its release in production. Default: that release."""
    prompt: str | None = None
    """A plain prompt."""
    messages: list[dict[str, Any]] | None = Field(default=None, min_length=1)
    """A conversation, in place of it."""
    tools: list[dict[str, Any]] | None = Field(default=None, max_length=MAX_TOOLS)
    """Functions that the model is shown with the messages."""
    add_special_tokens: bool = True
    """Whether the bos comes first, as it does in every request. Default: true."""
    add_generation_prompt: bool = True
    """Whether the messages end with the beginning of the answer, as in a request. Default: true."""
    return_token_strs: bool = False
    """Whether the tokens come in print too. Default: false."""


class DetokenizeBody(ClosedBody):
    """POST /detokenize: the text of tokens. (vLLM)"""

    model: str | None = None
    """The factory's name, or that of its release in production. Default: that release."""
    tokens: list[int]
    """Token ids; control tokens have no text."""


class BatchBody(ClosedBody):
    """POST /v1/batches: the answers to a file of requests."""

    input_file_id: str = Field(max_length=64)
    """The uploaded file: on each line an object of custom_id, method, url and body."""
    endpoint: Literal["/v1/completions", "/v1/chat/completions", "/v1/embeddings"]
    """Where all of its requests go."""
    completion_window: Literal["24h"]
    """How long it may take."""
    metadata: dict[str, str] | None = Field(default=None, max_length=16)
    """What the client wants to remember of it."""

    _without_nul = field_validator("input_file_id")(_refuse_nul)


class FilesQuery(ClosedBody):
    """GET /v1/files: which of them."""

    limit: int = Field(default=10_000, ge=1, le=10_000)
    """At most so many."""
    after: str | None = Field(default=None, max_length=64)
    """Those after the file of this id, in their order."""
    order: Literal["asc", "desc"] = "desc"
    """By when they came: the newest first (desc) or last."""
    purpose: str | None = Field(default=None, max_length=64)
    """Those of this purpose alone."""


class BatchesQuery(ClosedBody):
    """GET /v1/batches: which of them, newest first."""

    limit: int = Field(default=20, ge=1, le=100)
    """At most so many."""
    after: str | None = Field(default=None, max_length=64)
    """Those after the batch of this id."""


class FeedbackBody(ClosedBody):
    """POST /v1/feedback: what somebody says of an answer."""

    completion: str | None = Field(default=None, max_length=64)
    """The id of the answer; not needed where `preferred` is one."""
    index: int | None = Field(default=None, ge=0, lt=MAX_ANSWERS)
    """Which of several answers that came under this id."""
    preferred: str | int | None = Field(default=None)
    """The id of the better of two answers to one prompt; or of the answers under `completion`, the index of the best."""
    rejected: str | int | None = Field(default=None)
    """The id or the index of the other. Default, with an index: all others to the same prompt."""
    score: float | None = Field(default=None, ge=0, le=1)
    """0 is worst, 1 is best."""
    correction: str | None = Field(default=None, min_length=1)
    """The answer as it should have been."""
    comment: str | None = None
    """Anything else."""
    user: str | None = Field(default=None, max_length=256)
    """Who says it."""
    idempotency_key: str | None = Field(default=None, min_length=1, max_length=128)
    """The same key is counted once. Without one, the same feedback on the same answer is."""

    _without_nul = field_validator("completion", "preferred", "rejected")(_refuse_nul)

    @property
    def subject(self) -> str:
        """The id of the answer that it is about, a choice by index apart. Raises BadRequestError naming the field."""
        if isinstance(self.preferred, str):
            if self.completion is not None or self.index is not None:
                raise BadRequestError(
                    "Expected preferred as an index beside completion, found an id.", field="preferred"
                )
            if not isinstance(self.rejected, str):
                raise BadRequestError("Expected in rejected the id of the other answer.", field="rejected")
            return self.preferred
        if self.rejected is not None and self.preferred is None:
            raise BadRequestError("Expected preferred beside rejected, found none.", field="preferred")
        if self.completion is None:
            raise BadRequestError("Expected completion in the body, found none.", field="completion")
        if self.preferred is not None and self.index is not None:
            raise BadRequestError("Expected index or preferred, one of the two.", field="index")
        return self.completion if self.index is None else f"{self.completion}-{self.index}"


def _listed(prompt: Any) -> list[str | list[int]]:
    """One prompt, or several, as a list of them."""
    several = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str | list)
    return prompt if several else [prompt]


def _grammar(kind: Literal["json_schema", "regex"], text: str, field: str) -> Grammar:
    try:
        return Grammar(kind=kind, text=text)
    except BadRequestError as error:
        raise BadRequestError(str(error).replace("grammar", field), field=field) from error


def _token_id(token: str) -> int:
    if len(token) > _LONGEST_ID or not (token.isascii() and token.isdecimal()) or (token != "0" and token[0] == "0"):
        shown = token if len(token) <= 40 else token[:37] + "..."
        raise BadRequestError(f"Expected token ids in logit_bias, found {shown!r}.", field="logit_bias")
    return int(token)
