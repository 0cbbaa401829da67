"""Answer cache: what was answered to a request that is always answered alike, as long as the same model answers it.

What is kept   whole answers to requests that draw nothing (temperature 0) or draw by a seed; streams are not
Under what     all that decides about the answer: release, adapter, prompts as token ids, sampling, the form of the body. So a release
               that is swapped in finds nothing of the one before
For whom       the key, or its team: nobody can find out from how quick an answer comes what others have asked
How much       the bytes that it may hold, the least lately used go first; and none for longer than its age
An answer from here has an id of its own and is kept in the log as any other, so that feedback on it is about what was seen.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from aifactory.records.feedback import Completion
from aifactory.records.identity import hash_parts

if TYPE_CHECKING:
    from aifactory.serve.questions import Question


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """An answer, without what is of one request alone."""

    body: Mapping[str, Any]
    completions: Sequence[Completion]
    num_bytes: int
    at: float


class AnswerCache:
    """The answers that one replica remembers. One event loop calls all of it."""

    def __init__(self, *, max_bytes: int, max_age_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """With 0 bytes nothing is remembered."""
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._clock = clock
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self.num_bytes = 0
        """What all answers here take."""

    def name(self, question: Question) -> str | None:
        """Under what the answer to a question is kept; None where it is not."""
        sampling = question.sampling
        if not self._max_bytes or question.behind or (sampling.temperature and sampling.seed is None):
            return None
        asked = {
            "chat": question.chat,
            "sampling": asdict(sampling),
            "tools": question.tools,
            "texts": [prompt.text for prompt in question.prompts],
            "ids": [prompt.ids for prompt in question.prompts],
        }
        release = question.served.release
        return hash_parts(question.owner, str(release.number), question.fingerprint, json.dumps(asked, sort_keys=True))

    def find(self, name: str) -> Kept | None:
        """What is kept under it."""
        kept = self._kept.get(name)
        if kept is None:
            return None
        if self._clock() - kept.at > self._max_age_s:
            self._drop(name)
            return None
        self._kept.move_to_end(name)
        return kept

    def keep(self, name: str, body: Mapping[str, Any], completions: Sequence[Completion]) -> None:
        """Remember an answer, and forget others where there is no room."""
        size = len(json.dumps(body)) + sum(len(json.dumps(asdict(each))) for each in completions)
        self._drop(name)
        if size > self._max_bytes:
            return
        while self.num_bytes + size > self._max_bytes:
            self._drop(next(iter(self._kept)))
        self._kept[name] = Kept(body=body, completions=completions, num_bytes=size, at=self._clock())
        self.num_bytes += size

    def _drop(self, name: str) -> None:
        kept = self._kept.pop(name, None)
        if kept is not None:
            self.num_bytes -= kept.num_bytes
