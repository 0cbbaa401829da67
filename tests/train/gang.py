"""Runs gangs of training workers, each in a process of its own, as a launcher would.

    python gang.py JOBS    JOBS is a pickle: a list of (Work, number of workers, step at which rank 0 is killed or None)

The processes are forked from this one, which has imported torch but never used it. Prints the exit codes as JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile

import torch

from aifactory.train.work import Work
from aifactory.train.worker import work


def run_worker(task: Work, rank: int, world_size: int, meeting: str, killed_at: int | None) -> None:
    def after_step(done: int) -> None:
        if done == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)

    if world_size > 1:
        torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    work(task, rank=rank, world_size=world_size, after_step=after_step)
    if world_size > 1:
        torch.distributed.destroy_process_group()


def run_gang(task: Work, world_size: int, killed_at: int | None) -> list[int | None]:
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            context.Process(target=run_worker, args=(task, rank, world_size, f"file://{folder}/meeting", killed_at))
            for rank in range(world_size)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120)
    return [worker.exitcode for worker in workers]


if __name__ == "__main__":
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with open(sys.argv[1], "rb") as stream:
        jobs = pickle.load(stream)
    if any(task.recipe.lora for task, _, _ in jobs):
        import peft  # noqa: F401  once, not in every worker
    print(json.dumps([run_gang(*job) for job in jobs]))
