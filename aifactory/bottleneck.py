"""The bottleneck of each stage: what it waited for most, by what was measured, and the option that would help.

Measured values in, a name with its reasons out: no file, no clock, no cluster. What is measured:

    data stages   how long tasks ran, were on a CPU, were ready without one, and waited for their turn (`cluster/tasks.py`)
    training      shares of the time in which steps waited for data and for checkpoints, on a CPU, ready without one
    serving       answers that waited and ran, CPU, engine, cache and refusals, by replica (`serve/metering.py`)

A share below LEAST is nobody's bottleneck: then the stage is bound by what it computes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from aifactory.observe.usage import Usage
from aifactory.records.journal import Event

Resource = Literal["data", "CPU", "GPU", "network", "storage", "queue"]
MEASURED = "measured"
"""In the detail of an event: what was measured, and which `kind` of that it is."""
STAGES = ("ingest", "tokenize", "train", "evaluate")
LEAST = 0.15
_HOUR_S = 3_600.0
_SUMMED = ("seconds", "waiting_s", "running_s", "engine_s", "refused", "requests")
_FULL = 0.9
_BUSY = 0.6


@dataclass(frozen=True, slots=True, kw_only=True)
class TasksMeasured:
    """A stage over data: tasks, and the process that waits for them."""

    stage: str
    seconds: float
    """Wall time of the stage."""
    tasks: int
    at_once: int
    """So many run at once, by configuration."""
    cpus_each: float
    used: Usage
    """Of all tasks together."""
    queued_s: float
    """Between the handing over of a task and its beginning, of all tasks together."""
    is_remote: bool = False
    """Whether sources or storage lie beyond this machine."""
    gpus_each: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingMeasured:
    """A run; shares of its time, of rank 0."""

    seconds: float
    data_wait_share: float
    checkpoint_stall_share: float
    cpu_share: float
    """CPU time over wall time and threads."""
    starved_share: float
    """Time on run queues over wall time and threads."""
    workers: int
    gpus_each: float = 0.0
    is_remote: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingMeasured:
    """Replicas, over some time."""

    seconds: float
    """Of all replicas together."""
    waiting_s: float
    """Seconds that answers waited to be let into the engine, all together."""
    running_s: float
    """Seconds that answers were in it, all together."""
    engine_s: float
    """Seconds in steps of engines."""
    used: Usage
    cpus_each: float
    slots: int
    refused: int = 0
    """Requests that were told that the queue is full."""
    requests: int = 0
    cache_share: float = 0.0
    """The largest share of the cache that was reserved."""
    gpus_each: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bottleneck:
    """What a stage waited for."""

    stage: str
    of: Resource
    share: float
    """Of the stage's time, or of the answers'; from 0 to 1."""
    reasons: Sequence[str]
    options: Sequence[str]
    """What of the configuration would help, the most likely first."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def line(self) -> str:
        """One line for a person."""
        return f"{self.stage} waits for {self.of} ({self.share:.0%}): {'; '.join(self.reasons)}. {self.options[0]}"


@dataclass(frozen=True, slots=True)
class _Wait:
    of: Resource
    share: float
    reason: str
    options: Sequence[str] = field(default_factory=tuple)


_STARVED = (
    "Take away what else runs on its machine, or ask for fewer threads (runtime.cpus_per_worker, endpoint.cpus_per_replica)",
)


