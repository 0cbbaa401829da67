"""Laws of a run under Ray Train that loses workers, nodes and its driver: it ends with the bits of one that lost nothing.

Each run has a Ray of its own in a process of its own (benchmarks/fault_run.py). What it must come to was made without Ray, by
two processes that nobody killed.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from drivers import kill

from aifactory.train.checkpoint import Checkpoints

ROOT = Path(__file__).parent.parent.parent
RUN = ROOT / "benchmarks" / "fault_run.py"
GANG = Path(__file__).parent / "gang.py"
STEPS = 300
LONG = {"micro_batch_rows": 1, "checkpoint_every_steps": 10}
ACROSS = {"reproducible": "across_workers", "micro_batch_rows": 1, "threads": 1}
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "GOMP_SPINCOUNT": "0",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
}


def tasks_of(runs, name):
    return {
        "ddp": runs.work(f"{name}-ddp", max_steps=STEPS, changes=LONG),
        "fsdp": runs.work(f"{name}-fsdp", max_steps=STEPS, changes={**LONG, "parallel": "fsdp"}),
        "tree": runs.work(f"{name}-tree", max_steps=STEPS, changes=LONG, **ACROSS),
    }


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory):
    """What comes out of two workers where nothing is lost."""
    tasks = tasks_of(runs, "whole")
    file = tmp_path_factory.mktemp("whole") / "jobs"
    file.write_bytes(pickle.dumps([(task, 2, None) for task in tasks.values()]))
    done = subprocess.run([sys.executable, GANG, file], capture_output=True, text=True, timeout=400, env=ENVIRONMENT)
    assert json.loads(done.stdout.splitlines()[-1]) == [[0, 0]] * len(tasks), done.stderr[-4000:]
    return {name: runs.files(task) for name, task in tasks.items()}


class Run:
    """A task on a Ray of its own."""

    def __init__(self, folder, task, *options, **runtime):
        self.task = task
        (folder / "task").write_bytes(pickle.dumps(task))
        (folder / "runtime").write_text(json.dumps({"workers": 2, "cpus_per_worker": 0.8, **runtime}))
        self.command = [sys.executable, RUN, folder / "task", folder / "runtime", *map(str, options)]
        self.log = folder / "log"

    def start(self):
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                self.command, stdout=subprocess.PIPE, stderr=log, env=ENVIRONMENT, start_new_session=True, text=True
            )

    def finish(self):
        """What the script has found."""
        process = self.start()
        try:
            said, _ = process.communicate(timeout=500)
        except subprocess.TimeoutExpired:
            kill(process)
            raise
        assert process.returncode == 0, self.log.read_text(encoding="utf-8")[-4000:]
        return json.loads(said.splitlines()[-1])

    def committed(self):
        return max(Checkpoints(self.task.storage, *self.task.run_folder).committed(), default=0)


def moments(seed, number):
    """Steps at which something is lost, none of them long before the end."""
    return sorted(random.Random(seed).sample(range(20, STEPS - 100, 10), number))


FEW = [("fsdp", 2)]
MANY = [
    pytest.param(*each, marks=pytest.mark.faults)
    for each in (("ddp", 1), ("ddp", 3), ("fsdp", 3), ("ddp", 4), ("fsdp", 4))
]


@pytest.mark.parametrize(("how", "seed"), [pytest.param(*each, marks=pytest.mark.slow) for each in FEW] + MANY)
def test_workers_that_are_killed_change_no_bit(runs, whole, tmp_path, how, seed):
    task = tasks_of(runs, f"worker-{seed}")[how]
    at = moments(seed, 2)
    found = Run(tmp_path, task, "--kill", "worker", "--seed", seed, "--at", *at).finish()

    assert len(found["back_s"]) == 2, found
    assert all(killed >= step for killed, step in zip(found["killed_after"], at, strict=True))
    # It went on from the newest checkpoint, or from the one before, where that one's writing was cut off.
    assert runs.figures(task)["resumed_from"] >= found["killed_after"][-1]
    assert runs.files(task) == whole[how]


@pytest.mark.slow
def test_a_node_is_lost_and_comes_back_and_across_workers_no_bit_changes(runs, whole, tmp_path):
    task = tasks_of(runs, "elastic")["tree"]
    options = ["--nodes", 2, "--kill", "node", "--at", *moments(5, 1), "--returns", "later"]
    found = Run(tmp_path, task, *options, workers=[1, 2]).finish()

    assert found["back_s"][0] is not None, found
    assert runs.figures(task)["resumed_from"] >= found["killed_after"][0]
    assert runs.files(task) == whole["tree"]


@pytest.mark.faults
@pytest.mark.parametrize(("how", "seed"), [("ddp", 6), ("fsdp", 7)])
def test_a_node_that_is_replaced_changes_no_bit(runs, whole, tmp_path, how, seed):
    task = tasks_of(runs, "node")[how]
    options = ["--nodes", 2, "--kill", "node", "--at", *moments(seed, 1), "--returns", "at-once"]
    found = Run(tmp_path, task, *options).finish()

    assert found["back_s"][0] is not None, found
    assert runs.figures(task)["workers"] == 2
    assert runs.files(task) == whole[how]


@pytest.mark.parametrize(
    ("how", "seed"),
    [
        pytest.param("ddp", 8, marks=pytest.mark.faults),
        pytest.param("ddp", 9, marks=pytest.mark.faults),
        pytest.param("fsdp", 10, marks=pytest.mark.faults),
    ],
)
def test_a_driver_that_is_killed_and_begun_again_changes_no_bit(runs, whole, tmp_path, how, seed):
    run = Run(tmp_path, tasks_of(runs, f"driver-{seed}")[how])
    for at in moments(seed, 1 if seed == 8 else 3):
        process = run.start()
        while run.committed() < at:
            assert process.poll() is None, run.log.read_text(encoding="utf-8")[-4000:]
            time.sleep(0.01)
        kill(process)
    before = run.committed()
    run.finish()

    assert runs.figures(run.task)["resumed_from"] >= before > 0
    assert runs.files(run.task) == whole[how]


@pytest.mark.slow
def test_a_worker_that_hangs_is_ended_by_the_watch_and_changes_no_bit(runs, whole, tmp_path):
    task = replace(tasks_of(runs, "frozen")["ddp"], hang_timeout_s=5.0)
    found = Run(tmp_path, task, "--kill", "freeze", "--at", *moments(11, 1)).finish()

    # The other one waits for it in a collective, takes no step either, and ends.
    assert found["back_s"][0] > 5.0, found
    assert runs.files(task) == whole["ddp"]


CROWDED = """
import importlib.abc, importlib.machinery, sys

