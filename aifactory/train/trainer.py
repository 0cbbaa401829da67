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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aifactory.errors import AIFactoryError, TrainingError
from aifactory.observe.progress import progress

if TYPE_CHECKING:
    from aifactory.config import Runtime
    from aifactory.train.worker import Work

CODE_VERSION = 4
_POLL_S = 0.5


def train_on_ray(task: Work, *, name: str, runtime: Runtime) -> dict[str, Any]:
    """Run the workers to the end; return what rank 0 exported. A run that had finished before is not run again."""
    from aifactory.train.worker import exported

    finished = exported(task.storage, task.run_folder)
    if finished is None:
        with _watch(task):
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
def _watch(task: Work) -> Iterator[None]:
    """Show what rank 0 appends to its progress file; without a local one, nothing is shown."""
    from aifactory.train.worker import PROGRESS

    file = Path(task.storage.path(*task.run_folder, PROGRESS))
    ended = threading.Event()
    start = file.stat().st_size if task.storage.is_local and file.exists() else 0

    def follow() -> None:
        with progress("train", total=task.recipe.max_steps) as shown:
            while not ended.wait(_POLL_S):
                last = _last_line(file, start)
                if last is not None:
                    shown.update(last["step"], loss=last["loss"], tokens_per_s=last["tokens_per_s"])

    if not task.storage.is_local:
        yield
        return
    watcher = threading.Thread(target=follow, name="train-progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _last_line(file: Path, start: int) -> dict[str, float] | None:
    try:
        with open(file, "rb") as stream:
            stream.seek(max(start, file.stat().st_size - 4096))
            lines = stream.read().splitlines()
    except FileNotFoundError:
        return None
    for line in reversed(lines):
        try:
            return dict(json.loads(line))
        except ValueError:
            continue  # the line that is being written, or the end of one that the seek has cut
    return None