def of_tasks(seen: TasksMeasured) -> Bottleneck | None:
    """Of a stage over data; None where no task ran."""
    ran = seen.used.seconds
    if not seen.tasks or ran <= 0 or seen.seconds <= 0:
        return None
    threads = max(1.0, seen.cpus_each)
    on_cpu = min(1.0, seen.used.cpu_s / (ran * threads))
    starved = min(1.0 - on_cpu, seen.used.starved_s / (ran * threads))
    asleep = max(0.0, 1.0 - on_cpu - starved)
    queued = seen.queued_s / (seen.queued_s + ran)
    unused = max(0.0, 1.0 - ran / (seen.seconds * seen.at_once))
    source: Resource = "network" if seen.is_remote else "data"
    waits = [
        _Wait(
            source,
            asleep,
            f"its tasks waited for what they read and write in {asleep:.0%} of their time, and computed in {on_cpu:.0%}",
            (
                "Raise runtime.data_tasks: more tasks wait at once"
                if seen.is_remote
                else "Put sources and runtime.storage on a faster disk, or raise runtime.data_tasks",
            ),
        ),
        _Wait("CPU", starved, f"its tasks were ready and had no CPU in {starved:.0%} of their time", _STARVED),
        _Wait(
            "queue",
            queued,
            f"its {seen.tasks} tasks, {seen.at_once} handed over at once, waited {queued:.0%} of their time for a free CPU",
            ("Add nodes, or lower runtime.cpus_per_worker: what is handed over finds no place in the cluster",),
        ),
        _Wait(
            "data",
            unused if seen.tasks < seen.at_once else 0.0,
            f"{seen.tasks} task(s) for {seen.at_once} at once: there are too few pieces to read",
            ("Split the sources into more files",),
        ),
    ]
    gpu = _Wait("GPU", 1.0 - starved, "its tasks compute on GPUs", ("Add GPUs, and raise runtime.data_tasks",))
    cpu = _Wait(
        "CPU",
        on_cpu,
        f"its tasks computed in {on_cpu:.0%} of their time",
        ("Raise runtime.data_tasks or runtime.cpus_per_worker, with as many CPUs in the cluster",),
    )
    return _worst(seen.stage, waits, gpu if seen.gpus_each else cpu)


def of_training(seen: TrainingMeasured) -> Bottleneck | None:
    """Of a training run; None where no step was taken."""
    if seen.seconds <= 0:
        return None
    rest = max(0.0, 1.0 - seen.data_wait_share - seen.checkpoint_stall_share)
    starved = min(rest, seen.starved_share)
    others = 0.0
    if seen.workers > 1 and not seen.gpus_each and seen.cpu_share + seen.starved_share < _BUSY:
        others = max(0.0, rest - seen.cpu_share - starved)
    waits = [
        _Wait(
            "network" if seen.is_remote else "data",
            seen.data_wait_share,
            f"steps waited for their rows in {seen.data_wait_share:.0%} of the time",
            ("Put runtime.storage, where the token sets lie, on a faster disk",),
        ),
        _Wait(
            "storage",
            seen.checkpoint_stall_share,
            f"steps waited for checkpoints in {seen.checkpoint_stall_share:.0%} of the time",
            ("Raise runtime.checkpoint_every_steps, or put runtime.storage on a faster disk",),
        ),
        _Wait("CPU", starved, f"its threads were ready and had no CPU in {starved:.0%} of the time", _STARVED),
        _Wait(
            "network",
            others,
            f"{seen.workers} workers were neither computing nor ready in {others:.0%} of the time: they wait for one another",
            ("Set runtime.execution.gradients: bf16, or use runtime.parallel: ddp where the model fits",),
        ),
    ]
    if seen.gpus_each:
        return _worst(
            "train",
            waits,
            _Wait("GPU", rest - starved, "steps computed the rest of the time", ("Raise runtime.workers",)),
        )
    computed = min(rest, seen.cpu_share)
    cpu = _Wait(
        "CPU", computed, f"steps computed in {computed:.0%} of the time", ("Raise runtime.workers or cpus_per_worker",)
    )
    return _worst("train", waits, cpu)


