"""Train: TokenSets, parent -> Model. The rim that knows Ray Train: it places workers and starts them again.

No Ray call is in the step. What a worker has committed is found by the worker itself, so Ray's memory of reports is
not needed for a resume. Checkpoints are validated by tasks that are started here when they are there. What loads a model is
imported where it runs: neither the driver nor Ray Train's controller waits for transformers.
Raises   TrainingError.
"""

from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from aifactory.errors import AIFactoryError, StorageError, TrainingError
from aifactory.observe.energy import Meter
from aifactory.observe.events import log_event
from aifactory.observe.progress import progress

if TYPE_CHECKING:
    from aifactory.config import Runtime
    from aifactory.train.work import Work

CODE_VERSION = 4
_POLL_S = 0.5
_POLL_AFAR_S = 5.0
_ORPHANS_S = 2.0
_RESIZE_S = 20.0
"""How often Ray Train looks whether a node has come back: as often as it counts what the nodes have (Ray 2.60)."""


def train_on_ray(
    task: Work, *, name: str, runtime: Runtime, meanwhile: Callable[[], None] | None = None
) -> dict[str, Any]:
    """Run the workers to the end; return what rank 0 exported. A run that had finished before is not run again.

    meanwhile   called here once the workers train
    """
    from aifactory.train.work import exported, holdout_losses

    finished = exported(task.storage, task.run_folder)
    if finished is None:
        with _watch(task, runtime, meanwhile), _validating(task), _freeing_orphans():
            _fit(task, name, runtime)
        finished = exported(task.storage, task.run_folder)
    if finished is None:
        raise TrainingError(
            f"expected the run in {task.storage.path(*task.run_folder)} to export a model, found none; its checkpoints "
            "are intact, run the same command again."
        )
    if task.held_out is not None:
        finished["figures"]["holdout_loss"] = holdout_losses(task)
    return finished


