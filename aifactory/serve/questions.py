"""Questions: requests on their way through the engine, with all that is known of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from aifactory.engine.protocol import GenerationRequest, Pooling, Sampling
from aifactory.observe.tracing import Parent
from aifactory.records.journal import ANONYMOUS
from aifactory.serve.adapters import ServedAdapter
from aifactory.serve.limiting import Grant
from aifactory.serve.progress import Progress, begun_with
from aifactory.serve.releases import Served
from aifactory.serve.trials import Watch


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt of a question."""

    text: str
    """As the model sees it."""
    ids: tuple[int, ...]
    messages: str = ""
    """Of a chat the turns, JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A request on its way through the engine."""

    id: str
    created: int
    served: Served
    prompts: Sequence[Prompt]
    sampling: Sampling
    user: str | None
    chat: bool
    include_usage: bool = False
    pooling: Pooling | None = None
    """Not None: the prompts' embeddings are wanted, and no answers."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """What the request calls the fields that the engine may find wrong."""
    tools: Sequence[Mapping[str, Any]] = ()
    who: tuple[str, str] = ("", "")
    """The key and the user that it is admitted for."""
    key_id: str = ANONYMOUS
    """The key by which it was asked."""
    timeout_s: float | None = None
    """Longest time from here to its last token, seconds."""
    behind: bool = False
    """Whether it is work in the background, which waits for all others."""
    adapter: ServedAdapter | None = None
    """Beside the release; None: the release as it is."""
    progress: Progress | None = None
    """How far another replica has come with it; None: nobody could go on with it but this one."""
    watch: Watch | None = None
    """What a trial wants to know of it; None where none is on."""
    trace: Parent = None
    """The span of its request, for those within it; None where it is not traced."""
    grant: Grant | None = None
    """What it was let in with; None for a copy, which nobody asked for."""
    team: str | None = None
    """Of the key."""

    @property
    def owner(self) -> str:
        """Who may be given what was answered to it."""
        return f"key {self.key_id}" if self.team is None else f"team {self.team}"

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts."""
        return sum(len(prompt.ids) for prompt in self.prompts)

    @property
    def num_choices(self) -> int:
        """Answers to all prompts."""
        return len(self.prompts) * self.sampling.n

    def answer_id(self, index: int) -> str:
        """The id under which a choice is kept: the question's own where it has one choice only."""
        return self.id if self.num_choices == 1 else f"{self.id}-{index}"

    def head(self, *, chunk: bool = False) -> dict[str, Any]:
        """What the body and every event begin with."""
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    @property
    def fingerprint(self) -> str:
        """Of who answers."""
        return (self.adapter or self.served.release).fingerprint

    def request_of(self, number: int, trace: Parent = None) -> GenerationRequest:
        """What the engine is asked for a prompt."""
        sampling, begun = self.sampling, tuple[tuple[int, ...], ...]()
        if self.progress is not None:
            if sampling.seed is None:
                # Prompts that are alike are not answered alike, unless that is asked for.
                sampling = replace(sampling, seed=(self.progress.seed + number) % 2**63)
            begun = begun_with(self.progress.told, range(number * sampling.n, (number + 1) * sampling.n))
        return GenerationRequest(
            id=self.id if len(self.prompts) == 1 else f"{self.id}.{number}",
            prompt_ids=self.prompts[number].ids,
            sampling=sampling,
            pooling=self.pooling,
            adapter=None if self.adapter is None else self.adapter.name,
            begun=begun,
            trace=trace,
        )

    @property
    def model(self) -> str:
        """Who answers, by name."""
        return self.served.release.name if self.adapter is None else self.adapter.model
