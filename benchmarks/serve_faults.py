"""What users of the endpoint see of faults: steady traffic, and one thing after another that is killed.

For each mode (`direct`: a lost replica's answers end with an error that says so; `resilient`: others go on with them) a Ray head of
its own with two replicas of a model of 6 million parameters, whose state is in Ray's embedded store (RocksDB), and an open loop of
requests, half of them streamed, half drawn by a seed, 96 tokens each; just before the fault twelve at once.

Faults   replica, proxy, controller     one process, SIGKILL
         front                          of resilient, the same
         gcs                            SIGKILL; 5 s later its command is run again, as a supervisor would
         head                           all processes of the head, SIGKILL; then `ray start` on the same folder
         promotion, rollback            of a release that is well
         bad_load, bad_parity           a release whose weights are cut off, one whose weights are not those of its golden answers
         disconnects                    200 streams whose clients go away
Keys     MODE_FAULT_sent                requests, from 3 s before the fault to 3 s after its end
         MODE_FAULT_open                of them: those that were under way at the fault
         MODE_FAULT_failed              of them: those that got no whole answer
         MODE_FAULT_failed: KIND        of those: by what the client saw, as `fault_load.py` names it
         MODE_FAULT_differs             answers, and beginnings of those that failed, that are not what an endpoint that nobody
                                        disturbs answers by the release that is named in them
         MODE_FAULT_asked_again         of resilient: requests that had sent no token and were answered by another replica
         MODE_FAULT_continued           of resilient: streams that another replica went on with
         MODE_FAULT_good_s              from the fault to the end of the first whole answer to a request that was sent after it,
                                        and after the last that failed
         MODE_FAULT_last_failed_s       from the fault to the sending of the last request that failed; 0 where none that was
                                        sent after it did
         MODE_FAULT_whole_s             from the fault until all is as it was: what was killed runs and Serve calls all well; all
                                        replicas have swapped, or refused; no more is waiting
         MODE_FAULT_longest_s           the longest whole answer
         MODE_FAULT_held                what requests still held of gateways, queues, slots and caches when the last had ended
         hop_noop_ms, hop_token_ms_cC   what resilient takes more than direct, interleaved: a request that does nothing,
                                        one after another; a token of a stream, C streams at once
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from fault_load import MAX_TOKENS, MODEL, FaultLoad, Seen, Texts, request_of, texts_of
from http_load import Connection, Target
from runner import Measured, main
from served_head import ServedHead, until

RATE = 4.0
"""Requests a second."""
MODES = ("direct", "resilient")
_MORE = 12
_BEFORE_S = 3.0
_AFTER_S = 3.0
_GCS_AWAY_S = 5.0
_LONGEST_S = 180.0
"""Until all is as it was; then the run goes on without it."""
_SETTLE_S = 30.0
_LEAVING = 200
_HOP_ROUNDS = 5
_QUICK = ("replica", "promotion", "disconnects")


class Stage:
    """A head with its releases, of which it is known what they answer."""

    def __init__(self, head: ServedHead) -> None:
        self.head = head
        self.notes: list[str] = []
        self._well = [head.export(seed) for seed in (1, 2)]
        self._texts: dict[str, Texts] = {}
        self.new = [texts_of(folder) for folder in self._well]

    @property
    def texts(self) -> Mapping[str, Texts]:
        """By the names of the releases that may answer."""
        return self._texts

    def promote_well(self, number: int) -> str:
        """Put a good release into production."""
        name = self.head.promote(self._well[number])
        self._texts[name] = self.new[number]
        return name

    def refused(self, name: str) -> list[str]:
        """Why replicas have refused a release, as the journal says."""
        events = self.head.books.journal.events(event="load_failed")
        return [str(event.detail["reason"]) for event in events if event.subject == name]

    def swaps(self, name: str) -> int:
        """How many replicas have swapped to a release so far."""
        return sum(event.subject == name for event in self.head.books.journal.events(event="swapped"))


Act = Callable[[Stage, FaultLoad], Callable[[], bool]]
"""Does something; returns what says whether all is as it was."""


def measure_faults(quick: bool, rounds: int | None) -> Measured:
    """Kill one thing after another, in both modes."""
    raw: dict[str, list[float]] = {}
    notes: list[str] = []
    for mode in MODES[1:] if quick else MODES:
        with tempfile.TemporaryDirectory() as folder, closing(ServedHead(Path(folder) / "head", mode=mode)) as head:
            stage = Stage(head)
            stage.promote_well(0)
            head.start()
            head.serve()
            assert until(head.is_whole, timeout_s=_LONGEST_S), "the endpoint did not come up whole"
            for name, act in _FAULTS.items():
                if (name != "front" or mode == "resilient") and (name in _QUICK or not quick):
                    found = _endure(stage, act)
                    raw |= {f"{mode}_{name}_{key}": [round(float(value), 3)] for key, value in found.items()}
                    notes += [f"{mode}_{name}: {note}" for note in stage.notes]
                    stage.notes.clear()
                    print(mode, name, found, flush=True)
    if not quick:
        _measure_hop(raw, rounds or _HOP_ROUNDS)
    figures = {key: round(statistics.median(values), 3) for key, values in raw.items()}
    print(*table(figures), sep="\n", flush=True)
    return Measured(figures=figures, raw=raw, notes=notes)


def _endure(stage: Stage, act: Act) -> dict[str, float]:
    """One fault in the middle of steady traffic."""
    head = stage.head
    before = head.taken_over()
    load = FaultLoad(head.url, RATE)
    load.start()
    time.sleep(_BEFORE_S)
    # So that what is lost has something to lose.
    load.send_more(_MORE)
    until(lambda: load.num_open >= _MORE, timeout_s=1 / RATE)
    num_open, fault_at = load.num_open, load.now()
    is_over = act(stage, load)
    in_time = until(is_over, timeout_s=_LONGEST_S)
    whole_s = load.now() - fault_at
    if not in_time:
        stage.notes.append(f"not as it was within {_LONGEST_S:g} s")
    time.sleep(_AFTER_S)
    seen = load.stop()
    taken_over = [told for request, told in head.taken_over().items() if request not in before]
    if not until(lambda: _num_held(head) == 0, timeout_s=_SETTLE_S):
        stage.notes.append(f"held when the last had ended: {head.held()}")
    held = _num_held(head)
    return figures_of(seen, fault_at, stage.texts) | {
        "open": num_open,
        "asked_again": sum(told == 0 for told in taken_over),
        "continued": sum(told > 0 for told in taken_over),
        "whole_s": whole_s,
        **({} if held is None else {"held": held}),
    }


def _num_held(head: ServedHead) -> int | None:
    held = head.held()
    return None if held is None else sum(sum(each.values()) for each in held)


def figures_of(seen: Sequence[Seen], fault_at: float, texts: Mapping[str, Texts]) -> dict[str, float]:
    """What clients saw of a fault at a moment."""
    kinds = Counter(one.failed for one in seen if one.failed is not None)
    after = [one for one in seen if one.sent >= fault_at]
    last_failed = max((one.sent - fault_at for one in after if one.failed is not None), default=0.0)
    good = [one.ended - fault_at for one in after if one.failed is None and one.sent - fault_at >= last_failed]
    return {
        "sent": len(seen),
        "failed": sum(kinds.values()),
        **{f"failed: {kind}": number for kind, number in sorted(kinds.items())},
        "differs": sum(not one.is_as(texts) for one in seen),
        **({"good_s": min(good)} if good else {}),
        "last_failed_s": last_failed,
        "longest_s": max((one.ended - one.sent for one in seen if one.failed is None), default=0.0),
    }


# ── the table ─────────────────────────────────────────────────────────────────────────────────────────────────────────

_SAID = {
    "replica": "SIGKILL of a replica",
    "front": "of a front",
    "proxy": "of the only proxy",
    "controller": "of Serve's controller",
    "gcs": f"of the GCS, back after {_GCS_AWAY_S:g} s",
    "head": "of the whole head, `ray start` after it",
    "promotion": "promotion",
    "rollback": "rollback",
    "bad_load": "release that does not load",
    "bad_parity": "release that fails parity",
    "disconnects": f"{_LEAVING} clients that go away",
}


def table(figures: Mapping[str, float | None]) -> list[str]:
    """The figures in Markdown, a line for each fault."""
    rows = [
        ["under load", *(f"{mode}: {what}" for mode in MODES for what in ("failed", "first good, all back")), "differ"]
    ]
    rows.append(["---"] * len(rows[0]))
    for fault, said in _SAID.items():
        row, differ = [said], 0.0
        for mode in MODES:
            of = {
                key.removeprefix(f"{mode}_{fault}_"): value or 0.0
                for key, value in figures.items()
                if key.startswith(f"{mode}_{fault}_")
            }
            row += [_failed(of), _times(of)] if of else ["-", "-"]
            differ += of.get("differs", 0.0)
        if len(set(row)) > 2:
            rows.append([*row, f"{differ:g}"])
    return ["| " + " | ".join(row) + " |" for row in rows]


def _failed(of: Mapping[str, float]) -> str:
    kinds = [f"{number:g} × {key.removeprefix('failed: ')}" for key, number in of.items() if key.startswith("failed: ")]
    said = f"{of['failed']:g} of {of['sent']:g}" + (f" ({', '.join(kinds)})" if kinds else "")
    taken = [
        f"{of[key]:g} {word}" for key, word in (("asked_again", "asked again"), ("continued", "continued")) if of[key]
    ]
    return "; ".join([said, *taken])


def _times(of: Mapping[str, float]) -> str:
    return f"{of['good_s']:.1f} s, {of['whole_s']:.1f} s" if "good_s" in of else f"none, {of['whole_s']:.1f} s"


# ── faults ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _kill(part: str) -> Act:
    def act(stage: Stage, load: FaultLoad) -> Callable[[], bool]:
        del load
        head = stage.head
        number, killed = len(head.pids(part)), head.kill(part)

        def is_over() -> bool:
            # Serve sees only some time after that a process has gone.
            found = head.pids(part)
            return killed not in found and len(found) == number and head.is_whole()

        return is_over

    return act


def _lose_gcs(stage: Stage, load: FaultLoad) -> Callable[[], bool]:
    del load
    stage.head.kill("gcs")
    time.sleep(_GCS_AWAY_S)
    stage.head.restart_gcs()
    return stage.head.is_whole


def _lose_head(stage: Stage, load: FaultLoad) -> Callable[[], bool]:
    del load
    stage.head.kill_all()
    stage.head.start()
    return stage.head.is_whole


def _promote(stage: Stage, load: FaultLoad) -> Callable[[], bool]:
    del load
    name = stage.promote_well(1)
    return lambda: stage.swaps(name) >= 2


def _roll_back(stage: Stage, load: FaultLoad) -> Callable[[], bool]:
    del load
    before = {name: stage.swaps(name) for name in stage.texts}
    name = stage.head.rollback()
    return lambda: stage.swaps(name) >= before[name] + 2


def _promote_bad(seed: int, damage: Callable[[Path], None]) -> Act:
    def act(stage: Stage, load: FaultLoad) -> Callable[[], bool]:
        del load
        folder = stage.head.export(seed)
        damage(folder)
        name = stage.head.promote(folder)

        def is_over() -> bool:
            reasons = stage.refused(name)
            if len(reasons) < 2:
                return False
            stage.notes.append(f"the journal says: {reasons[0].replace(str(stage.head.folder), 'HEAD')}")
            stage.head.rollback()
            return True

        return is_over

    return act


def _cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _change_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-40_000:] = bytes(40_000)
    file.write_bytes(data)


def _disconnect(stage: Stage, load: FaultLoad) -> Callable[[], bool]:
    load.leave(_LEAVING)

    def is_over() -> bool:
        held = stage.head.held() if load.num_left == _LEAVING else None
        return held is not None and not any(each.get("waiting") for each in held)

    return is_over


_FAULTS: dict[str, Act] = {
    "replica": _kill("replica"),
    "front": _kill("front"),
    "proxy": _kill("proxy"),
    "controller": _kill("controller"),
    "promotion": _promote,
    "rollback": _roll_back,
    "bad_load": _promote_bad(3, _cut_weights),
    "bad_parity": _promote_bad(4, _change_weights),
    "disconnects": _disconnect,
    "gcs": _lose_gcs,
    "head": _lose_head,
}


# ── the hop ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _measure_hop(raw: dict[str, list[float]], rounds: int) -> None:
    """Both modes at once, each in its turn."""
    with tempfile.TemporaryDirectory() as folder:
        heads = {mode: ServedHead(Path(folder) / mode, mode=mode, replicas=1) for mode in MODES}
        try:
            for head in heads.values():
                head.promote(head.export(1))
                head.start()
                head.serve()
            for _ in range(rounds):
                for streams in (0, 1, 8):
                    taken = {mode: asyncio.run(_ask(head.url, streams)) for mode, head in heads.items()}
                    key = f"hop_token_ms_c{streams}" if streams else "hop_noop_ms"
                    raw.setdefault(key, []).append(1e3 * (taken["resilient"] - taken["direct"]))
                    for mode, seconds in taken.items():
                        raw.setdefault(f"{key.removeprefix('hop_')}_{mode}", []).append(1e3 * seconds)
        finally:
            for head in heads.values():
                head.close()


async def _ask(url: str, streams: int) -> float:
    """Seconds of a request that does nothing, in the mean; or of a token, with so many streams at once."""
    target = Target(url=url, model=MODEL)
    connections = [await Connection.open(target) for _ in range(max(1, streams))]

    async def read(connection: Connection, number: int) -> None:
        async for _ in connection.events(request_of(target, number % 4, True, False)):
            pass

    try:
        began = time.perf_counter()
        if not streams:
            for _ in range(100):
                await connections[0].ask(target.request("GET", "/healthz"))
            return (time.perf_counter() - began) / 100
        for _ in range(3):
            await asyncio.gather(*[read(connection, number) for number, connection in enumerate(connections)])
        # By stream, as a reader sees it: all streams of a round go on at once.
        return (time.perf_counter() - began) / 3 / MAX_TOKENS
    finally:
        for connection in connections:
            connection.close()


if __name__ == "__main__":
    main("serve_faults", measure_faults)
