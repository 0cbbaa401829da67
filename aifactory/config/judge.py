"""The section `evaluate.judge`: a model elsewhere that says which of two answers is better."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from pydantic import Field

from aifactory.config.section import Section
from aifactory.errors import ConfigError


class Judge(Section):
    """Any endpoint of OpenAI's form (`/chat/completions`), a factory's own release included: of each question it is asked twice,
    with the answers of the candidate and of the release in production in either order.

    What it says is kept with every example. The gate heeds it only where its agreement with people was measured."""

    url: str = Field(pattern=r"^https?://\S+$")
    """The endpoint up to `/v1`. It bears no identity. No default."""
    model: str = Field(min_length=1)
    """What is asked for as `model`; of a factory the name of a release, such as `shop-r3`. No default."""
    version: str | None = Field(default=None, min_length=1)
    """What every answer must say of itself, as its `model` or its `system_fingerprint`, or the scorecard is not made: a judge that
    was changed measures something else. Default: `model`."""
    api_key: str | None = None
    """The key, as `${NAME}` of the environment. It bears no identity. Default: none."""
    rubric: str = Field(
        default="Prefer the answer that is right and does what was asked. Length is no merit.", min_length=1
    )
    """What makes an answer better, in words for the judge. Default: being right and doing what was asked, not length."""
    max_pairs: int = Field(default=100, ge=1)
    """Questions on which it is asked, of the feedback's holdout or else of the sources'. Default: 100."""
    max_answer_tokens: int = Field(default=128, ge=1)
    """Length of the answers that it compares, tokens. Default: 128."""
    labelled: str | None = None
    """A file of JSON lines by people: {"prompt", "first", "second", "preferred"}, the last `first`, `second` or `tie`. Its content bears
    identity. Default: none; then the gate heeds the judge in nothing."""
    min_agreement: float = Field(default=0.6, ge=0, le=1)
    """Share of those on which it must agree with people, by the lower end of the interval, before the gate heeds it. Default: 0.6."""
    margin: float = Field(default=0.1, ge=0, le=2)
    """How far below 0 the interval of its preference may reach, from 1 (the candidate's answers are all better) to -1. Default: 0.1."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Longest wait for one answer of it, seconds; asked three times in vain, it is an error. It bears no identity. Default: 60."""
    concurrency: int = Field(default=4, ge=1)
    """Questions at once. It bears no identity. Default: 4."""

    @property
    def pinned(self) -> str:
        return self.version or self.model

    def read_labelled(self) -> str:
        """The text of the labelled file; "" where there is none. Raises ConfigError if it can't be read."""
        if self.labelled is None:
            return ""
        try:
            return Path(self.labelled).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"expected a text file in evaluate.judge.labelled, found {self.labelled}: {error}; correct the path."
            ) from error

    def recipe(self) -> dict[str, Any]:
        """What bears identity."""
        plain = self.model_dump(
            mode="json", exclude={"url", "api_key", "timeout_s", "concurrency", "labelled", "version"}
        )
        labelled = self.read_labelled()
        digest = hashlib.sha256(labelled.encode()).hexdigest() if labelled else None
        return {**plain, "version": self.pinned, "labelled": digest}
