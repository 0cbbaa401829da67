"""The section `improve.trust`: what keeps a few users from teaching a release what they like."""

from __future__ import annotations

from pydantic import Field

from aifactory.config.section import Section


class Canary(Section):
    """A question whose answer is known: who corrects it to something else is not believed."""

    prompt: str = Field(min_length=1)
    """What is asked; of a chat the last turn. Upper case and white space make no difference. No default."""
    answers: tuple[str, ...] = Field(min_length=1)
    """The answers that are right. No default."""


class FeedbackTrust(Section):
    """Which feedback becomes rows. What is not believed goes to the ledger with its rule, as every rejected row does.

    Whether users agree can be told only where answers repeat (labels, names, short facts) and questions resemble one another;
    free texts are each their own, and there caps and canaries are all that there is. Who names no user is a user of their own in
    every row: only a key limits them."""

    max_user_share: float = Field(default=0.1, gt=0, le=1)
    """Most of a batch's rows that one user gives; what is more is left out, by a hash. Default: 0.1."""
    max_key_share: float = Field(default=1.0, gt=0, le=1)
    """Most of a batch's rows, or of those of a source of feedback, that come by one key; what comes without one is not capped. Where
    all came by one key nothing is left out. Default: 1, since a key is often a whole application."""
    min_rows: int = Field(default=20, ge=1)
    """So many rows everybody may give, however small the batch is. Default: 20."""
    agreement: bool = True
    """Whether the answer of each user is compared with those of others to similar questions, who count by how often they agree
    with others themselves. Rows of users who disagree far more often than is usual go, and so do rows with a phrase with which
    questions are answered otherwise than without it (a backdoor). Default: true."""
    error_rate: float = Field(default=0.01, gt=0, lt=0.5)
    """Chance that anybody, or any phrase, of a batch is taken for such though they err no more than is usual. Default: 0.01."""
    canaries: tuple[Canary, ...] = ()
    """Questions whose answers are known, to be asked by whoever runs the factory's clients. They never train. Default: none."""