def _fit(task: Work, name: str, runtime: Runtime) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    from aifactory.cluster.jobs import job_server
    from aifactory.cluster.process_group import ProcessGroup

    use_gpu = runtime.gpus_per_worker > 0
    resources = {"CPU": runtime.cpus_per_worker}
    if use_gpu:
        resources["GPU"] = runtime.gpus_per_worker

    class StopsAtOnce(UserCallback):  # type: ignore[misc]
        """What would happen again is not tried again: an error of this callback ends the run."""

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            from aifactory.train.room import NoRoomError

            for cause in _causes(worker_exceptions):
                if not isinstance(cause, NoRoomError):
                    raise cause

    # With every group of workers Ray 2.60 would start a process that hands out datasets, of which there are none; it imports for as
    # long as a worker does. Another one frees the group's place where the controller is killed, if the dashboard tells it so; where
    # there is no dashboard it frees nothing, and is waited for at the end for 12 seconds (see `_freeing_orphans`).
    left_out = {"DatasetsCallback"} | ({"PlacementGroupCleanerCallback"} if job_server() is None else set())

    class Trainer(DataParallelTrainer):  # type: ignore[misc]
        """Starts no process that has nothing to do."""

        def _create_default_callbacks(self) -> list[Any]:
            return [c for c in super()._create_default_callbacks() if type(c).__name__ not in left_out]

    trainer = Trainer(
        _worker,
        # Packed, so that whoever controls the workers does not load what belongs to it, torch among it.
        train_loop_config={"task": pickle.dumps(task)},
        backend_config=ProcessGroup(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=runtime.workers,
            elastic_resize_monitor_interval_s=_RESIZE_S,
            use_gpu=use_gpu,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=task.storage.path("runs", "ray-train"),
            failure_config=FailureConfig(max_failures=runtime.max_failures),
            callbacks=[StopsAtOnce()],
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        told = [getattr(error, "controller_failure", None), *getattr(error, "worker_failures", {}).values()]
        causes = _causes(dict(enumerate(told)))
        reason = str(causes[0] if causes else error)
        raise TrainingError(
            f"expected {_number(runtime)} workers to finish the run {name}, found: {reason} What was committed in "
            f"{task.storage.path(*task.run_folder)} is intact; the same command goes on from there."
        ) from error


def _causes(failures: Mapping[int, BaseException | None]) -> list[AIFactoryError]:
    """What was raised on purpose, among the failures of workers."""
    unpacked = [getattr(failure, "cause", None) or failure for failure in failures.values()]
    return [cause for cause in unpacked if isinstance(cause, AIFactoryError)]


def _number(runtime: Runtime) -> str:
    least, most = runtime.least_workers, runtime.most_workers
    return str(most) if least == most else f"{least} to {most}"


def _worker(config: dict[str, Any]) -> None:
    import ray.train

    from aifactory.cluster import metrics_port
    from aifactory.train.worker import work

    task: Work = pickle.loads(config["task"])
    metrics_port.export(task.factory)
    context = ray.train.get_context()
    try:
        work(task, rank=context.get_world_rank(), world_size=context.get_world_size())
    finally:
        metrics_port.flush()


def _validate(task: Work, step: int) -> None:
    from aifactory.train.worker import validate_committed

    validate_committed(task, step)


def prove(task: Work, tolerance: float) -> dict[str, Any]:
    """`parity.prove_export`, for a task of its own."""
    from aifactory.train.parity import prove_export

    return prove_export(task, tolerance)


@contextmanager
def _beside(name: str, follow: Callable[[threading.Event], None]) -> Iterator[None]:
    """A thread that follows the run, and is waited for; it is told when the run has ended."""
    ended = threading.Event()
    thread = threading.Thread(target=follow, args=(ended,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def _freeing_orphans() -> Iterator[None]:
    """Free the place of the workers whose cycle was killed before this one, as soon as its controller has ended."""
    from aifactory.cluster.reservations import free_orphans

    def follow(ended: threading.Event) -> None:
        while True:
            if freed := free_orphans():
                log_event("freed", placement_groups=freed)
            if ended.wait(_ORPHANS_S):
                return

    with _beside("orphans", follow):
        yield


@contextmanager
def _validating(task: Work) -> Iterator[None]:
    """Validate what is committed, one checkpoint after another, as tasks that ask for no CPU of the workers'."""
    import ray

    from aifactory.train.work import due

    if task.held_out is None:
        yield
        return
    remote = ray.remote(num_cpus=0, max_retries=3)(_validate)

    def follow(ended: threading.Event) -> None:
        while not ended.wait(_POLL_S):
            validate_due()

    def validate_due() -> None:
        waiting = due(task)
        # Where it decides nothing, what can't keep up leaves some out.
        for step in waiting if task.recipe.early_stopping is not None else waiting[-1:]:
            try:
                ray.get(remote.remote(task, step))
            except ray.exceptions.RayError as error:
                log_event("not_validated", step=step, reason=str(error).splitlines()[-1])
                return

    with _beside("validation", follow):
        yield
    validate_due()


@contextmanager
def _watch(task: Work, runtime: Runtime, meanwhile: Callable[[], None] | None) -> Iterator[None]:
    """Show what rank 0 says of the run, and what the run has used so far."""
    from aifactory.train.run_log import MFU

    meter = Meter(num_cpus=runtime.most_workers * runtime.cpus_per_worker, watts_per_cpu=runtime.watts_per_cpu)
    before = _told(task)

    begun: list[threading.Thread] = []

    def follow(ended: threading.Event) -> None:
        shown_before: dict[str, Any] = {}
        with progress("train", total=task.recipe.max_steps) as shown:
            while not ended.wait(_POLL_S if task.storage.is_local else _POLL_AFAR_S):
                told = _told(task)
                if told is None or told == before:  # what an earlier start has left there
                    continue
                if meanwhile is not None and not begun:
                    begun.append(threading.Thread(target=meanwhile, name="meanwhile", daemon=True))
                    begun[0].start()
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

    try:
        with _beside("train-progress", follow):
            yield
    finally:
        for thread in begun:
            thread.join()


def _told(task: Work) -> dict[str, Any] | None:
    """What rank 0 has written last."""
    from aifactory.train.run_log import PROGRESS

    try:
        data = task.storage.read_bytes(*task.run_folder, PROGRESS)
    except StorageError:
        return None  # what is shown is no reason to stop
    return None if data is None else dict(json.loads(data))
