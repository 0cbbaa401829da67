"""The sections of the recipe beyond the data: model, training, evaluation, gate, serving, improvement, traffic."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from aifactory.config.answer_guards import AnswerGuards
from aifactory.config.budget import Budget
from aifactory.config.judge import Judge, LiveJudge
from aifactory.config.lm_eval import LmEval
from aifactory.config.schedule import RetrainSchedule
from aifactory.config.section import Section
from aifactory.config.sources import Source
from aifactory.config.trial import ReleaseTrial
from aifactory.config.trust import FeedbackTrust
from aifactory.config.watch import PromptWatch


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


class SourceShare(Section):
    """How much of a batch comes from one source."""

    weight: float = Field(default=1.0, ge=0)
    """Its weight among those of all sources, by packed rows; 0 leaves it out. Default: 1."""
    max_epochs: float | None = Field(default=None, gt=0)
    """Most times that a row of it is read in a run; what it then gives less the other sources give. Default: any."""


class Guards(Section):
    """Steps that are not taken: the run goes back to its newest checkpoint and leaves the batch out."""

    max_skipped: int = Field(default=3, ge=0)
    """Batches that may be left out before the run stops, because their loss or gradient is not finite, or for a spike.
    Default: 3."""
    spike_deviations: float = Field(default=0.0, ge=0)
    """A loss so many robust standard deviations above the median of those before it is a spike; 0: none is.
    Default: 0."""
    spike_window: int = Field(default=64, ge=8)
    """Losses that it is compared with. Default: 64."""


class EarlyStopping(Section):
    """The run ends when the loss on held-out rows gets no better; the model has the weights of the lowest one."""

    every_steps: int = Field(default=100, ge=1)
    """Steps between two validations. What they decide holds one such interval later. Default: 100."""
    patience: int = Field(default=3, ge=1)
    """So many validations in a row without a better loss end the run. Default: 3."""
    min_delta: float = Field(default=0.0, ge=0)
    """A loss is better only if it is lower by more than this, nats per token. Default: 0."""
    rows: int = Field(default=64, ge=1)
    """Most packed rows that are held out for it, by a hash of their documents' ids. Default: 64."""


class Preference(Section):
    """How an answer that was preferred is told from one that was not. Read by dpo and kto alone."""

    beta: float = Field(default=0.1, gt=0)
    """How far the model may go from the one it starts from: the less, the farther. Default: 0.1."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Of dpo: the share of pairs that are taken to be the wrong way round. Default: 0."""
    desirable_weight: float = Field(default=1.0, ge=0)
    """Of kto: the weight of an answer that was liked. Default: 1."""
    undesirable_weight: float = Field(default=1.0, ge=0)
    """Of kto: the weight of an answer that was not. Default: 1."""


