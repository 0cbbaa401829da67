"""The schema of the sources: where rows come from, and which column holds what.

A source says in `kind` what lies there. Where it lies (`path`, `url`, `hub`, `bootstrap_servers`, the options by which
it is opened) bears no identity, what lies there does; `Source.recipe()` is what is hashed.

Secrets stand in environment variables: `${NAME}` in `url`, `storage_options` and `options` is replaced when a source is
opened, on the machine that opens it, and never before, so that no secret is in a configuration, a record or a log.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from aifactory.config.section import Section

Option = str | int | bool


class Columns(Section):
    """Which column (of a file, a table, a message) holds what. A row has one of four shapes:

    text                     `text`
    prompt and answer        `prompt` and `completion`, or `prompt` and `text`, which is the same
    messages                 `messages`: the turns of a conversation, of which the assistant's last is the answer
    preference pair          `chosen` and `rejected`, with `prompt` or without

    A prompt, an answer and each half of a pair is a text or a list of turns, row by row.
    """

    text: str | None = None
    """The column with the text, or with the answer where `prompt` is named too. Default: text, where no other shape is
    named."""
    prompt: str | None = None
    """The column with the prompt. Default: none."""
    completion: str | None = None
    """The column with the answer to `prompt`. Default: none."""
    messages: str | None = None
    """The column with the turns of a conversation. Default: none."""
    chosen: str | None = None
    """The column with the answer that was preferred. Default: none."""
    rejected: str | None = None
    """The column with the answer that was not. Default: none."""
    turns: Literal["openai", "sharegpt"] = "openai"
    """How a turn is written. openai: `role` and `content`; sharegpt: `from` (human, gpt) and `value`. Default:
    openai."""
    label: str | None = None
    """The column with the label; numbers and truth values become their text. Default: none."""
    user: str | None = None
    """The column that names who wrote the row. Default: none."""
    timestamp: str | None = None
    """The column with the time of the row; dates and times become ISO 8601. Default: none."""
    weight: str | None = None
    """The column with the weight of the row, a number of at least 0. Default: none, and every row weighs 1."""
    origin: str | None = None
    """The column that says where the row comes from (a URL, say), instead of the file. Default: none."""

    @model_validator(mode="after")
    def _one_shape(self) -> Columns:
        named = [name for name in ("text", "completion", "messages", "chosen") if getattr(self, name) is not None]
        if len(named) > 1:
            raise ValueError(f"expected one of text, completion, messages and chosen, found {named}; keep one")
        if (self.chosen is None) != (self.rejected is None):
            raise ValueError("expected chosen and rejected together, found one of them; name both")
        if self.messages is not None and self.prompt is not None:
            raise ValueError("expected messages without a prompt, which is among them; delete prompt")
        if self.completion is not None and self.prompt is None:
            raise ValueError("expected a prompt beside completion, found none; name it, or name text instead")
        return self

    @property
    def answer(self) -> str:
        """The column of the text or of the answer, in the shapes that have one."""
        return self.completion or self.text or "text"

    @property
    def required(self) -> tuple[str, ...]:
        """The columns without which a row is malformed."""
        if self.messages is not None:
            names: tuple[str | None, ...] = (self.messages,)
        elif self.chosen is not None:
            names = (self.chosen, self.rejected, self.prompt)
        else:
            names = (self.answer, self.prompt)
        return tuple(dict.fromkeys(name for name in names if name is not None))

    @property
    def optional(self) -> tuple[str, ...]:
        """The columns that a row may leave empty."""
        names = (self.label, self.user, self.timestamp, self.weight, self.origin)
        return tuple(dict.fromkeys(name for name in names if name is not None and name not in self.required))

    @property
    def asked(self) -> tuple[str, ...]:
        """Every column that is read."""
        return self.required + self.optional


class _Source(Section):
    """What every source has."""

    PLACE: ClassVar[frozenset[str]] = frozenset({"allow_private"})
    """Fields that bear no identity."""
    KEYED_BY_FILE: ClassVar[bool] = False
    """Whether a row is a file, so that its name makes its key; else its content does."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    """The source's name: a part of every row id, so a source that is renamed is a new source. No default."""
    allow_private: bool = False
    """Whether it may lie at an address that is loopback, link-local, private or otherwise not public. It bears no
    identity. Default: false."""

    license: str | None = Field(default=None, min_length=1, max_length=200)
    """The licence of the data, such as `cc-by-4.0`, as the cards of models name it. It bears no identity. Default: not
    stated."""

    def recipe(self) -> dict[str, Any]:
        """The source as plain JSON, without what bears no identity."""
        return self.model_dump(mode="json", exclude={*self.PLACE, "license"})


