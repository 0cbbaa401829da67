"""The schema of the YAML: what makes a model (the recipe), and how and where it runs (the runtime).

Every section but `runtime` bears identity: what it says is hashed into the fingerprints of what it makes. `runtime`
never does: other workers, another micro-batch or another storage root give the same fingerprints.

A configuration is read once, is checked as a whole and is never changed; `Config.from_yaml(path, overrides)` raises
`ConfigError` with the file and the line, and names the nearest key that is valid.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from aifactory.errors import ConfigError


class Section(BaseModel):
    """A part of the configuration: frozen, and closed to keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


# ── ingest ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Columns(Section):
    """Which column of a JSONL or Parquet file holds what."""

    text: str = "text"
    """The column with the text, or with the answer where `prompt` is named too. Default: text."""
    prompt: str | None = None
    """The column with the prompt; without it every row is plain text. Default: none."""


class Source(Section):
    """Where rows come from."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    """The source's name: a part of every row id, so a source that is renamed is a new source. No default."""
    kind: Literal["code", "text", "jsonl", "parquet"]
    """code, text: each file is a row; jsonl (also .gz), parquet: each line or record is one. No default."""
    path: str = Field(min_length=1)
    """A folder or a file; `python:stdlib` is the standard library of the Python that runs. It bears no identity, what
    lies there does. No default."""
    include: tuple[str, ...] = ()
    """Glob patterns below `path` (`**` crosses folders) of the files to read. Default: what the kind implies."""
    exclude: tuple[str, ...] = ()
    """Glob patterns of files to leave out, whatever `include` says. Default: none."""
    columns: Columns = Columns()
    """The columns of jsonl and parquet files. Default: text."""


class LengthFilter(Section):
    """Rejects rows that are too short or too long."""

    rule: Literal["length"] = "length"
    """Name of the rule; a file always says it. Default: length."""
    min_bytes: int = Field(default=1, ge=0)
    """Shortest text that is kept, bytes of UTF-8. Default: 1."""
    max_bytes: int = Field(default=1_000_000, ge=1)
    """Longest text that is kept, bytes of UTF-8. Default: 1,000,000."""


class AlphabeticFilter(Section):
    """Rejects tables, dumps and other text that is hardly made of letters."""

    rule: Literal["alphabetic"] = "alphabetic"
    """Name of the rule; a file always says it. Default: alphabetic."""
    min_share: float = Field(default=0.4, ge=0, le=1)
    """Least share of letters among the characters that are not white space. Default: 0.4."""


class LineLengthFilter(Section):
    """Rejects minified or generated text by its mean line."""

    rule: Literal["line_length"] = "line_length"
    """Name of the rule; a file always says it. Default: line_length."""
    max_mean_chars: float = Field(default=200, gt=0)
    """Longest mean line that is kept, characters. Default: 200."""


Filter = Annotated[LengthFilter | AlphabeticFilter | LineLengthFilter, Field(discriminator="rule")]


class Ingest(Section):
    """Sources to a Corpus."""

    sources: tuple[Source, ...] = Field(min_length=1)
    """Where rows come from; names are unique. No default."""
    filters: tuple[Filter, ...] = ()
    """Rules in the order in which they are applied; the first that a row breaks rejects it. Default: none."""
    normalize: Literal["none", "nfc"] = "none"
    """Unicode normalisation of every text. Default: none (source code is not prose)."""
    holdout_share: float = Field(default=0.05, gt=0, lt=1)
    """Share of the rows, by a hash, that never trains and on which releases are judged. Default: 0.05."""

    @model_validator(mode="after")
    def _unique_names(self) -> Ingest:
        names = [source.name for source in self.sources]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"expected unique source names, found {repeated} more than once; rename one of each")
        return self


# ── tokenize, train ───────────────────────────────────────────────────────────────────────────────────────────────────


class Tokenize(Section):
    """Corpus to a TokenSet."""

    tokenizer: str = "train"
    """`train` for a byte-level BPE trained on the corpus, or a folder in Hugging Face form. A model with a parent
    keeps its parent's tokenizer, whatever this says. Default: train."""
    vocab_size: int = Field(default=8192, ge=257, le=1_000_000)
    """Entries of a tokenizer that is trained here. Default: 8192."""
    row_len: int = Field(default=512, ge=8)
    """Length of a packed row, tokens. Default: 512."""


