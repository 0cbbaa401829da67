"""The section `runtime`: where and with what the factory runs. Nothing in it bears identity."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, StringConstraints, field_validator, model_validator

from aifactory.config.gateway import Gateway
from aifactory.config.head import Head
from aifactory.config.page import Page
from aifactory.config.section import Section
from aifactory.config.site import Site
from aifactory.config.traces import Traces

AdapterName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Endpoint(Section):
    """Where and with what the release is served."""

    host: str = "127.0.0.1"
    """Address to bind. Default: 127.0.0.1, which only this machine reaches."""
    port: int = Field(default=8000, ge=0, le=65535)
    """TCP port; 0 takes a free one. Default: 8000."""
    route_prefix: str = Field(default="/", pattern=r"^/[A-Za-z0-9_/-]*$")
    """Path before `/v1`; a second factory on the same cluster needs one of its own. Default: /."""
    replicas: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Replicas of the engine; `[least, most]`: more of them while each has more than `target_requests`, fewer again after.
    The least must have their place at the start. Default: 1."""
    mode: Literal["direct", "resilient"] = "direct"
    """What becomes of answers whose replica is lost. direct: they end with an error that says so. resilient: a front before the
    replicas has others answer what had sent nothing, and go on with streams from the token at which they broke off, by the
    same release; each request takes another hop. Default: direct."""
    ingress: Literal["auto", "haproxy", "serve"] = "serve"
    """What takes connections. haproxy: HAProxy, which hands requests to replicas over HTTP: many times the requests a second;
    a stream whose replica is lost is broken off. serve: Ray Serve's own proxy, which ends such a stream by an error. auto:
    haproxy where it is installed. Of a Ray Serve that runs already, it is what it is. Default: serve."""
    fronts: PositiveInt = 2
    """Of resilient: fronts, which hold no model and ask Ray for no CPU; what one of them was answering is lost with it.
    Default: 2."""
    target_requests: float | None = Field(default=None, gt=0)
    """Of `[least, most]`: open requests for each replica, on average. Default: `slots`."""
    scale_up_after_s: float = Field(default=30.0, ge=0)
    """Of `[least, most]`: how long there must be more before a replica is added, seconds. Default: 30."""
    scale_down_after_s: float = Field(default=600.0, ge=0)
    """Of `[least, most]`: how long there must be fewer before one is taken away, seconds. Default: 600."""
    cpus_per_replica: float = Field(default=0.1, gt=0)
    """CPUs that a replica asks Ray for. Default: 0.1, so that it fits beside training on a laptop."""
    gpus_per_replica: float = Field(default=0.0, ge=0)
    """GPUs that a replica asks Ray for. Default: 0."""
    engine: Literal["torch", "vllm"] = "torch"
    """What computes the answers: the project's own engine (torch), or vLLM's where it is installed (extra `vllm`), which gives
    no embeddings, goes on with no stream (`mode: direct` alone) and refuses what it would compute otherwise.
    Default: torch."""
    weights: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """What the project's own engine reads weights as. float32: greedy answers are those of the trained model, token for token.
    bfloat16: weights, what they are multiplied by, keys and values are rounded to 8 bits of precision; the fastest for many
    requests and long prompts where a CPU has a matrix unit. int8: the fastest for one request, on a CPU alone. A release that
    then says something else than its trainer, beyond a bound, is not served. auto: float32 on a CPU, bfloat16 on a GPU.
    Default: auto."""
    batch_invariant: bool = False
    """Whether the project's own engine gives an answer the same bits whatever else the replica answers or has answered, seeds
    included. With its kernels for a CPU that costs no more than reading an answer again where a later prompt goes on from it;
    elsewhere each request is computed by itself, and many at once take as long as one after the other. Default: false."""
    adapters: Mapping[AdapterName, str] = Field(default={}, max_length=64)
    """Low-rank adapters beside the release, by the names that requests give as `model`: the folder of one in peft's form or
    of a model that was exported with its adapter, on every machine of a replica; or a release (`registry:` and its name or
    number) that was trained with `train.lora` from the one in production. Looked up whenever a release is loaded; one that
    does not fit it is not served, and the journal says why. At most 64. Default: none."""
    slots: int = Field(default=16, ge=1)
    """Requests that a replica decodes at once. Default: 16."""
    max_queued: int = Field(default=256, ge=1)
    """Answers that wait beyond those; one more is answered 429. Default: 256."""
    shadow_slots: int = Field(default=2, ge=1)
    """Copies of requests that a release in the shadow answers at once in a replica. What comes beyond is not copied; nor is
    anything while an answer waits for its turn, and what is under way then ends. Default: 2."""
    request_timeout_s: float | None = Field(default=600.0, gt=0)
    """Longest time that a request may take, seconds; a request may ask for less. Then its work ends and it is answered
    504. Default: 600."""
    poll_s: float = Field(default=0.5, gt=0)
    """How often a replica looks for a new release, seconds. Default: 0.5."""
    meter_s: float = Field(default=60.0, gt=0)
    """How often a replica enters into the journal what it has used and whose answers it gave, seconds. Default: 60."""
    drain_timeout_s: float = Field(default=30.0, ge=0)
    """Longest wait for the requests in flight when a release is replaced, when a replica is taken away, and when the
    endpoint shuts down, seconds. Default: 30."""

    @property
    def least_replicas(self) -> int:
        """What there is in any case."""
        return self.replicas if isinstance(self.replicas, int) else self.replicas[0]

    @property
    def most_replicas(self) -> int:
        """What there is at most."""
        return self.replicas if isinstance(self.replicas, int) else self.replicas[1]

    @property
    def most_open(self) -> int:
        """Requests that a replica has open at most: those that are answered or wait, and as many whose readers are slow."""
        return 2 * (self.slots + self.max_queued)

    @model_validator(mode="after")
    def _only_resilient_has_fronts(self) -> Endpoint:
        if self.mode == "direct" and self.fronts != Endpoint.model_fields["fronts"].default:
            raise ValueError("expected fronts beside mode: resilient alone, found mode: direct; delete it")
        return self

    @model_validator(mode="after")
    def _weights_are_for_an_engine_that_has_them(self) -> Endpoint:
        if self.weights != "auto" and self.engine == "vllm":
            raise ValueError(
                f"expected weights beside engine: torch alone, found {self.weights} beside engine: vllm; delete it"
            )
        if self.batch_invariant and self.engine == "vllm":
            raise ValueError("expected batch_invariant beside engine: torch alone, found engine: vllm; delete it")
        if self.weights == "int8" and self.gpus_per_replica:
            raise ValueError("expected weights: int8 on a CPU alone, found gpus_per_replica; take bfloat16")
        return self

    @model_validator(mode="after")
    def _resilient_goes_on(self) -> Endpoint:
        if self.mode == "resilient" and self.engine == "vllm":
            raise ValueError(
                "expected engine: torch beside mode: resilient, found engine: vllm, which can't go on with an answer that "
                "another replica has begun; set mode: direct or engine: torch"
            )
        return self

    @model_validator(mode="after")
    def _scales_within_bounds(self) -> Endpoint:
        if self.least_replicas > self.most_replicas:
            raise ValueError(f"expected replicas: [least, most], found {list(self.replicas)}; turn them round")  # type: ignore[arg-type]
        for name in ("target_requests", "scale_up_after_s", "scale_down_after_s"):
            # By value: a configuration that was handed on has every field set.
            if isinstance(self.replicas, int) and getattr(self, name) != Endpoint.model_fields[name].default:
                raise ValueError(
                    f"expected {name} beside replicas: [least, most] alone, found replicas: {self.replicas}; delete it"
                )
        return self