def of_serving(seen: ServingMeasured) -> Bottleneck | None:
    """Of the endpoint; None where nobody was answered."""
    there = seen.waiting_s + seen.running_s
    if seen.seconds <= 0 or (not there and not seen.refused):
        return None
    threads = max(1.0, seen.cpus_each)
    waited = seen.waiting_s / there if there else 0.0
    refused = seen.refused / max(1, seen.requests)
    engine = min(1.0, seen.engine_s / seen.seconds)
    starved = min(1.0, seen.used.starved_s / max(1e-9, seen.used.seconds * threads))
    on_cpu = min(1.0, seen.used.cpu_s / max(1e-9, seen.used.seconds * threads))
    full = seen.running_s / seen.seconds / seen.slots
    memory = waited if seen.cache_share >= _FULL and full < _FULL else 0.0
    device: Resource = "GPU" if seen.gpus_each else "CPU"
    replicas = "Raise runtime.endpoint.replicas"
    waits = [
        _Wait(
            "queue",
            refused,
            f"{seen.refused} of {seen.requests} requests found the queue full",
            (f"{replicas}, or runtime.endpoint.max_queued if they may wait longer",),
        ),
        _Wait(
            "queue",
            memory,
            f"{seen.cache_share:.0%} of the cache was reserved, while only {full:.0%} of the slots were taken",
            ("Lower serve.max_answer_tokens: what an answer may come to is reserved", replicas),
        ),
        _Wait(
            "queue",
            0.0 if memory else waited,
            f"answers waited {waited:.0%} of their time to be let in, while {full:.0%} of {seen.slots} slots were taken",
            ("Raise runtime.endpoint.slots: a step is shared by more answers", replicas),
        ),
        _Wait("CPU", starved, f"a replica's threads were ready and had no CPU in {starved:.0%} of the time", _STARVED),
    ]
    faster = (
        "cpus_per_replica, or lower precision (runtime.endpoint.weights)" if device == "CPU" else "weights: bfloat16"
    )
    busy = _Wait(
        device,
        engine,
        f"engines were at work in {engine:.0%} of the time, their CPUs in {on_cpu:.0%}",
        (f"Raise runtime.endpoint.{faster}" if device == "CPU" else replicas, replicas),
    )
    return _worst("serve", waits, busy)


def _worst(stage: str, waits: Sequence[_Wait], busy: _Wait) -> Bottleneck:
    """What was waited for most, if that is worth a word, and all else that is; else what it computes on."""
    found = sorted((wait for wait in waits if wait.share >= LEAST), key=lambda wait: -wait.share)
    first = found[0] if found else busy
    further = [wait for wait in (*found[1:], *([busy] if found and busy.share >= LEAST else [])) if wait is not first]
    return Bottleneck(
        stage=stage,
        of=first.of,
        share=min(1.0, first.share),
        reasons=[first.reason, *(wait.reason for wait in further)],
        options=[*first.options, *(option for wait in further for option in wait.options)],
    )


def of_stages(events: Sequence[Event]) -> list[Bottleneck]:
    """Of each stage of which the books have something, as it was when it last ran; of serving, the last hour in which it was used.

    events   of the journal, in order
    """
    last: dict[str, Mapping[str, Any]] = {}
    served: list[tuple[float, Mapping[str, Any]]] = []
    for event in events:
        measured = event.detail.get(MEASURED)
        if measured is None:
            continue
        if measured["kind"] == "serving":
            if measured["waiting_s"] + measured["running_s"] + measured["refused"]:
                served.append((event.at, measured))
        else:
            last[measured.get("stage", "train")] = measured
    found = [read(last[stage]) for stage in STAGES if stage in last]
    if served:
        newest = served[-1][0]
        found.append(of_serving(_together([measured for at, measured in served if at > newest - _HOUR_S])))
    return [each for each in found if each is not None]


def _together(served: Sequence[Mapping[str, Any]]) -> ServingMeasured:
    """Several replicas, or several times of one, as one."""
    each = [ServingMeasured(**_values(measured)) for measured in served]
    summed = {name: sum(getattr(one, name) for one in each) for name in _SUMMED}
    return replace(
        each[-1],
        **summed,
        used=sum((one.used for one in each), Usage()),
        cache_share=max(one.cache_share for one in each),
    )


def read(measured: Mapping[str, Any]) -> Bottleneck | None:
    """Of what an event of the books has as `measured`; None where that says nothing."""
    values = _values(measured)
    match measured.get("kind"):
        case "tasks":
            return of_tasks(TasksMeasured(**values))
        case "training":
            return of_training(TrainingMeasured(**values))
        case "serving":
            return of_serving(ServingMeasured(**values))
    return None


def _values(measured: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: value for name, value in measured.items() if name != "kind"}
    return values | ({"used": Usage(**values["used"])} if "used" in values else {})