class Architecture(Section):
    """A Llama-style model from scratch."""

    hidden_size: int = Field(default=384, ge=8)
    """Width. Default: 384."""
    num_layers: int = Field(default=6, ge=1)
    """Decoder blocks. Default: 6."""
    num_heads: int = Field(default=6, ge=1)
    """Attention heads. Default: 6."""
    num_kv_heads: int | None = Field(default=None, ge=1)
    """Heads of keys and values. Default: as many as `num_heads`."""
    intermediate_size: int | None = Field(default=None, ge=8)
    """Width of the MLP. Default: 8/3 of `hidden_size`, rounded up to a multiple of 64."""
    context_length: int = Field(default=1024, ge=8)
    """Longest sequence the model is made for, tokens. Default: 1024."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of the attention weights. Default: 0."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Architecture:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"expected num_heads to divide hidden_size, found {self.num_heads} and {self.hidden_size}")
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise ValueError(f"expected num_kv_heads to divide num_heads, found {self.num_kv_heads}, {self.num_heads}")
        return self


class ModelBase(Section):
    """What training starts from."""

    base: str | None = None
    """A folder in Hugging Face form, a hub id, or `registry:production`; none trains from scratch. Default: none."""
    architecture: Architecture = Architecture()
    """The shape of a model from scratch. Read only where `base` is none."""


class Train(Section):
    """TokenSets to a Model."""

    max_steps: int = Field(default=1000, ge=1)
    """Optimiser steps. Default: 1000."""
    global_batch_rows: int = Field(default=16, ge=1)
    """Packed rows in a step, over all workers. Default: 16."""
    learning_rate: float = Field(default=3e-3, gt=0)
    """Peak learning rate. Default: 3e-3."""
    warmup_steps: int = Field(default=20, ge=0)
    """Steps of linear warm-up. Default: 20."""
    final_lr_share: float = Field(default=0.1, ge=0, le=1)
    """Share of the peak at which the cosine ends. Default: 0.1."""
    weight_decay: float = Field(default=0.1, ge=0)
    """AdamW's decay, on matrices only. Default: 0.1."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's first moment. Default: 0.9."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW's second moment. Default: 0.95."""
    grad_clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient. Default: 1."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast where the processor or the GPU computes in it, else fp32. Default: auto."""
    seed: int = Field(default=1, ge=0)
    """Seed of the weights, of the order of the rows and of dropout. Default: 1."""


# ── evaluate, promote ─────────────────────────────────────────────────────────────────────────────────────────────────


class Evaluate(Section):
    """Model to a Scorecard: bits per byte of answers, given their prompts, on rows that never trained."""

    prompt_bytes: int = Field(default=400, ge=1)
    """A text row is cut into tasks: whole lines of about so many bytes as the prompt... Default: 400."""
    answer_bytes: int = Field(default=800, ge=1)
    """...and whole lines of about so many bytes as the answer that is scored. Default: 800."""
    max_tasks_per_row: int = Field(default=8, ge=1)
    """Tasks taken from one row, evenly spaced, so that long rows do not drown short ones. Default: 8."""
    max_tasks: int = Field(default=600, ge=1)
    """Tasks taken from one holdout, by a hash of their ids. Default: 600."""
    bootstrap_samples: int = Field(default=2000, ge=100)
    """Resamples of the paired, clustered bootstrap. Default: 2000."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Coverage of every interval, two-sided. Default: 0.95."""


class PromoteGate(Section):
    """Scorecard to a Release: what a candidate must show."""

    non_inferiority_margin: float = Field(default=0.02, ge=0)
    """How much worse than the release in production the interval may reach on the fixed holdout, bits per byte.
    Default: 0.02."""
    min_tasks: int = Field(default=30, ge=2)
    """Fewest tasks on which a comparison counts. Default: 30."""
    min_clusters: int = Field(default=5, ge=2)
    """Fewest independent rows or users among them. Default: 5."""
    parity_tolerance: float = Field(default=1e-3, gt=0)
    """Largest difference between the trainer's and the server's log-probabilities, nats, fp32. Default: 1e-3."""


