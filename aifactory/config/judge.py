"""The section `evaluate.judge`: a model elsewhere that says which of two answers is better."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

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
    answer_rubric: str = Field(default="An answer is good if it is right and does what was asked.", min_length=1)
    """What makes an answer good by itself, in words for the judge, where answers that are given are judged (improve.live_judge). It
    bears no identity. Default: being right and doing what was asked."""
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

    def measured_as(self, kind: Literal["pairs", "answers"]) -> str:
        """What names its agreement with people: another version, or other words, is another judge."""
        rubric = self.rubric if kind == "pairs" else self.answer_rubric
        return hashlib.sha256(json.dumps([kind, self.model, self.pinned, rubric]).encode()).hexdigest()

    def recipe(self) -> dict[str, Any]:
        """What bears identity."""
        plain = self.model_dump(
            mode="json", exclude={"url", "api_key", "timeout_s", "concurrency", "labelled", "version", "answer_rubric"}
        )
        labelled = self.read_labelled()
        digest = hashlib.sha256(labelled.encode()).hexdigest() if labelled else None
        return {**plain, "version": self.pinned, "labelled": digest}


class LiveJudge(Section):
    """Some of the answers that are given are judged, each by itself, by the judge of `evaluate.judge`. It is monitoring: it may be a
    reason to retrain, and promotes nothing.

    A judge is used only once its agreement with people was measured (`aifactory judge measure FILE CONFIG`) and is high enough."""

    share: float = Field(default=0.05, gt=0, le=1)
    """Of all answers, by a hash of their ids. Default: 0.05."""
    per_hour: int = Field(default=200, ge=1)
    """Most answers that are judged in an hour; what is given beyond is passed over. Default: 200."""
    tolerated: float = Field(default=0.1, gt=0, lt=1)
    """Tolerated: the share of answers that it finds bad. Default: 0.1."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Confidence that it is more, however often it is looked at, before it is said. Default: 0.95."""
    retrain: bool = True
    """Whether that is a reason to retrain as answers below the standard are, once there is new feedback. Default: true."""
    min_agreement: float = Field(default=0.7, ge=0, le=1)
    """Share of labelled answers on which it must agree with people, by the lower end of the interval. Default: 0.7."""
    min_kappa: float = Field(default=0.2, ge=-1, le=1)
    """And its kappa, likewise: where nearly all answers are good, who says that of all agrees with people by chance. Default: 0.2."""