class _Files(_Source):
    """What every source has that is made of files."""

    PLACE: ClassVar[frozenset[str]] = frozenset({"allow_private", "path", "storage_options"})

    path: str = Field(min_length=1)
    """A folder, a file or a glob; a URI of them (`s3://`, `gs://`, `abfs://`, `hf://`, `hdfs://`, ...); or the
    `https://` URL of one file. `python:stdlib` is the standard library of the Python that runs. It bears no identity,
    what lies there does. No default."""
    include: tuple[str, ...] = ()
    """Glob patterns below `path` (`**` crosses folders) of the files to read. Default: what the kind implies."""
    exclude: tuple[str, ...] = ()
    """Glob patterns of files to leave out, whatever `include` says. Default: none."""
    storage_options: dict[str, Option] = Field(default_factory=dict)
    """Options of the filesystem: for `s3://` those of pyarrow's S3FileSystem (endpoint_override, region, access_key,
    ...), for others those of fsspec's. `${NAME}` is replaced by the environment. Default: none."""
    max_ratio: float = Field(default=100.0, ge=1)
    """Most bytes that one byte of a compressed file may become; beyond it (and beyond 1 MiB) the rest of the file is
    not read, and a line of the ledger says so. Default: 100."""
    max_unpacked_bytes: int = Field(default=100_000_000_000, ge=1)
    """Most bytes that a compressed file may become, and that a file is downloaded of. Default: 100 GB."""


class CodeSource(_Files):
    """Source code: each file is a row."""

    KEYED_BY_FILE: ClassVar[bool] = True

    kind: Literal["code"]
    """Source code, each file a row. No default."""


class TextSource(_Files):
    """Plain text: each file is a row."""

    KEYED_BY_FILE: ClassVar[bool] = True

    kind: Literal["text"]
    """Plain text, each file a row. No default."""


class MarkdownSource(_Files):
    """Markdown: each file is a row, without its front matter, otherwise as it is."""

    KEYED_BY_FILE: ClassVar[bool] = True

    kind: Literal["markdown"]
    """Markdown, each file a row. No default."""


class HtmlSource(_Files):
    """HTML: the main text of each file is a row."""

    KEYED_BY_FILE: ClassVar[bool] = True

    kind: Literal["html"]
    """HTML, the main text of each file a row. No default."""


class PdfSource(_Files):
    """PDF: the text of each file is a row. Needs the extra `pdf`."""

    KEYED_BY_FILE: ClassVar[bool] = True

    kind: Literal["pdf"]
    """PDF, the text of each file a row. No default."""


class JsonlSource(_Files):
    """JSON lines, also compressed (.gz, .zst, .bz2): each line is a row."""

    kind: Literal["jsonl"]
    """JSON lines, also compressed. No default."""
    columns: Columns = Columns()
    """Which key holds what. Default: text."""


