"""Process groups: how the workers of a training run on Ray find one another.

It does what Ray Train's own `TorchConfig` does, but whoever controls the workers does not load torch for it: 2 seconds of CPU that
all workers wait for. What happens in a worker is Ray's own (Ray 2.60, `ray.train.torch.config`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
from ray.exceptions import GetTimeoutError
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.util import TrainingFramework

from aifactory.observe.events import log_event

_LEAVE_S = 30.0
"""That the workers are given to leave the group: as in Ray 2.60."""


@dataclass
class ProcessGroup(BackendConfig):  # type: ignore[misc]
    """The group of all workers."""

    backend: str
    """Of torch.distributed: `gloo` or `nccl`."""

    @property
    def backend_cls(self) -> type[Backend]:
        return Meeting

    @property
    def framework(self) -> TrainingFramework:
        return TrainingFramework.TORCH


class Meeting(Backend):  # type: ignore[misc]
    """Where the first worker waits for the others."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: ProcessGroup) -> None:
        address, port = worker_group.execute_single(0, get_address_and_port)
        worker_group.execute(_join, address, port, backend_config.backend)

    def on_shutdown(self, worker_group: Any, backend_config: ProcessGroup) -> None:
        try:
            ray.get(worker_group.execute_async(_leave, len(worker_group)), timeout=_LEAVE_S)
        except GetTimeoutError:
            log_event(
                "warned",
                of=f"the workers have not left their process group within {_LEAVE_S:g} s; they are ended all the same",
            )


def _join(address: str, port: int, backend: str) -> None:
    from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group

    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(port)
    _set_torch_distributed_env_vars()
    context = ray.train.get_context()
    _setup_torch_process_group(
        backend=backend,
        world_rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        init_method="env://",
    )


def _leave(world_size: int) -> None:
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(destroy_process_group=world_size > 1)
