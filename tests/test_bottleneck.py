"""Planted bottlenecks are named: each is a real one that is measured here, and each has a control in which it is not."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from aifactory.bottleneck import (
    ServingMeasured,
    TasksMeasured,
    TrainingMeasured,
    of_serving,
    of_stages,
    of_tasks,
    of_training,
    read,
)
from aifactory.cluster.tasks import Spent, ledger, run_here
from aifactory.observe.usage import Usage, usage
from aifactory.records.journal import Event


def read_slowly(path: str) -> int:
    """What comes out of a pipe into which somebody writes a little at a time."""
    return len(Path(path).read_bytes())


def compute(seconds: float) -> int:
    end, turns = time.process_time() + seconds, 0
    while time.process_time() < end:
        turns += 1
    return turns


def measured(function, items, *, stage="ingest", **values) -> TasksMeasured:
    before, began = ledger.spent, time.perf_counter()
    run_here(function, items)
    spent = ledger.spent - before
    told = {"stage": stage, "at_once": 1, "cpus_each": 1.0, **values}
    return TasksMeasured(
        seconds=time.perf_counter() - began, tasks=spent.tasks, used=spent.used, queued_s=spent.queued_s, **told
    )


def test_a_slow_source_is_named(tmp_path: Path) -> None:
    pipe = tmp_path / "source"
    os.mkfifo(pipe)

    def write() -> None:
        with pipe.open("wb") as end:
            for _ in range(10):
                end.write(b"row\n")
                end.flush()
                time.sleep(0.05)

    writer = threading.Thread(target=write)
    writer.start()
    seen = measured(read_slowly, [(str(pipe),)])
    writer.join()

    found = of_tasks(seen)
    assert found is not None and found.of == "data" and found.share > 0.5
    assert "runtime.data_tasks" in found.options[0]
    remote = of_tasks(replace(seen, is_remote=True))
    assert remote is not None and remote.of == "network"


def test_a_stage_that_computes_is_bound_by_the_cpu() -> None:
    found = of_tasks(measured(compute, [(0.4,)]))
    # Whether it has one, or waits for one beside other tests.
    assert found is not None and found.of == "CPU"


_STARVED = """
import json, os, time
from dataclasses import asdict
from aifactory.observe.usage import usage
os.sched_setaffinity(0, {%d})
before, end = usage(), time.perf_counter() + 1.5
while time.perf_counter() < end:
    pass