class CsvSource(_Files):
    """Comma- or tab-separated values, also compressed: each record is a row."""

    kind: Literal["csv"]
    """Comma- or tab-separated values, also compressed. No default."""
    columns: Columns = Columns()
    """Which column holds what. Default: text."""
    delimiter: str | None = Field(default=None, min_length=1, max_length=1)
    """The character between two values. Default: a tab in files that end in .tsv, else a comma."""
    quote: str | None = Field(default='"', min_length=1, max_length=1)
    """The character around a value; twice, it stands for itself; none: values are never quoted. Default: \"."""
    escape: str | None = Field(default=None, min_length=1, max_length=1)
    """The character before one that is meant literally. Default: none."""
    column_names: tuple[str, ...] = ()
    """The names of the columns of files without a header. Default: the first record names them."""
    multiline: bool = True
    """Whether a quoted value may hold line ends; then a file is read as one piece, else a large one is cut at lines and
    read in parallel. Default: true."""


class ParquetSource(_Files):
    """Parquet: each record is a row."""

    kind: Literal["parquet"]
    """Parquet. No default."""
    columns: Columns = Columns()
    """Which column holds what. Default: text."""


class WarcSource(_Files):
    """Web archives, also compressed: the main text of each response with an HTML body is a row."""

    kind: Literal["warc"]
    """Web archives, also compressed. No default."""


class DatasetSource(_Files):
    """A dataset of the library `datasets`: a folder that `save_to_disk` wrote, or one of the hub."""

    PLACE: ClassVar[frozenset[str]] = _Files.PLACE | {"hub"}

    kind: Literal["dataset"]
    """A dataset of the library `datasets`. No default."""
    path: str = ""
    """A folder, or a URI of one, that `save_to_disk` wrote. It bears no identity. Default: none, `hub` is read."""
    hub: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
    """Id of a dataset on the hub. Default: none, `path` is read."""
    config: str | None = None
    """Its configuration on the hub. Default: the only one."""
    revision: str | None = None
    """Its branch, tag or commit on the hub. Default: main."""
    split: str | None = None
    """The split to read. Default: all of them."""
    columns: Columns = Columns()
    """Which column holds what. Default: text."""

    @model_validator(mode="after")
    def _one_place(self) -> DatasetSource:
        if bool(self.path) == bool(self.hub):
            raise ValueError("expected either path or hub, found both or none; name one of them")
        if self.path and (self.config or self.revision):
            raise ValueError("expected config and revision beside hub only, found them beside path; delete them")
        return self


class SqlSource(_Source):
    """A table or a query of a SQL database: each record is a row."""

    PLACE: ClassVar[frozenset[str]] = frozenset({"allow_private", "url"})

    kind: Literal["sql"]
    """A table or a query of a SQL database. No default."""
    url: str = Field(min_length=1)
    """SQLAlchemy URL; `${NAME}` is replaced by the environment when the database is opened, so that no password stands
    here. It bears no identity. No default."""
    table: str | None = None
    """The table, with its schema before a dot if need be. Default: none, `query` is read."""
    query: str | None = None
    """A SELECT. Default: none, `table` is read."""
    key: str | None = None
    """A column that orders the rows and is never NULL (a primary key): many rows are then cut into ranges of it, read in
    parallel, and a changed row disturbs its own range alone. Default: none; the rows are one piece, ordered by their
    contents, in memory."""
    columns: Columns = Columns()
    """Which column holds what. Default: text."""

    @model_validator(mode="after")
    def _one_relation(self) -> SqlSource:
        if (self.table is None) == (self.query is None):
            raise ValueError("expected either table or query, found both or none; name one of them")
        return self


