"""The sections of the data plane beyond the sources: their steps in order, the holdout, tokens."""

from __future__ import annotations

from pydantic import Field, model_validator

from aifactory.config.section import Section
from aifactory.config.sources import Source
from aifactory.config.steps import CorpusStep, DecontaminateStep, ModelStep, NearDuplicatesStep, RowStep, Step


class HoldoutStratum(Section):
    """Rows of which another share is held out."""

    source: str | None = None
    """Name of a source. Default: any."""
    label: str | None = None
    """A label that the source gave its rows; what a step says of them later moves no row. Default: any."""
    share: float = Field(gt=0, lt=1)
    """Share of these rows that is held out. No default."""

    @model_validator(mode="after")
    def _narrows(self) -> HoldoutStratum:
        if self.source is None and self.label is None:
            raise ValueError("expected a source, a label or both in a stratum, found none; or change holdout_share")
        return self


class Ingest(Section):
    """Sources to a Corpus."""

    sources: tuple[Source, ...] = Field(min_length=1)
    """Where rows come from; names are unique. No default."""
    steps: tuple[Step, ...] = ()
    """What is done to the rows, in this order; the first rule that a row breaks rejects it. Steps that look at all rows
    come after those that look at one. Rows without text and exact duplicates go in any case. Default: none."""
    holdout_share: float = Field(default=0.05, gt=0, lt=1)
    """Share of the rows, by a hash, that never trains and on which releases are judged. Each source and each label gives
    about this share of its own rows. Default: 0.05."""
    holdout_strata: tuple[HoldoutStratum, ...] = ()
    """Rows of which another share is held out, so that what is rare is judged too; the first that fits a row counts. A row
    changes its side only where the share of its stratum is changed. Default: none."""
    quarantine_similarity: float | None = Field(default=0.4, gt=0, le=1)
    """Least estimated Jaccard similarity of a row's runs of 32 bytes with those of one row that is held out, in this cycle or an
    earlier one, at which it does not train: a copy in which a few words were changed. Rows of fewer than 128 bytes are not
    looked at. `near_duplicates` among the steps looks more closely, and takes its place. null: exact copies alone. Default: 0.4."""

    @model_validator(mode="after")
    def _unique_names(self) -> Ingest:
        names = [source.name for source in self.sources]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"expected unique source names, found {repeated} more than once; rename one of each")
        if unknown := [stratum.source for stratum in self.holdout_strata if stratum.source not in (None, *names)]:
            raise ValueError(f"expected sources of {names} in holdout_strata, found {unknown}; correct them")
        return self

    @model_validator(mode="after")
    def _corpus_steps_last(self) -> Ingest:
        names = [step.step for step in self.steps]
        late = [isinstance(step, CorpusStep) for step in self.steps]
        if late != sorted(late):
            first = names[late.index(True)]
            raise ValueError(f"expected steps that look at one row before {first!r}, found {names}; move it to the end")
        if repeated := sorted(
            {name for name, all_rows in zip(names, late, strict=True) if all_rows and names.count(name) > 1}
        ):
            raise ValueError(f"expected each step over all rows once, found {repeated} again; delete one")
        return self

    @property
    def row_steps(self) -> tuple[RowStep, ...]:
        """The steps that look at one row alone."""
        return tuple(step for step in self.steps if not isinstance(step, CorpusStep))

    @property
    def models(self) -> tuple[str, ...]:
        """The models that the steps ask, by the names that the configuration gives them, each once."""
        return tuple(dict.fromkeys(step.model for step in self.steps if isinstance(step, ModelStep)))

    @property
    def near_duplicates(self) -> NearDuplicatesStep | None:
        """The step that looks for near-duplicates, if there is one."""
        return next((step for step in self.steps if isinstance(step, NearDuplicatesStep)), None)

    @property
    def quarantine(self) -> float | None:
        """How like a row that is held out another may be at most; None where a step sees to it, or nobody does."""
        return None if self.near_duplicates is not None else self.quarantine_similarity

    @property
    def decontaminate(self) -> DecontaminateStep | None:
        """The step that looks for passages of holdouts, if there is one."""
        return next((step for step in self.steps if isinstance(step, DecontaminateStep)), None)


# ── tokenize ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Tokenize(Section):
    """Corpus to a TokenSet."""

    tokenizer: str = "train"
    """`train` for a byte-level BPE trained on the corpus, or a folder in Hugging Face form. A model with a parent
    keeps its parent's tokenizer, whatever this says. Default: train."""
    vocab_size: int = Field(default=8192, ge=257, le=1_000_000)
    """Entries of a tokenizer that is trained here. Default: 8192."""
    sample_bytes: int = Field(default=200_000_000, ge=1)
    """Text on which a tokenizer is trained, bytes; of a larger corpus a part of the rows. Default: 200,000,000."""
    row_len: int = Field(default=512, ge=8)
    """Length of a packed row, tokens. Default: 512."""
