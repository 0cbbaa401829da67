"""The section `evaluate.guards`: what answers may not hold."""

from __future__ import annotations

from pydantic import Field

from aifactory.config.section import Section


class AnswerGuards(Section):
    """Answers are looked through for personal data, for long passages of rows that trained, and for refusals: those of a candidate
    before the gate, beside those of the release in production, and those that are given by who watches.

    A candidate fails where a share is established to be above what is tolerated, or above that of production. What is given and is
    established to be above it is written down and shown, and changes nothing by itself."""

    answers: int = Field(default=100, ge=10)
    """Questions of the feedback's holdout, or else of the sources', that a candidate answers. Default: 100."""
    max_answer_tokens: int = Field(default=64, ge=1)
    """Length of those answers, tokens. Default: 64."""
    verbatim_tokens: int = Field(default=50, ge=12)
    """So many tokens in a row that stand in one row which trained are a passage of it. Default: 50."""
    personal_share: float = Field(default=0.01, ge=0, le=1)
    """Tolerated: the share of answers with personal data or secrets. Default: 0.01."""
    verbatim_share: float = Field(default=0.02, ge=0, le=1)
    """Tolerated: the share of answers with such passages. Default: 0.02."""
    refusal_share: float = Field(default=0.1, ge=0, le=1)
    """Tolerated: the share of answers that refuse, by phrases of English that are usual for it. Default: 0.1."""

    def tolerated(self, guard: str) -> float:
        return float(getattr(self, f"{guard}_share"))