class Lora(Section):
    """Two thin matrices beside each chosen one are trained; all other weights stay (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int = Field(default=16, ge=1)
    """Columns of the first of the two and rows of the second. Default: 16."""
    alpha: float = Field(default=32.0, gt=0)
    """Their product is multiplied by alpha / rank. Default: 32."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of what goes into them. Default: 0."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the modules (`q_proj`) beside which they stand, or all linear ones but the last. Default: all-linear."""

    @model_validator(mode="after")
    def _names_modules(self) -> Lora:
        if not self.target_modules:
            raise ValueError("expected names of modules, or all-linear, in target_modules, found none")
        return self


class Train(Section):
    """TokenSets to a Model."""

    objective: Literal["likelihood", "dpo", "kto"] = "likelihood"
    """What is learnt. likelihood: the texts, or the answers to their prompts, token by token; dpo: to prefer the chosen
    answer of each preference pair (rows with `rejected`); kto: to give answers of the kind that is labelled `true`, and
    none of the kind that is labelled `false`. Default: likelihood."""
    preference: Preference = Preference()
    """How, for dpo and kto."""
    lora: Lora | None = None
    """Trains low-rank matrices beside the weights of `model.base`, which stay as they are. Default: none, all weights are
    trained."""
    max_steps: int = Field(default=1000, ge=1)
    """Optimiser steps. Default: 1000."""
    global_batch_rows: int = Field(default=16, ge=1)
    """Packed rows in a step, over all workers. Default: 16."""
    mixture: dict[str, SourceShare] = Field(default_factory=dict)
    """By source its share of a batch; names every source, or none. Default: none, each gives as many rows as it has."""
    learning_rate: float = Field(default=3e-3, gt=0)
    """Peak learning rate. Default: 3e-3."""
    warmup_steps: int = Field(default=20, ge=0)
    """Steps of linear warm-up. Default: 20."""
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    """How the rate falls after the warm-up: by a cosine, linearly, or (wsd) only in the last `decay_share` of the steps.
    Default: cosine."""
    decay_share: float = Field(default=0.2, gt=0, le=1)
    """Of wsd: the share of all steps in which the rate falls, linearly. Default: 0.2."""
    final_lr_share: float = Field(default=0.1, ge=0, le=1)
    """Share of the peak at which the rate ends. Default: 0.1."""
    weight_decay: float = Field(default=0.1, ge=0)
    """AdamW's decay, on matrices only. Default: 0.1."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's first moment. Default: 0.9."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW's second moment. Default: 0.95."""
    grad_clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient. Default: 1."""
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    """auto: bf16 autocast where the processor or the GPU computes in it, else fp32. fp8: as bf16, but the linear layers of
    the blocks compute in FP8 (torchao: extra `fp8`; NVIDIA GPUs since Ada and Hopper). Default: auto."""
    seed: int = Field(default=1, ge=0)
    """Seed of the weights, of the order of the rows and of dropout. Default: 1."""
    guards: Guards = Guards()
    """What keeps a bad batch from spoiling the weights."""
    early_stopping: EarlyStopping | None = None
    """Ends the run by the loss on held-out rows. Default: none, all steps are taken."""
    reproducible: Literal["execution", "across_workers"] = "execution"
    """What promises the same weights to the bit: the same execution, or the recipe alone, by any number of workers that is a
    power of two. The latter needs `micro_batch_rows` and `threads`, of which results then depend. Default: execution."""
    micro_batch_rows: int | None = Field(default=None, ge=1)
    """Of across_workers: rows of one forward pass; `global_batch_rows` is a power of two times it. Default: none."""
    threads: int | None = Field(default=None, ge=1)
    """Of across_workers: threads of each worker on a CPU. Default: none."""
    candidates: tuple[dict[str, Any], ...] = ()
    """Recipes of one cycle, each by what it has different from this section, such as {learning_rate: 1.0e-3}; {} is the section
    as it stands. All are trained, and the one with the best holdout is judged. A retrain has none. Default: none, the
    section alone is trained."""

    def recipes(self) -> tuple[Train, ...]:
        """What is trained in a cycle over the sources: the candidates, each a whole recipe, or this section alone."""
        alone = self.model_copy(update={"candidates": ()})
        if not self.candidates:
            return (alone,)
        return tuple(Train.model_validate(_merged(alone.model_dump(), candidate)) for candidate in self.candidates)

    @model_validator(mode="after")
    def _candidates_are_recipes(self) -> Train:
        for number, candidate in enumerate(self.candidates):
            if "candidates" in candidate:
                raise ValueError(f"expected no candidates within train.candidates[{number}], found some")
        try:
            recipes = self.recipes()
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(
                f"expected overrides of train in every train.candidates: {where}: {first['msg']}"
            ) from error
        for number, recipe in enumerate(recipes):
            if recipe.objective != self.objective:
                raise ValueError(
                    f"expected one objective for all candidates, whose rows are packed for it, found {recipe.objective} in "
                    f"train.candidates[{number}] and {self.objective} in train; make it a cycle of its own"
                )
            if recipe in recipes[:number]:
                raise ValueError(
                    f"expected candidates that differ, found train.candidates[{number}] to be "
                    f"train.candidates[{recipes.index(recipe)}] again; leave one out"
                )
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_not_there(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        plain: dict[str, Any] = handler(self)
        # Recipes bear identity: one without candidates is the one that it was before there were any.
        return plain if self.candidates else {name: value for name, value in plain.items() if name != "candidates"}

    @property
    def is_preference(self) -> bool:
        """Whether answers are compared, rather than learnt."""
        return self.objective != "likelihood"

    @property
    def is_across_workers(self) -> bool:
        """Whether the weights depend on the recipe alone."""
        return self.reproducible == "across_workers"

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Train:
        read = {
            "likelihood": set(),
            "dpo": {"beta", "label_smoothing"},
            "kto": {"beta", "desirable_weight", "undesirable_weight"},
        }[self.objective]
        for name, field in Preference.model_fields.items():
            # By value: a configuration that was handed on to a job has every field set.
            if name not in read and getattr(self.preference, name) != field.default:
                raise ValueError(f"expected no preference.{name} beside objective: {self.objective}; leave it out")
        if self.schedule != "wsd" and self.decay_share != Train.model_fields["decay_share"].default:
            raise ValueError(
                f"expected decay_share with schedule: wsd alone, found schedule: {self.schedule}; leave it out"
            )
        if not self.guards.spike_deviations and self.guards.spike_window != Guards.model_fields["spike_window"].default:
            raise ValueError("expected guards.spike_window beside guards.spike_deviations alone; set both or neither")
        return self

    @model_validator(mode="after")
    def _fixed_where_it_matters(self) -> Train:
        if not self.is_across_workers:
            for name in ("micro_batch_rows", "threads"):
                if getattr(self, name) is not None:
                    raise ValueError(f"expected train.{name} with reproducible: across_workers alone; use runtime's")
            return self
        if self.micro_batch_rows is None or self.threads is None:
            raise ValueError(
                "expected micro_batch_rows and threads beside reproducible: across_workers, since the bits of a sum depend "
                f"on both; found {self.micro_batch_rows} and {self.threads}"
            )
        count, left = divmod(self.global_batch_rows, self.micro_batch_rows)
        if left or count & (count - 1):
            raise ValueError(
                "expected global_batch_rows to be 1, 2, 4, 8... times micro_batch_rows for reproducible: across_workers, "
                f"found {self.global_batch_rows} and {self.micro_batch_rows}"
            )
        return self


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`values` with `changes` put over them, section by section; a mixture is one value."""
    merged = dict(values)
    for name, value in changes.items():
        is_section = isinstance(value, dict) and isinstance(merged.get(name), dict) and name != "mixture"
        merged[name] = _merged(merged[name], value) if is_section else value
    return merged


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
    judge: Judge | None = None
    """A model elsewhere that compares answers with those of the release in production. Default: none."""

    lm_eval: LmEval | None = None
    """Tasks of the lm-eval library. Default: none."""
    guards: AnswerGuards | None = None
    """What answers may not hold. Default: none, they are not looked through."""

    @model_serializer(mode="wrap")
    def _without_what_is_not_there(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        plain: dict[str, Any] = handler(self)
        # Recipes bear identity: one without a judge, guards or tasks of lm-eval is the one that it was before there were any.
        left_out = {name for name in ("judge", "guards", "lm_eval") if getattr(self, name) is None}
        return {name: value for name, value in plain.items() if name not in left_out}


class PromoteGate(Section):
    """Scorecard to a Release: what a candidate must show."""

    non_inferiority_margin: float = Field(default=0.02, ge=0)
    """How much worse than the release in production the interval may reach on the fixed holdout, bits per byte.
    Default: 0.02."""
    erosion_margin: float | None = Field(default=None, ge=0)
    """How much worse than the best release so far on that holdout it may reach in all, bits per byte: without it each release could
    lose the margin above once more. Default: twice that margin."""
    exact_margin: float | None = Field(default=None, ge=0, lt=1)
    """How much lower than that of the release in production the interval of the share of references on the fixed holdout may
    reach that are answered to the letter (0.01: one point); for answers that are short and right or wrong. Default: none, it
    is not looked at. Beside the best release so far it may be twice that."""
    min_tasks: int = Field(default=30, ge=2)
    """Fewest tasks on which a comparison counts. Default: 30."""
    min_clusters: int = Field(default=5, ge=2)
    """Fewest independent rows or users among them. Default: 5."""
    parity_tolerance: float = Field(default=1e-3, gt=0)
    """Largest difference between the trainer's and the server's log-probabilities, nats, fp32. Default: 1e-3."""

    @property
    def most_eroded(self) -> float:
        """By how much it may be worse than the best release so far."""
        return 2 * self.non_inferiority_margin if self.erosion_margin is None else self.erosion_margin

    @property
    def most_exact_eroded(self) -> float | None:
        """The same for the share of exact answers; none where those are not looked at."""
        return None if self.exact_margin is None else 2 * self.exact_margin

    @model_validator(mode="after")
    def _all_is_no_less_than_one_step(self) -> PromoteGate:
        if self.erosion_margin is not None and self.erosion_margin < self.non_inferiority_margin:
            raise ValueError(
                f"expected an erosion_margin of at least non_inferiority_margin ({self.non_inferiority_margin:g}), found "
                f"{self.erosion_margin:g}: one release alone may lose that"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_not_there(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        plain: dict[str, Any] = handler(self)
        # Recipes bear identity: one without these margins is the one that it was before there were any.
        optional = ("exact_margin", "erosion_margin")
        return {name: value for name, value in plain.items() if name not in optional or value is not None}


# ── serve, improve, traffic ───────────────────────────────────────────────────────────────────────────────────────────


class Serve(Section):
    """Release to an endpoint: what changes answers."""

    chat_template: Literal["plain"] | None = "plain"
    """Template for /v1/chat/completions where the tokenizer has none; none refuses such requests. Default: plain."""
    max_answer_tokens: int = Field(default=512, ge=1)
    """Most tokens that a request may ask for. Default: 512."""
    max_body_bytes: int = Field(default=1_000_000, ge=1_000)
    """Largest body of a request. Default: 1,000,000."""
    max_file_bytes: int = Field(default=100_000_000, ge=1_000)
    """Largest file that can be uploaded to /v1/files. Default: 100,000,000."""

    @property
    def chat_fallback(self) -> str:
        """The template of chats for a tokenizer that has none, as `aifactory.text.chat` calls it; data and scores use it too."""
        return self.chat_template or "none"


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
    max_retrains_per_day: int = Field(default=24, ge=1)
    """Most retrains that begin in any 24 hours, whatever they come to. Default: 24."""
    max_attempts: int = Field(default=3, ge=1)
    """Attempts at one retrain before it is given up. Default: 3."""
    holdout_share: float = Field(default=0.25, gt=0, lt=1)
    """Share of the feedback rows that never trains and judges the candidate. Default: 0.25."""
    retrain: Retrain = Retrain()
    """The recipe of a retrain."""
    schedule: RetrainSchedule | None = None
    """Retrains at fixed times beside those for what is found. Default: none."""
    budget: Budget | None = None
    """What retrains may cost, and what they must be worth. Default: none, that is not asked."""
    trust: FeedbackTrust | None = FeedbackTrust()
    """Which feedback is believed; none: all is."""
    prompts: PromptWatch | None = PromptWatch()
    """How what users ask is watched; none: it is not."""
    live_judge: LiveJudge | None = None
    """How answers that are given are judged; needs evaluate.judge. Default: none, they are not."""
    trial: ReleaseTrial | None = None
    """How a release that the gate lets pass is tried before it takes production. Default: none, it takes it at once."""


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