class Crowded(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    # A model for which more than one row at a time is too much.
    def find_spec(self, name, path, target=None):
        if name != "transformers.models.llama.modeling_llama":
            return None
        self.found = importlib.machinery.PathFinder.find_spec(name, path)
        return importlib.machinery.ModuleSpec(name, self, origin=self.found.origin)

    def exec_module(self, module):
        import torch
        module.__file__ = self.found.origin
        self.found.loader.exec_module(module)
        forward = module.LlamaModel.forward

        def crowded(self, input_ids, *rest, **options):
            if len(input_ids) > 1 and torch.is_grad_enabled():
                raise torch.OutOfMemoryError("no room")
            return forward(self, input_ids, *rest, **options)

        module.LlamaModel.forward = crowded

sys.meta_path.insert(0, Crowded())
"""


@pytest.mark.slow
def test_a_micro_batch_that_does_not_fit_is_halved_by_all_workers_and_the_run_goes_on(
    runs, whole, tmp_path, monkeypatch
):
    (tmp_path / "sitecustomize.py").write_text(CROWDED)
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", f"{tmp_path}:{ROOT}")
    task = replace(tasks_of(runs, "crowded")["ddp"], micro_batch_rows=2)
    Run(tmp_path, task).finish()

    assert runs.figures(task)["micro_batch_rows"] == 1
    assert runs.files(task) == whole["ddp"]