class KafkaSource(_Source):
    """A topic of Kafka, from an offset to an offset: each message is a row. Needs the extra `kafka`."""

    PLACE: ClassVar[frozenset[str]] = frozenset({"allow_private", "bootstrap_servers", "options"})

    kind: Literal["kafka"]
    """A topic of Kafka. No default."""
    bootstrap_servers: str = Field(min_length=1)
    """host:port of the brokers to begin with, separated by commas. It bears no identity. No default."""
    topic: str = Field(min_length=1)
    """The topic. No default."""
    start: int | Literal["earliest"] = "earliest"
    """First offset that is read of every partition. Default: earliest."""
    end: int | Literal["latest"] = "latest"
    """Offset before which every partition's reading ends; latest: what is there when the source is listed. Default:
    latest."""
    value: Literal["json", "text"] = "json"
    """What a message is. json: an object, with the columns as its keys; text: the text itself. Default: json."""
    columns: Columns = Columns()
    """Which key holds what, where messages are json. Default: text. A row without a timestamp of its own has that of
    its message."""
    options: dict[str, Option] = Field(default_factory=dict)
    """Further options of kafka-python's KafkaConsumer (security_protocol, sasl_mechanism, ...); `${NAME}` is replaced
    by the environment. Default: none."""


class FeedbackSource(_Source):
    """What a factory answered, and what its users made of it: each answer, correction or score is a row.

    A retrain takes the feedback of its own factory by itself, batch by batch; this is for all of it at once, or for that
    of another factory.
    """

    PLACE: ClassVar[frozenset[str]] = frozenset({"allow_private", "url"})

    kind: Literal["feedback"]
    """What a factory answered, and what its users made of it. No default."""
    of: Literal["completions", "corrections", "preferences", "scores"]
    """completions: prompts and the answers that were given; corrections: prompts and the answers as they should have been;
    preferences: pairs of a correction and the answer that it corrects, and of an answer that was preferred to another;
    scores: prompts and the answers that were given a score, labelled `true` (thumbs up) or `false`. No default."""
    liked_from: float = Field(default=0.5, gt=0, le=1)
    """Of scores: the least score, of 0 to 1, of an answer that is labelled `true`. Default: 0.5."""
    factory: str | None = Field(default=None, min_length=1)
    """The factory's name. Default: this one."""
    url: str | None = Field(default=None, min_length=1)
    """SQLAlchemy URL of its state database, as `url` of the kind sql. It bears no identity. Default: the own one."""

    @model_validator(mode="after")
    def _reads_its_options(self) -> FeedbackSource:
        # By value: a configuration that was handed on to a job has every field set.
        if self.of != "scores" and self.liked_from != FeedbackSource.model_fields["liked_from"].default:
            raise ValueError(f"expected liked_from beside of: scores alone, found it beside {self.of}; delete it")
        return self

    def belonging_to(self, factory: str, url: str) -> FeedbackSource:
        """This source with the name and the database of the factory where it names none; those need no permission."""
        own = {"url": url, "allow_private": True} if self.url is None else {}
        return self.model_copy(update={"factory": self.factory or factory, **own})

    @property
    def columns(self) -> Columns:
        """The shape of its rows."""
        said = {"chosen": "text", "rejected": "answer"} if self.of == "preferences" else {"text": "text"}
        if self.of == "scores":
            said["label"] = "label"
        told = {"prompt": "prompt", "user": "user", "timestamp": "at", "origin": "completion"}
        return Columns.model_validate(said | told)

    @property
    def key(self) -> str:
        """The column that only grows."""
        return "at" if self.of == "completions" else "seq"


FileSource = (
    CodeSource
    | TextSource
    | MarkdownSource
    | HtmlSource
    | PdfSource
    | JsonlSource
    | CsvSource
    | ParquetSource
    | WarcSource
    | DatasetSource
)
"""The sources that are made of files."""

TableSource = JsonlSource | CsvSource | ParquetSource | DatasetSource | SqlSource | KafkaSource | FeedbackSource
"""The sources whose rows have columns."""

Source = Annotated[
    CodeSource
    | TextSource
    | MarkdownSource
    | HtmlSource
    | PdfSource
    | JsonlSource
    | CsvSource
    | ParquetSource
    | WarcSource
    | DatasetSource
    | SqlSource
    | KafkaSource
    | FeedbackSource,
    Field(discriminator="kind"),
]
"""Where rows come from."""
