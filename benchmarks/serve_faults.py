"""What users of the endpoint see of faults: a constant load of small requests, and one thing after another that is killed.

For each mode (`direct`: a lost replica's answers end with an error that says so; `resilient`: others go on with them) a Ray head of
its own with two replicas of a model of 6 million parameters, whose state is in Ray's embedded store, and an open loop of requests,
half of them streamed, half drawn by a seed, 64 tokens each.

Faults   replica, proxy, controller     one process, SIGKILL
         front                          of resilient
         gcs                            SIGKILL; 10 s later its command is run again, as a supervisor would
         promotion, rollback            under load
         bad_load, bad_parity           a release that can't be loaded, one whose weights are not those of its golden answers
         disconnects                    200 streams whose clients go away after their first text
         head                           everything of the head, SIGKILL; then `ray start` on the same folder
Keys     MODE_FAULT_sent                requests of the window
         MODE_FAULT_failed              of them: those that got no whole answer; the notes say how they failed
         MODE_FAULT_differs             answers that are not what the release that is named in them says
         MODE_FAULT_asked_again         of resilient: requests that another replica took over
         MODE_FAULT_recovery_s          from the fault to the sending of the first request after which none failed; 0 where
                                        none that was sent after the fault failed
         MODE_FAULT_longest_s           the longest whole answer of the window
         hop_noop_ms, hop_token_ms_cC   what resilient takes more than direct, interleaved: a request that does nothing,
                                        one after another; a token of a stream, C streams at once
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import aiohttp
from fault_load import FaultLoad, Seen, body_of, texts_of
from runner import Measured, main
from served_head import ServedHead, until

RATE = 6.0
"""Requests a second."""
_BEFORE_S = 4.0
_AFTER_S = 6.0
_BACK_S = 240.0
_LEAVING = 200
_HOP_ROUNDS = 5
MODES = ("direct", "resilient")


def measure_faults(quick: bool, rounds: int | None) -> Measured:
    """Kill one thing after another, in both modes."""
    raw: dict[str, list[float]] = {}
    notes: list[str] = []
    if not quick:
        _measure_hop(raw, rounds or _HOP_ROUNDS)
    for mode in MODES[:1] if quick else MODES:
        with tempfile.TemporaryDirectory() as folder:
            head = ServedHead(Path(folder) / "head", mode=mode)
            try:
                expected = {head.promote(1): {}}
                _begin(head, expected)
                for name, act in _FAULTS[:1] if quick else _FAULTS:
                    if name != "front" or mode == "resilient":
                        _endure(head, expected, f"{mode}_{name}", act, raw, notes)
            finally:
                head.close()
    return Measured(
        figures={key: round(statistics.median(values), 3) for key, values in raw.items()}, raw=raw, notes=notes
    )


def _begin(head: ServedHead, expected: dict[str, dict[tuple[int, bool], str]]) -> None:
    for name in expected:
        expected[name] = texts_of(head.models[name])
    head.start()
    head.serve()
    assert until(lambda: len(head.pids("replica")) == 2, timeout_s=120)
    time.sleep(5)


def _endure(
    head: ServedHead,
    expected: dict[str, dict[tuple[int, bool], str]],
    name: str,
    act: Callable[[ServedHead, FaultLoad], None],
    raw: dict[str, list[float]],
    notes: list[str],
) -> None:
    """One fault in the middle of a load."""
    asked_before = head.lost_requests()
    load = FaultLoad(head.url, RATE, expected)
    load.start()
    time.sleep(_BEFORE_S)
    fault_at = load.now()
    act(head, load)
    back_s = load.now() - fault_at
    time.sleep(_AFTER_S)
    seen = load.stop()
    failed = [each for each in seen if each.kind not in ("ok", "differs")]
    figures = {
        "sent": len(seen),
        "failed": len(failed),
        "differs": sum(each.kind == "differs" for each in seen),
        "asked_again": head.lost_requests() - asked_before,
        "recovery_s": _recovery_s(seen, fault_at),
        "longest_s": max((each.seconds for each in seen if each.kind == "ok"), default=0.0),
    }
    for key, value in figures.items():
        raw.setdefault(f"{name}_{key}", []).append(round(float(value), 3))
    kinds = Counter((each.kind, "streamed" if each.streamed else "whole") for each in failed)
    how = ", ".join(f"{count} {form} {kind}" for (kind, form), count in sorted(kinds.items())) or "none failed"
    left = f", {load.leaving} went away" if load.leaving else ""
    notes.append(f"{name}: {how}{left}; what was killed was back after {back_s:.1f} s")
    print(notes[-1], figures, flush=True)


def _recovery_s(seen: list[Seen], fault_at: float) -> float:
    after = sorted((each for each in seen if each.sent >= fault_at), key=lambda each: each.sent)
    last = max((index for index, each in enumerate(after) if each.kind not in ("ok", "differs")), default=None)
    if last is None:
        return 0.0
    following = after[last + 1 :]
    return (following[0].sent if following else after[-1].sent) - fault_at


# ── faults: each returns when what it did is done, or when what it killed is there again ─────────────────────────────────────


def _kill(part: str) -> Callable[[ServedHead, FaultLoad], None]:
    def act(head: ServedHead, load: FaultLoad) -> None:
        del load
        before = head.pids(part)
        head.kill(part)
        killed = before[0]
        until(lambda: len(found := head.pids(part)) == len(before) and killed not in found, timeout_s=_BACK_S)
        # A process that is there need not be ready.
        time.sleep(5)

    return act


def _lose_gcs(head: ServedHead, load: FaultLoad) -> None:
    del load
    head.kill("gcs")
    time.sleep(10)
    head.restart_gcs()
    time.sleep(10)


def _promote(head: ServedHead, load: FaultLoad) -> None:
    name = head.promote(2)
    # Before any replica can have loaded it: it is on its way there for half a second.
    load.expected[name] = texts_of(head.models[name])
    _wait_for_swaps(head, name, 2)


def _roll_back(head: ServedHead, load: FaultLoad) -> None:
    del load
    swapped = len(_swaps(head, "faults-r1"))
    _wait_for_swaps(head, head.rollback(), swapped + 2)


def _wait_for_swaps(head: ServedHead, name: str, number: int) -> None:
    until(lambda: len(_swaps(head, name)) >= number, timeout_s=60)


def _swaps(head: ServedHead, name: str) -> list[str]:
    return [name for event in head.books.journal.events(event="swapped") if event.subject == name]


def _promote_bad(damage: Callable[[Path], None]) -> Callable[[ServedHead, FaultLoad], None]:
    def act(head: ServedHead, load: FaultLoad) -> None:
        del load
        name = head.promote(3, damage)
        refused = head.books.journal
        until(lambda: len([e for e in refused.events(event="load_failed") if e.subject == name]) >= 2, timeout_s=60)
        head.rollback()
        time.sleep(2)

    return act


def _cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _change_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-40_000:] = bytes(40_000)
    file.write_bytes(data)


def _disconnect(head: ServedHead, load: FaultLoad) -> None:
    del head
    load.leave(_LEAVING)
    until(lambda: load.leaving >= _LEAVING, timeout_s=60)


def _lose_head(head: ServedHead, load: FaultLoad) -> None:
    head.kill_all()
    head.start()
    if not until(
        lambda: any(each.kind == "ok" and each.sent > load.now() - 3 for each in load.seen[-20:]), timeout_s=_BACK_S
    ):
        print("the head did not serve again by itself", flush=True)


_FAULTS: list[tuple[str, Callable[[ServedHead, FaultLoad], None]]] = [
    ("replica", _kill("replica")),
    ("front", _kill("front")),
    ("proxy", _kill("proxy")),
    ("controller", _kill("controller")),
    ("promotion", _promote),
    ("rollback", _roll_back),
    ("bad_load", _promote_bad(_cut_weights)),
    ("bad_parity", _promote_bad(_change_weights)),
    ("disconnects", _disconnect),
    ("gcs", _lose_gcs),
    ("head", _lose_head),
]


# ── the hop ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _measure_hop(raw: dict[str, list[float]], rounds: int) -> None:
    """Both modes at once, each in its turn."""
    with tempfile.TemporaryDirectory() as folder:
        heads = {mode: ServedHead(Path(folder) / mode, mode=mode, replicas=1) for mode in MODES}
        try:
            for head in heads.values():
                head.promote(1)
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
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:

        async def read(number: int) -> int:
            tokens = 0
            async with client.post(f"{url}/v1/completions", json=body_of(number % 4, True, False)) as response:
                async for line in response.content:
                    tokens += line.startswith(b"data: {")
            return tokens

        async def noop() -> None:
            async with client.get(f"{url}/healthz") as response:
                await response.read()

        await noop()
        began = time.perf_counter()
        if not streams:
            for _ in range(100):
                await noop()
            return (time.perf_counter() - began) / 100
        for _ in range(3):
            await asyncio.gather(*[read(number) for number in range(streams)])
        # By stream, as a reader sees it: all streams of a round go on at once.
        return (time.perf_counter() - began) / 3 / 64


if __name__ == "__main__":
    main("serve_faults", measure_faults)