print(json.dumps(asdict(usage() - before)))
"""


def spin(number: int, cpu: int) -> list[Usage]:
    """What processes have measured that all want the same CPU."""
    import json

    started = [
        subprocess.Popen([sys.executable, "-c", _STARVED % cpu], stdout=subprocess.PIPE, text=True)
        for _ in range(number)
    ]
    return [Usage(**json.loads(process.communicate(timeout=60)[0])) for process in started]


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="Linux' schedstat tells who waits for a CPU")
def test_a_worker_that_gets_no_cpu_is_named() -> None:
    cpu = min(os.sched_getaffinity(0))
    used = max(spin(4, cpu), key=lambda each: each.starved_s)
    assert used.starved_s > 0.5 * used.seconds

    training = TrainingMeasured(
        seconds=used.seconds,
        data_wait_share=0.0,
        checkpoint_stall_share=0.0,
        cpu_share=used.cpu_s / used.seconds,
        starved_share=used.starved_s / used.seconds,
        workers=1,
    )
    found = of_training(training)
    assert found is not None and found.of == "CPU" and "had no CPU" in found.reasons[0]
    assert "what else runs" in found.options[0]
    left_alone = of_training(replace(training, cpu_share=0.99, starved_share=0.0))
    assert left_alone is not None and left_alone.of == "CPU" and "had no CPU" not in " ".join(left_alone.reasons)


TRAINING = TrainingMeasured(
    seconds=100.0, data_wait_share=0.02, checkpoint_stall_share=0.03, cpu_share=0.9, starved_share=0.02, workers=1
)


@pytest.mark.parametrize(
    ("values", "of", "option"),
    [
        ({}, "CPU", "runtime.workers"),
        ({"data_wait_share": 0.4}, "data", "faster disk"),
        ({"data_wait_share": 0.4, "is_remote": True}, "network", "faster disk"),
        ({"checkpoint_stall_share": 0.3}, "storage", "checkpoint_every_steps"),
        ({"checkpoint_stall_share": 0.3, "data_wait_share": 0.4}, "data", "faster disk"),
        ({"starved_share": 0.5, "cpu_share": 0.4}, "CPU", "what else runs"),
        ({"workers": 2, "cpu_share": 0.3}, "network", "gradients: bf16"),
        ({"workers": 1, "cpu_share": 0.3}, "CPU", "runtime.workers"),
        ({"gpus_each": 1.0, "cpu_share": 0.1}, "GPU", "runtime.workers"),
        ({"gpus_each": 1.0, "cpu_share": 0.1, "data_wait_share": 0.5}, "data", "faster disk"),
    ],
)
def test_what_a_training_run_waits_for_most_is_named_with_an_option_that_helps(values, of, option) -> None:
    found = of_training(replace(TRAINING, **values))
    assert found is not None and (found.of, option in found.options[0]) == (of, True), found


TASKS = TasksMeasured(
    stage="tokenize",
    seconds=10.0,
    tasks=8,
    at_once=2,
    cpus_each=1.0,
    used=Usage(seconds=19.0, cpu_s=18.0, starved_s=0.2),
    queued_s=1.0,
)


@pytest.mark.parametrize(
    ("values", "of", "option"),
    [
        ({}, "CPU", "runtime.data_tasks"),
        ({"queued_s": 60.0}, "queue", "Add nodes"),
        ({"used": Usage(seconds=19.0, cpu_s=8.0, starved_s=10.0)}, "CPU", "what else runs"),
        ({"used": Usage(seconds=19.0, cpu_s=4.0)}, "data", "faster disk"),
        ({"tasks": 1, "used": Usage(seconds=10.0, cpu_s=9.8)}, "data", "more files"),
        ({"gpus_each": 1.0, "used": Usage(seconds=19.0, cpu_s=17.0)}, "GPU", "Add GPUs"),
    ],
)
def test_what_tasks_wait_for_most_is_named_with_an_option_that_helps(values, of, option) -> None:
    found = of_tasks(replace(TASKS, **values))
    assert found is not None and (found.of, option in found.options[0]) == (of, True), found


SERVING = ServingMeasured(
    seconds=60.0,
    waiting_s=1.0,
    running_s=200.0,
    engine_s=50.0,
    used=Usage(seconds=60.0, cpu_s=50.0, starved_s=1.0),
    cpus_each=1.0,
    slots=16,
    requests=300,
)


@pytest.mark.parametrize(
    ("values", "of", "option"),
    [
        ({}, "CPU", "cpus_per_replica"),
        ({"waiting_s": 900.0, "running_s": 900.0}, "queue", "runtime.endpoint.slots"),
        ({"waiting_s": 900.0, "running_s": 200.0, "cache_share": 0.99}, "queue", "max_answer_tokens"),
        ({"refused": 100}, "queue", "max_queued"),
        ({"used": Usage(seconds=60.0, cpu_s=15.0, starved_s=40.0)}, "CPU", "what else runs"),
        ({"gpus_each": 1.0}, "GPU", "replicas"),
    ],
)
def test_what_answers_wait_for_most_is_named_with_an_option_that_helps(values, of, option) -> None:
    found = of_serving(replace(SERVING, **values))
    assert found is not None and (found.of, option in found.options[0]) == (of, True), found


def test_where_nothing_was_measured_nothing_is_named() -> None:
    assert of_tasks(replace(TASKS, tasks=0)) is None
    assert of_training(replace(TRAINING, seconds=0.0)) is None
    assert of_serving(replace(SERVING, waiting_s=0.0, running_s=0.0)) is None
    assert read({"kind": "something else"}) is None
    assert of_stages([]) == of_stages([event("cycle_begun")]) == []


def test_all_that_is_worth_a_word_is_said_the_worst_first() -> None:
    found = of_training(replace(TRAINING, checkpoint_stall_share=0.2, data_wait_share=0.4, cpu_share=0.3))
    assert found is not None
    assert [reason.split(" in ")[0] for reason in found.reasons] == [
        "steps waited for their rows",
        "steps waited for checkpoints",
        "steps computed",
    ]
    assert found.line.startswith("train waits for data (40%): steps waited for their rows in 40% of the time;")


def event(name: str, *, at: float = 0.0, **detail: object) -> Event:
    left_out = dict.fromkeys(("trigger", "attempt", "subject", "seconds", "joules", "joules_source"))
    return Event(seq=0, at=at, event=name, detail=detail, key_id="anonymous", **left_out)  # type: ignore[arg-type]


def test_what_the_books_have_is_named_by_stage_as_it_was_when_it_last_ran() -> None:
    tokenized = {"kind": "tasks", **asdict(TASKS)}
    slow = {"kind": "tasks", **asdict(replace(TASKS, used=Usage(seconds=19.0, cpu_s=2.0)))}
    trained = {"kind": "training", **asdict(TRAINING)}
    idle = {"kind": "serving", **asdict(replace(SERVING, waiting_s=0.0, running_s=0.0))}
    served = {"kind": "serving", **asdict(SERVING)}
    crowded = {"kind": "serving", **asdict(replace(SERVING, waiting_s=2_000.0))}
    events = [
        event("tokenized", measured=slow),
        event("trained", measured=trained),
        event("tokenized", measured=tokenized),
        event("metered", at=1.0, measured=crowded),
        event("metered", at=9_000.0, measured=served),
        event("metered", at=9_001.0, measured=served),
        event("metered", at=20_000.0, measured=idle),
    ]
    both = replace(
        SERVING,
        seconds=120.0,
        waiting_s=2.0,
        running_s=400.0,
        engine_s=100.0,
        requests=600,
        used=SERVING.used + SERVING.used,
    )
    assert of_stages(events) == [of_tasks(TASKS), of_training(TRAINING), of_serving(both)]


def test_what_tasks_take_in_threads_is_counted_once_each() -> None:
    before = ledger.spent
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: run_here(compute, [(0.01,)]), range(8)))
    spent: Spent = ledger.spent - before
    assert spent.tasks == 8
    assert usage().cpu_s > 0