# ── serve, improve, traffic ───────────────────────────────────────────────────────────────────────────────────────────


class Serve(Section):
    """Release to an endpoint: what changes answers."""

    chat_template: Literal["plain"] | None = "plain"
    """Template for /v1/chat/completions where the tokenizer has none; none refuses such requests. Default: plain."""
    max_answer_tokens: int = Field(default=512, ge=1)
    """Most tokens that a request may ask for. Default: 512."""
    max_body_bytes: int = Field(default=1_000_000, ge=1_000)
    """Largest body of a request. Default: 1,000,000."""


class Retrain(Section):
    """How the recipe of a retrain differs from that of the first model."""

    max_steps: int = Field(default=200, ge=1)
    """Optimiser steps. Default: 200."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate. Default: 1e-3."""
    feedback_share: float = Field(default=0.5, gt=0, lt=1)
    """Share of the rows of a step that come from feedback; the others replay the old data. Default: 0.5."""


class Improve(Section):
    """Completions and feedback to a decision."""

    tolerance: float = Field(default=0.02, ge=0)
    """The standard: live answers may be worse than the release's scorecard by this share of it. Default: 0.02."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Confidence that they are worse before a retrain, however often it is looked at. Default: 0.95."""
    min_scored: int = Field(default=100, ge=2)
    """Fewest scored answers of the release in production before anything is decided. Default: 100."""
    batch_rows: int = Field(default=400, ge=1)
    """Feedback rows that are sealed into one batch; a retrain needs a sealed batch that is new. Default: 400."""
    batch_after_s: float | None = Field(default=None, gt=0)
    """Age of the oldest row at which a smaller batch is sealed too, seconds. Default: never."""
    cooldown_s: float = Field(default=0.0, ge=0)
    """Shortest time between the end of one retrain and the next, seconds. Default: 0."""
    max_attempts: int = Field(default=3, ge=1)
    """Attempts at one retrain before it is given up. Default: 3."""
    holdout_share: float = Field(default=0.25, gt=0, lt=1)
    """Share of the feedback rows that never trains and judges the candidate. Default: 0.25."""
    retrain: Retrain = Retrain()
    """The recipe of a retrain."""


class Traffic(Section):
    """Simulated users, so that a demonstration or a drill closes the loop without anybody else."""

    source: Source
    """What they ask about: each row is one user, who asks its tasks and corrects every answer."""
    requests: int = Field(default=400, ge=1)
    """Questions with a correction. Default: 400."""
    concurrency: int = Field(default=8, ge=1)
    """Requests at once. Default: 8."""
    max_tokens: int = Field(default=24, ge=1)
    """Length of an answer, tokens. Default: 24."""
    shuffle_corrections: bool = False
    """Gives every user the correction of another: a negative control, which the gate must refuse. Default: false."""
    steady_per_s: float = Field(default=2.0, gt=0)
    """Rate of the requests that go on without feedback until the loop has closed, a second. Default: 2."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Longest wait for the loop to close, seconds. Default: 600."""


# ── runtime ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Endpoint(Section):
    """Where and with what the release is served."""

    host: str = "127.0.0.1"
    """Address to bind. Default: 127.0.0.1, which only this machine reaches."""
    port: int = Field(default=8000, ge=0, le=65535)
    """TCP port; 0 takes a free one. Default: 8000."""
    route_prefix: str = Field(default="/", pattern=r"^/[A-Za-z0-9_/-]*$")
    """Path before `/v1`; a second factory on the same cluster needs one of its own. Default: /."""
    replicas: int = Field(default=1, ge=1)
    """Replicas of the engine. Default: 1."""
    cpus_per_replica: float = Field(default=0.1, gt=0)
    """CPUs that a replica asks Ray for. Default: 0.1, so that it fits beside training on a laptop."""
    gpus_per_replica: float = Field(default=0.0, ge=0)
    """GPUs that a replica asks Ray for. Default: 0."""
    slots: int = Field(default=16, ge=1)
    """Requests that a replica decodes at once. Default: 16."""
    max_queued: int = Field(default=256, ge=1)
    """Requests that wait beyond those; one more is answered 429. Default: 256."""
    poll_s: float = Field(default=0.5, gt=0)
    """How often a replica looks for a new release, seconds. Default: 0.5."""
    drain_timeout_s: float = Field(default=30.0, ge=0)
    """Longest wait for the requests in flight when a release is replaced, seconds. Default: 30."""


