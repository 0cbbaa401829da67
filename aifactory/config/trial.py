"""The section `improve.trial`: how a release is tried beside the one in production."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from aifactory.config.section import Section


class ReleaseTrial(Section):
    """How a release that the gate lets pass is tried beside the one in production before it takes its place.

    It is compared with that one over all that comes during the trial, by sequences that hold at every look: how often answers
    fail, how long a token takes, and what both need for the corrections of users, in bits per byte."""

    shadow_share: float = Field(default=0.1, ge=0, le=1)
    """Share of the requests that it first answers a second time, unseen. 0: it is no shadow. Default: 0.1."""
    shares: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.05, 0.25)
    """Then, one after another, the shares that it answers in production's place; they rise. Default: 0.05, 0.25."""
    by: Literal["key", "request"] = "key"
    """Of what: of those who ask, or of requests. Default: key."""
    min_answers: int = Field(default=100, ge=10)
    """Requests of each step that it has been asked before the next one, and of both before times are compared. Default: 100."""
    min_scored: int = Field(default=100, ge=10)
    """Corrections since the trial began, scored under both, before those are compared. Default: 100."""
    wait_for_scores: bool = False
    """Whether it is promoted only when they show that it needs no more than `worse` bits per byte more. Default: false, what
    the gate found stands unless they show the contrary."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Confidence that it is worse in one of the three before it is withdrawn, however often it is looked at. Default: 0.95."""
    fails_more: float = Field(default=0.01, ge=0)
    """Tolerated: by how much more of its answers fail. Default: 0.01."""
    slower: float = Field(default=0.5, ge=0)
    """Tolerated: by what share its tokens take longer, in the geometric mean. Default: 0.5."""
    worse: float = Field(default=0.02, ge=0)
    """Tolerated: how many bits per byte more it needs for corrections. Default: 0.02."""
    longest_s: float = Field(default=86_400.0, gt=0)
    """A step that has not come to its end by then is the last: the release is withdrawn, for no fault, seconds.
    Default: 86,400."""
    cooldown_s: float = Field(default=3_600.0, ge=0)
    """After a release was withdrawn or rolled back for cause, shortest time until the next retrain, seconds. Default: 3,600."""

    @property
    def steps(self) -> tuple[tuple[Literal["shadow", "canary"], float], ...]:
        """All steps in their order: the kind and the share."""
        canaries: list[tuple[Literal["shadow", "canary"], float]] = [("canary", share) for share in self.shares]
        return (("shadow", self.shadow_share), *canaries) if self.shadow_share else tuple(canaries)

    @model_validator(mode="after")
    def _shares_rise(self) -> ReleaseTrial:
        if not self.steps:
            raise ValueError("expected a shadow_share above 0 or shares in improve.trial, found neither; leave it out")
        if list(self.shares) != sorted(set(self.shares)):
            raise ValueError(f"expected shares that rise, found {list(self.shares)}; put them in order")
        return self