class StepExecution(Section):
    """How a training step is computed. The model is the same, but for rounding."""

    attention: Literal["auto", "mask", "varlen"] = "auto"
    """Over packed rows: by one block-diagonal mask, or each document by itself (varlen: flash kernels on CUDA, whose
    products are in bf16). auto: varlen where the model and the device have it. Default: auto."""
    loss: Literal["auto", "plain", "pieces"] = "auto"
    """Cross-entropy over the logits of all tokens at once, or in pieces, so that large vocabularies fit. auto: pieces where
    the model's head is a linear layer. Default: auto."""
    activations: Literal["none", "selective", "full"] = "none"
    """What is computed a second time to save memory: nothing, all but products and attention (selective), or whole blocks
    (full). Default: none."""
    compile: bool = False
    """Whether the decoder blocks are compiled (torch.compile; wants a C++ compiler on a CPU). Takes up to a minute at every
    start, and pays on CUDA. Default: false."""
    gradients: Literal["fp32", "bf16"] = "fp32"
    """In what gradients cross from worker to worker; bf16 halves what is sent. Default: fp32."""


class Runtime(Section):
    """Where and with what the factory runs. Nothing here changes a fingerprint."""

    storage: str | None = None
    """Storage root: a folder or any URI that pyarrow or fsspec opens. Default: `.aifactory/<name>` in the current
    folder, or `~/.aifactory/<name>` in a Ray job, whose current folder is a passing copy."""
    state_url: str | None = None
    """SQLAlchemy URL of the journal, the registry and the feedback. Default: SQLite, `state.db` in a local storage
    root."""
    workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Training workers; `[least, most]`: as many as there is room for, again whenever a node is lost or comes back.
    Default: 1."""
    cpus_per_worker: float = Field(default=1.0, gt=0)
    """CPUs that a training worker or a data task asks Ray for; it runs so many threads, at least one. Default: 1."""
    gpus_per_worker: float = Field(default=0.0, ge=0)
    """GPUs that a training worker asks Ray for. Default: 0; CUDA and NCCL are used where it is above."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several workers share a model: each holds all of it (ddp), or a part of every block (fsdp: FSDP2).
    Default: ddp."""
    shard_workers: int | None = Field(default=None, ge=1)
    """Of fsdp: so many workers hold one copy of the model between them (hybrid sharding). Default: all."""
    execution: StepExecution = StepExecution()
    """How a training step is computed."""
    data_tasks: int = Field(default=2, ge=1)
    """Tasks that read, tokenize or score at once. Default: 2."""
    inline_bytes: int = Field(default=8_000_000, ge=0)
    """Data up to so many bytes is worked on in the driver's own process, without a cluster; a model whose files hold no more is proven
    and scored there. Default: 8,000,000."""
    micro_batch_rows: int = Field(default=8, ge=1)
    """Rows of one forward pass on one worker. Default: 8."""
    checkpoint_every_steps: int = Field(default=100, ge=1)
    """Steps between two checkpoints of a training run. Default: 100."""
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ("tensorboard",)
    """Who is told of every step of a training run: TensorBoard (events in the run's folder), MLflow (extra `mlflow`), Weights
    & Biases (extra `wandb`); the latter two go where their own environment variables say. Default: tensorboard."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """So many of the newest checkpoints of a run are kept while it lasts, and the best by held-out rows. Default: 2."""
    validate_every_steps: int | None = Field(default=None, ge=1)
    """Steps between two checkpoints whose loss on held-out rows is measured beside the training, and at the end; it changes
    no weights. With `train.early_stopping` that says it. Default: none is measured."""
    validate_rows: int = Field(default=64, ge=1)
    """Most packed rows that it is measured on. Default: 64."""
    hang_timeout_s: float = Field(default=1800.0, gt=0)
    """A training worker that takes no step for so long is killed and started again, which counts as a failure; to be
    longer than the slowest step, with what is compiled before it. Default: 1800."""
    max_failures: int = Field(default=3, ge=0)
    """Times that training workers are started again after a failure. Default: 3."""
    tick_s: float = Field(default=1.0, gt=0)
    """How often the evaluation actor looks, seconds. Default: 1."""
    lm_eval_python: str | None = None
    """Python interpreter of the environment that has lm-eval, on every machine of the data tasks, where it is not this one.
    Default: this one."""
    watts_per_cpu: float = Field(default=10.0, ge=0)
    """Power of one busy CPU, for the estimate of joules where no counter can be read. Default: 10."""
    endpoint: Endpoint = Endpoint()
    """The inference endpoint."""
    gateway: Gateway = Gateway()
    """Who may ask it."""
    head: Head = Head()
    """The Ray head that `aifactory up` starts."""
    page: Page = Page()
    """The factory's page."""
    traces: Traces | None = None
    """Spans of requests and cycles, for OpenTelemetry. Default: none are made."""
    site: Site = Site()
    """What energy and machines cost there: for plans and for the books."""

    @property
    def least_workers(self) -> int:
        """The fewest training workers with which a run goes on."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        """The most training workers that a run uses."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @model_validator(mode="after")
    def _least_before_most(self) -> Runtime:
        if self.least_workers > self.most_workers:
            raise ValueError(f"expected workers: [least, most], found {list(self.workers)}; turn them round")  # type: ignore[arg-type]
        return self

    @model_validator(mode="after")
    def _only_fsdp_shards(self) -> Runtime:
        if self.shard_workers is not None and self.parallel != "fsdp":
            raise ValueError(f"expected shard_workers with parallel: fsdp alone, found parallel: {self.parallel}")
        return self

    @field_validator("state_url", "storage", mode="after")
    @classmethod
    def _expand(cls, value: str | None) -> str | None:
        return None if value is None else expand_environment(value)


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