class Runtime(Section):
    """Where and with what the factory runs. Nothing here changes a fingerprint."""

    storage: str | None = None
    """Storage root: a folder or any URI that pyarrow or fsspec opens. Default: `.aifactory/<name>` in the current
    folder, or `~/.aifactory/<name>` in a Ray job, whose current folder is a passing copy."""
    state_url: str | None = None
    """SQLAlchemy URL of the journal, the registry and the feedback. Default: SQLite, `state.db` in a local storage
    root."""
    workers: int = Field(default=1, ge=1)
    """Training workers. Default: 1."""
    cpus_per_worker: float = Field(default=1.0, gt=0)
    """CPUs that a training worker or a data task asks Ray for; it runs so many threads, at least one. Default: 1."""
    gpus_per_worker: float = Field(default=0.0, ge=0)
    """GPUs that a training worker asks Ray for. Default: 0; CUDA and NCCL are used where it is above."""
    parallel: Literal["ddp"] = "ddp"
    """How several workers share a model. Default: ddp."""
    data_tasks: int = Field(default=2, ge=1)
    """Tasks that read, tokenize or score at once. Default: 2."""
    micro_batch_rows: int = Field(default=8, ge=1)
    """Rows of one forward pass on one worker. Default: 8."""
    checkpoint_every_steps: int = Field(default=100, ge=1)
    """Steps between two checkpoints of a training run. Default: 100."""
    max_failures: int = Field(default=3, ge=0)
    """Times that training workers are started again after a failure. Default: 3."""
    tick_s: float = Field(default=1.0, gt=0)
    """How often the evaluation actor looks, seconds. Default: 1."""
    watts_per_cpu: float = Field(default=10.0, ge=0)
    """Power of one busy CPU, for the estimate of joules where no counter can be read. Default: 10."""
    endpoint: Endpoint = Endpoint()
    """The inference endpoint."""

    @field_validator("state_url", "storage", mode="after")
    @classmethod
    def _expand(cls, value: str | None) -> str | None:
        return None if value is None else expand_environment(value)


