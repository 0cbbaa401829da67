"""python benchmarks/metrics_cost.py: what measuring costs: a token, a step of the engine, a flush to Ray, and a number of Ray's own metrics.

Best of several rounds, microseconds. It writes no file.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from aifactory.observe import metrics
from aifactory.observe.meter import Meters
from aifactory.observe.tracing import begin_request, record
from aifactory.serve.answer_meter import AnswerMeter

ROUNDS, TIMES = 7, 20_000


def microseconds(call: Callable[[], object], times: int = TIMES) -> float:
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(times):
            call()
        best = min(best, time.perf_counter() - began)
    return best / times * 1e6


def main() -> None:
    answer = AnswerMeter("alpha-r1", 10, asked=0.0)
    clock = iter(range(10**9))
    step, tokens = metrics.ENGINE_STEP_SECONDS.of(phase="decode"), metrics.ENGINE_TOKENS.of(phase="decode")

    def of_step() -> None:
        began = time.perf_counter()
        step.observe(time.perf_counter() - began)
        tokens.add(4)

    print(f"a token of an answer           {microseconds(lambda: answer.arrived(0, 1, next(clock) * 1e-2)):8.2f} us")
    print(f"a step of the engine           {microseconds(of_step):8.2f} us")
    print(f"a step that is not traced      {microseconds(lambda: record('engine.step', None, began_ns=0)):8.2f} us")
    print(f"a request that is not traced   {microseconds(lambda: begin_request({}, 'request').end()):8.2f} us")

    import ray
    from ray.util.metrics import Histogram

    from aifactory.cluster.metrics_port import MetricsPort
    from aifactory.cluster.session import connect, disconnect

    connect("cost")
    made = Meters()
    wait = made.histogram("aifactory_cost_wait_seconds", "wait", "release", bounds=list(range(1, 16)))
    for number in range(10):
        wait.observe(0.5, release=f"r{number}")
    port = MetricsPort(made)
    samples = sum(len(each) for _, each in made.samples())
    flush = microseconds(port.flush, times=20)
    print(f"a flush of {samples} numbers          {flush:8.0f} us, {flush / samples:.2f} a number")
    own = Histogram("aifactory_cost_own_seconds", boundaries=[1.0, 2.0], tag_keys=("release",))
    print(f"a number of a Ray histogram    {microseconds(lambda: own.observe(0.5, tags={'release': 'r'})):8.2f} us")
    assert ray.is_initialized()
    disconnect()


if __name__ == "__main__":
    main()
