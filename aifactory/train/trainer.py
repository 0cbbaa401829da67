"""Train: TokenSets, parent -> Model. The rim that knows Ray Train: it places workers and starts them again.

No Ray call is in the step. What a worker has committed is found by the worker itself, so Ray's memory of reports is
not needed for a resume.
Raises   TrainingError.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from aifactory.errors import AIFactoryError, StorageError, TrainingError
from aifactory.observe.energy import Meter
from aifactory.observe.events import log_event
from aifactory.observe.progress import progress

if TYPE_CHECKING:
    from aifactory.config import Runtime
    from aifactory.train.worker import Work

CODE_VERSION = 4
_POLL_S = 0.5
_POLL_AFAR_S = 5.0


def train_on_ray(task: Work, *, name: str, runtime: Runtime) -> dict[str, Any]:
    """Run the workers to the end; return what rank 0 exported. A run that had finished before is not run again."""
    from aifactory.train.worker import exported

    finished = exported(task.storage, task.run_folder)
    if finished is None:
        with _watch(task, runtime):
            _fit(task, name, runtime)
        finished = exported(task.storage, task.run_folder)
    if finished is None:
        raise TrainingError(
            f"expected the run in {task.storage.path(*task.run_folder)} to export a model, found none; its checkpoints "
            "are intact, run the same command again."
        )
    return finished


def _fit(task: Work, name: str, runtime: Runtime) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    use_gpu = runtime.gpus_per_worker > 0
    resources = {"CPU": runtime.cpus_per_worker}
    if use_gpu:
        resources["GPU"] = runtime.gpus_per_worker
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"task": task},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=runtime.workers, use_gpu=use_gpu, resources_per_worker=resources),
        run_config=RunConfig(
            name=name,
            storage_path=task.storage.path("runs", "ray-train"),
            failure_config=FailureConfig(max_failures=runtime.max_failures),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        causes = [e for e in getattr(error, "worker_failures", {}).values() if isinstance(e, AIFactoryError)]
        reason = str(causes[0]) if causes else str(error)
        raise TrainingError(
            f"expected {runtime.workers} workers to finish the run {name}, found: {reason} What was committed in "
            f"{task.storage.path(*task.run_folder)} is intact; the same command goes on from there."
        ) from error


def _worker(config: dict[str, Any]) -> None:
    import ray.train

    from aifactory.train.worker import work

    context = ray.train.get_context()
    work(config["task"], rank=context.get_world_rank(), world_size=context.get_world_size())


@contextmanager
def _watch(task: Work, runtime: Runtime) -> Iterator[None]:
    """Show what rank 0 says of the run, and what the run has used so far."""
    from aifactory.train.run_log import MFU

    ended = threading.Event()
    meter = Meter(num_cpus=runtime.workers * runtime.cpus_per_worker, watts_per_cpu=runtime.watts_per_cpu)
    before = _told(task)

    def follow() -> None:
        shown_before: dict[str, Any] = {}
        with progress("train", total=task.recipe.max_steps) as shown:
            while not ended.wait(_POLL_S if task.storage.is_local else _POLL_AFAR_S):
                told = _told(task)
                if told is None or told == before:  # what an earlier start has left there
                    continue
                if not shown_before and "peak_flops_per_s" in told:
                    log_event(
                        "training",
                        run=task.run_folder[-1],
                        mfu=MFU,
                        flops_per_token=told["flops_per_token"],
                        peak=f"{told['peak_flops_per_s'] / 1e12:.4g} TFLOP/s a worker ({told['peak_source']})",
                    )
                for warning in told["warnings"][len(shown_before.get("warnings", ())) :]:
                    log_event("warned", of=warning)
                shown_before = told
                energy = meter.read()
                figures = {name: told[name] for name in ("loss", "tokens_per_s", "mfu") if name in told}
                shown.update(told["step"], **figures, energy=f"{energy.joules:,.0f} J ({energy.source})")

    watcher = threading.Thread(target=follow, name="train-progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _told(task: Work) -> dict[str, Any] | None:
    """What rank 0 has written last."""
    from aifactory.train.run_log import PROGRESS

    try:
        data = task.storage.read_bytes(*task.run_folder, PROGRESS)
    except StorageError:
        return None  # what is shown is no reason to stop
    return None if data is None else dict(json.loads(data))