class Config(Section):
    """A whole configuration."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")
    """The factory's name: its namespace in Ray, the storage root and the database. No default."""
    ingest: Ingest
    """Sources to a Corpus."""
    tokenize: Tokenize = Tokenize()
    """Corpus to a TokenSet."""
    model: ModelBase = ModelBase()
    """What training starts from."""
    train: Train = Train()
    """TokenSets to a Model."""
    evaluate: Evaluate = Evaluate()
    """Model to a Scorecard."""
    promote: PromoteGate = PromoteGate()
    """Scorecard to a Release."""
    serve: Serve = Serve()
    """Release to an endpoint."""
    improve: Improve = Improve()
    """Completions and feedback to a decision."""
    traffic: Traffic | None = None
    """Simulated users; `run` then goes on after the first release until the loop has closed. Default: none."""
    runtime: Runtime = Runtime()
    """How and where it runs."""

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
        """Read `path` and apply dotted overrides such as `train.max_steps=10`.

        Raises   ConfigError with the file and the line, or the override, that is wrong.
        """
        file = Path(path)
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError:
            near = difflib.get_close_matches(file.name, [p.name for p in _siblings(file)], n=1)
            hint = f" Did you mean {file.parent / near[0]}?" if near else ""
            raise ConfigError(f"expected a configuration file, found none at {file}.{hint}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"expected a configuration file in UTF-8 at {file}, found: {error}.") from error
        return cls.from_text(text, origin=str(file), overrides=overrides)

    @classmethod
    def from_text(cls, text: str, *, origin: str, overrides: Sequence[str] = ()) -> Config:
        """As `from_yaml`, for a text that came from `origin`."""
        try:
            tree = yaml.compose(text, Loader=yaml.SafeLoader)
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{origin}: expected YAML, found: {error}") from error
        if not isinstance(data, dict):
            found = "nothing" if data is None else f"a {type(data).__name__}"
            raise ConfigError(f"{origin}:1: expected a mapping with the key 'name', found {found}; see configs/.")
        if repeated := [f"{origin}:{key.start_mark.line + 1}: {key.value!r}" for key in _repeated_keys(tree)]:
            raise ConfigError(
                f"expected every key once in its section, found again: {', '.join(repeated)}; delete one."
            )
        for override in overrides:
            _apply_override(data, override)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError("\n".join(_explain(error, tree, origin, overrides))) from error

    def recipe(self, *sections: str) -> dict[str, Any]:
        """The named sections as plain JSON, without what bears no identity (paths of sources)."""
        plain: dict[str, Any] = {}
        for section in sections:
            assert section != "runtime", "the runtime bears no identity"
            value = getattr(self, section)
            plain[section] = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
        for source in (plain.get("ingest") or {}).get("sources", []):
            del source["path"]
        if plain.get("traffic"):
            del plain["traffic"]["source"]["path"]
        return plain


def schema_json() -> str:
    """The JSON schema of a configuration, for editors."""
    return json.dumps(Config.model_json_schema(), indent=2) + "\n"


def expand_environment(text: str) -> str:
    """Replace `${NAME}` and `${NAME:-default}` by environment variables, so that no secret stands in a file.

    Raises   ValueError if a variable without default is not set.
    """

    def value(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        found = os.environ.get(name, default)
        if found is None:
            raise ValueError(f"expected the environment variable {name}, found it unset; set it or write a default")
        return found

    return re.sub(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}", value, text)


def _siblings(file: Path) -> Iterator[Path]:
    return file.parent.glob("*.y*ml") if file.parent.is_dir() else iter(())


def _repeated_keys(tree: yaml.Node | None) -> Iterator[yaml.Node]:
    """Keys that stand twice in one mapping; YAML readers keep the last without a word."""
    waiting, seen = [tree], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            names = [key.value for key, _ in node.value]
            yield from (key for at, (key, _) in enumerate(node.value) if key.value in names[:at] and key.value != "<<")
            waiting.extend(value for _, value in node.value)
        elif isinstance(node, yaml.SequenceNode):
            waiting.extend(node.value)


def _apply_override(data: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"--set {override}: expected KEY=VALUE such as train.max_steps=10, found no key or no '='.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: expected a YAML value, found: {error}") from error
    node: Any = data
    *parents, last = dotted.split(".")
    for depth, key in enumerate(parents):
        node = _descend(node, key, parents[:depth], override)
    if isinstance(node, list):
        node[_index(node, last, parents, override)] = value
    else:
        node[last] = value


def _descend(node: Any, key: str, above: Sequence[str], override: str) -> Any:
    at: Any = _index(node, key, above, override) if isinstance(node, list) else key
    found = node[at] if isinstance(node, list) else node.get(key)
    if found is None:
        found = node[at] = {}
    if not isinstance(found, dict | list):
        where = ".".join([*above, key])
        raise ConfigError(f"--set {override}: expected a section at '{where}', found {found!r}; name a key above it.")
    return found


def _index(node: list[Any], key: str, above: Sequence[str], override: str) -> int:
    if not key.isdecimal() or int(key) >= len(node):
        raise ConfigError(
            f"--set {override}: expected a number below {len(node)} after '{'.'.join(above)}.', found {key!r}."
        )
    return int(key)


def _explain(error: ValidationError, tree: yaml.Node | None, origin: str, overrides: Sequence[str]) -> Iterator[str]:
    for problem in error.errors():
        keys, holders, inside = _resolve(problem["loc"])
        if problem["type"].startswith("union_tag"):
            keys, holders = [*keys, _TAG], inside
        dotted = ".".join(keys) if keys else "the configuration"
        where = _where(tree, keys, origin, overrides)
        if problem["type"] == "extra_forbidden":
            valid = sorted({key for model in holders for key in model.model_fields})
            near = difflib.get_close_matches(keys[-1], valid, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(valid)}"
            yield f"{where}: unknown key '{dotted}'; {hint}"
        elif problem["type"] == "union_tag_invalid":
            valid, tag = [_tag(model) for model in inside], problem["ctx"]["tag"]
            near = difflib.get_close_matches(tag, valid, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            yield f"{where}: '{dotted}': expected {' or '.join(map(repr, valid))}, found {tag!r}{hint}"
        elif problem["type"] in ("missing", "union_tag_not_found"):
            yield f"{where}: expected the key '{dotted}', found none; add it{_meaning(keys, holders)}"
        elif problem["type"] == "value_error":
            yield f"{where}: '{dotted}': {problem['msg'].removeprefix('Value error, ')}"
        else:
            expected = problem["msg"]
            for pattern, plain in _PLAIN_WORDS:
                expected = re.sub(pattern, plain, expected)
            found = repr(problem["input"])
            found = found if len(found) <= 120 else found[:117] + "..."
            yield f"{where}: '{dotted}': {expected}, found {found}; change it{_meaning(keys, holders)}"


_PLAIN_WORDS = (
    (r"^String should match pattern ", "expected text that matches "),
    (r"^(Input|Tuple|String|Keys) should (be|have) ", "expected "),
    (r"^expected (greater|less) ", r"expected a number \1 "),
    (r"valid dictionary or .*", "section of keys and values"),
    (r"valid tuple", "list"),
    (r" after validation, not \d+$", ""),
)
"""How pydantic's messages read in the form of ours."""

_TAG = "rule"
"""The key by which the only discriminated union, that of the filters, tells its members apart."""


def _tag(model: type[BaseModel]) -> str:
    return str(model.model_fields[_TAG].default) if _TAG in model.model_fields else ""


def _resolve(
    location: Sequence[int | str],
) -> tuple[list[str], list[type[BaseModel]], list[type[BaseModel]]]:
    """A location as keys of the file, the models of which one holds the last key, and the models that it may hold.

    Pydantic puts the tag of a discriminated union between the index and the key; no key of the file stands there.
    """
    keys: list[str] = []
    holders: list[type[BaseModel]] = [Config]
    inside: list[type[BaseModel]] = [Config]
    for part in location:
        tagged = [model for model in inside if _tag(model) == part]
        if tagged and len(inside) > 1:
            inside = tagged
            continue
        keys.append(str(part))
        if isinstance(part, str):
            holders, inside = (
                inside,
                [
                    found
                    for model in inside
                    if part in model.model_fields
                    for found in _models_in(model.model_fields[part].annotation)
                ],
            )
    return keys, holders, inside


def _meaning(keys: Sequence[str], holders: Sequence[type[BaseModel]]) -> str:
    """What the schema says of the last key."""
    name = next((key for key in reversed(keys) if not key.isdecimal()), "")
    fields = (model.model_fields[name] for model in holders if name in model.model_fields)
    text = next((field.description for field in fields if field.description), None)
    return f" ({' '.join(text.split()).rstrip('.')})" if text else ""


def _where(tree: yaml.Node | None, keys: Sequence[str], origin: str, overrides: Sequence[str]) -> str:
    dotted = ".".join(keys)
    for override in reversed(overrides):  # the last one holds
        target = override.partition("=")[0]
        if dotted == target or dotted.startswith(target + ".") or target.startswith(dotted + "."):
            return f"--set {override}"
    node, line = tree, 1
    for key in keys:
        if isinstance(node, yaml.MappingNode):
            pair = next(((k, v) for k, v in node.value if k.value == key), None)
            if pair is None:
                break
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and key.isdecimal() and int(key) < len(node.value):
            node = node.value[int(key)]
            line = node.start_mark.line + 1
    return f"{origin}:{line}"


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def plain_overrides(values: Mapping[str, Any]) -> list[str]:
    """Overrides in the form of the command line from a mapping of dotted keys, for driver scripts."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
