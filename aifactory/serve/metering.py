"""Metering: the joules of a replica, and whose answers it gave meanwhile. Plain asyncio: it knows no Ray.

Every `meter_s` seconds, and at its end, a replica enters into the journal

    metered   seconds, joules, their source; detail {replica, node, begun, ended, busy_s, answers: [{release, key,
              requests, prompt_tokens, answer_tokens}], measured: what answers waited for (`bottleneck.ServingMeasured`)}

busy_s is how long somebody was being answered: the rest of the time it idled. What a replica that is killed used since it last
told is on no books.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

from aifactory.config import Site
from aifactory.observe.energy import Meter, count_joules
from aifactory.observe.events import log_event
from aifactory.records.feedback import Completion
from aifactory.records.journal import Journal
from aifactory.serve.answer_meter import Load

EVENT = "metered"
_LOOK_S = 0.05
"""How often it is looked whether anybody is being answered: of many short requests the share comes out right, of one alone not."""


@dataclass(slots=True)
class _Given:
    requests: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0

    def add(self, more: _Given) -> None:
        self.requests += more.requests
        self.prompt_tokens += more.prompt_tokens
        self.answer_tokens += more.answer_tokens


class ServingMeter:
    """What one replica uses."""

    def __init__(
        self,
        journal: Journal,
        meter: Callable[[], Meter],
        *,
        replica: str,
        every_s: float,
        is_busy: Callable[[], bool],
        prompt_token_share: float = 0.25,
        charge: Callable[[Mapping[str, float]], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        site: Site | None = None,
        load: Load | None = None,
    ) -> None:
        """`meter` makes one that counts from then on; `is_busy`: whether anybody is being answered.

        charge   called with the joules of answers, by the id of the key that asked, after they were entered; shared out by tokens,
                 of which a prompt's counts `prompt_token_share` of an answer's
        site     what joules cost
        load     what answers wait for
        """
        self._journal = journal
        self._new_meter = meter
        self._replica = replica
        self._every_s = every_s
        self._is_busy = is_busy
        self._prompt_token_share = prompt_token_share
        self._charge = charge
        self._clock = clock
        self._site = site or Site()
        self._load = load
        self._lock = threading.Lock()
        self._given: dict[tuple[int, str], _Given] = {}
        self._busy_s = 0.0
        self._begun_at = journal.clock()
        self._begun_on = self._looked_at = clock()
        self._meter = meter()

    def count(self, answers: Iterable[Completion]) -> None:
        """Answers that were given and kept."""
        with self._lock:
            for answer in answers:
                given = self._given.setdefault((answer.release, answer.key_id or self._journal.key_id), _Given())
                given.add(_Given(1, answer.prompt_tokens, answer.answer_tokens))

    async def run(self) -> None:
        """Look and tell, for ever."""
        self._looked_at = self._clock()  # nobody was answered before
        while True:
            await asyncio.sleep(_LOOK_S)
            self.look()
            if self._looked_at - self._begun_on >= self._every_s:
                try:
                    await asyncio.to_thread(self.tell)
                except Exception as error:  # a database that is away for a while
                    log_event("metered", error=f"{type(error).__name__}: {error}")
                    self._begun_on = self._clock()

    def look(self) -> None:
        """Whether somebody is being answered now counts for the time since it was last looked."""
        now = self._clock()
        if self._is_busy():
            self._busy_s += now - self._looked_at
        if self._load is not None:
            self._load.look(now - self._looked_at)
        self._looked_at = now

    def tell(self) -> None:
        """Enter what was used since it was last told. Where that fails it is told with the next."""
        self.look()
        with self._lock:
            given, self._given = self._given, {}
        meter, self._meter = self._meter, self._new_meter()
        energy, ended = meter.read(), self._journal.clock()
        begun, busy_s = self._begun_at, self._busy_s
        detail = {
            "replica": self._replica,
            "node": socket.gethostname(),
            "begun": begun,
            "ended": ended,
            "busy_s": min(busy_s, energy.seconds),
            "answers": [
                {"release": release, "key": key, **asdict(each)} for (release, key), each in sorted(given.items())
            ],
            **({} if self._load is None else {"measured": self._load.take()}),
        }
        try:
            self._journal.write(
                EVENT, detail=detail, seconds=energy.seconds, joules=energy.joules, joules_source=energy.source
            )
        except BaseException:
            self._meter = meter  # it goes on counting from where it began
            with self._lock:
                for who, each in given.items():
                    self._given.setdefault(who, _Given()).add(each)
            raise
        busy_share = min(1.0, busy_s / energy.seconds) if energy.seconds else 0.0
        count_joules(energy, self._site, stage="serve", busy_share=busy_share)
        self._begun_at, self._busy_s, self._begun_on = ended, 0.0, self._clock()
        busy_j = energy.joules * min(1.0, busy_s / energy.seconds) if energy.seconds else 0.0
        if shares := self._by_key(given, busy_j):
            self._charge(shares)

    def _by_key(self, given: Mapping[tuple[int, str], _Given], joules: float) -> dict[str, float]:
        """What was used while somebody was answered, as the energy ledger shares it out."""
        found: dict[str, float] = {}
        weights = {
            who: each.answer_tokens + self._prompt_token_share * each.prompt_tokens for who, each in given.items()
        }
        whole = sum(weights.values())
        for (_, key), weight in weights.items():
            if whole:
                found[key] = found.get(key, 0.0) + joules * weight / whole
        return found
