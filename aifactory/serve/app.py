"""Serve: Release -> OpenAI-compatible HTTP. The rim that knows Ray Serve.

direct      proxy ─▶ Replica             one hop: the engine is in it
resilient   proxy ─▶ FrontReplica ─▶ Replica    the front, front.py, loses no answer with a replica
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aifactory.cluster import metrics_port
from aifactory.cluster.session import SERVING, app_name
from aifactory.config import Config
from aifactory.config.runtime import Endpoint as EndpointOptions
from aifactory.errors import ConfigError, PlacementError, StateError
from aifactory.observe import tracing
from aifactory.observe.energy import Meter
from aifactory.observe.events import log_event
from aifactory.records.books import Books
from aifactory.serve import haproxy
from aifactory.serve.loopback import is_loopback
from aifactory.serve.progress import Call, Part

if TYPE_CHECKING:
    from aifactory.serve.guards import Mask

_REPLICA = "replica"
_FRONT = "front"
_ROOM_TO_REFUSE = 64
"""Requests beyond those that a replica holds, so that it can say no to them, and say that it is alive."""
_DRAIN_POLL_S = 0.1
_LOOK_BACK_S = 30.0
"""Over how long Serve averages what replicas have to do, seconds (Ray's default)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a factory answers."""

    url: str
    """Base URL for OpenAI clients is this and `/v1`."""
    model: str


class Replica:
    """One replica: the gateway over the releases that it follows."""

    def __init__(self, books: Books, mask: Mask | None = None) -> None:
        from aifactory.serve.answer_meter import Load, watch
        from aifactory.serve.gateway import Gateway
        from aifactory.serve.memory import require_memory
        from aifactory.serve.metering import ServingMeter
        from aifactory.serve.releases import Releases

        self._endpoint = books.config.runtime.endpoint
        tracing.start(books.config.runtime.traces, service=books.config.name)
        if self._endpoint.engine == "vllm":
            from aifactory.engine.vllm_process import require_vllm

            # No release is to blame where it is missing.
            require_vllm()
        room = partial(require_memory, device="cuda" if self._endpoint.gpus_per_replica else "cpu")
        self._releases = Releases(books, self._load, replica=_replica_name(), require_room=room)
        self._tolerance = books.config.promote.parity_tolerance
        # What loading takes is on the books too.
        self._meter = ServingMeter(
            books.journal,
            partial(
                Meter,
                num_cpus=self._endpoint.cpus_per_replica,
                watts_per_cpu=books.config.runtime.watts_per_cpu,
                package_share=min(1.0, self._endpoint.cpus_per_replica / (os.cpu_count() or 1)),
            ),
            replica=_replica_name(),
            every_s=self._endpoint.meter_s,
            is_busy=lambda: self._gateway.num_open > 0,
            prompt_token_share=books.config.runtime.site.prompt_token_share,
            charge=books.allowances.add_joules,
            site=books.config.runtime.site,
            load=Load(lambda: self._gateway),
        )
        self._releases.load_first()
        self._gateway = Gateway(
            books, self._releases, books.config.serve, replica=_replica_name(), count=self._meter.count, mask=mask
        )
        watch(self._gateway)
        metrics_port.export(books.config.name)
        self._follower: asyncio.Task[None] | None = None
        self._batches: asyncio.Task[None] | None = None
        self._teller: asyncio.Task[None] | None = None
        self._metering: asyncio.Task[None] | None = None

    async def __call__(self, request: Any) -> Any:
        if self._follower is None:
            self._follow()
        return await self._gateway.handle(request)

    async def relay(self, call: Call) -> AsyncGenerator[Part, None]:
        """Answer what a front hands on."""
        from aifactory.serve.relay import relay

        if self._follower is None:
            self._follow()
        async with aclosing(relay(self._gateway, call)) as parts:
            async for part in parts:
                yield part

    async def check_health(self) -> None:
        """Called by Serve every few seconds; also what starts the watch on a replica that nobody asks anything.

        Raises RuntimeError if the engine will never answer again: another replica then takes the place of this one.
        """
        served = self._releases.current
        if served is not None and served.engine.failure is not None:
            raise RuntimeError(served.engine.failure)
        if self._follower is None or self._follower.done():
            self._follow()

    async def drain(self) -> int:
        """Take no more requests and no more of a batch; how many requests it still answers."""
        self._gateway.is_draining = True
        if self._batches is not None:
            self._batches.cancel()
        return self._gateway.num_open

    async def held(self) -> Mapping[str, int]:
        """What requests hold of it: 0 of everything when the last of them has ended."""
        return self._gateway.held

    def __del__(self) -> None:
        if hasattr(self, "_releases"):
            self._releases.close(self._endpoint.drain_timeout_s)
        if hasattr(self, "_meter"):
            # What it used since it last told; a database that is away must not keep it from ending.
            with suppress(Exception):
                self._meter.tell()
        if hasattr(self, "_gateway"):
            with suppress(Exception):
                self._gateway.limiter.close()

    def _follow(self) -> None:
        follow = self._releases.follow(self._endpoint.poll_s, self._endpoint.drain_timeout_s)
        self._follower = asyncio.create_task(follow)
        if self._teller is None or self._teller.done():
            self._teller = asyncio.create_task(self._gateway.tell_outcomes(self._endpoint.poll_s))
        if (self._batches is None or self._batches.done()) and not self._gateway.is_draining:
            self._batches = asyncio.create_task(self._gateway.batches.run(self._endpoint.poll_s))
        if self._metering is None or self._metering.done():
            self._metering = asyncio.create_task(self._meter.run())

    def _load(self, folder: Path) -> Any:
        from aifactory.serve.engines import load_engine

        return load_engine(folder, self._endpoint, tolerance=self._tolerance)


class FrontReplica:
    """The front: it has replicas answer, by a handle of Serve's."""

    def __init__(self, config: Config, replica: Any) -> None:
        from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError

        from aifactory.serve.front import Front

        metrics_port.export(config.name)
        # Serve's own router looks for another replica; it does not ask again what it has handed on.
        self._replica = replica.options(stream=True, method_name="relay")
        self._front = Front(config, self._ask, lost=(RayActorError, WorkerCrashedError, NodeDiedError, ObjectLostError))

    async def __call__(self, request: Any) -> Any:
        return await self._front.handle(request)

    async def drain(self) -> int:
        """Take no more requests; how many it still has answered."""
        self._front.is_draining = True
        return self._front.num_open

    async def held(self) -> Mapping[str, int]:
        """What requests hold of it."""
        return {"open": self._front.num_open}

    async def _ask(self, call: Call) -> AsyncGenerator[Part, None]:
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

        from aifactory.serve.wire import StatusError

        answer = self._replica.remote(call)
        try:
            async for part in answer:
                yield part
        except BackPressureError as error:
            raise StatusError(429, str(error), kind="rate_limit_error", code="queue_full") from error
        except DeploymentUnavailableError as error:
            raise StatusError(503, str(error), kind="server_error") from error
        finally:
            answer.cancel()


def start(books: Books, *, mask: Mask | None = None) -> Endpoint:
    """Serve the factory on the connected cluster; returns when the first replica answers.

    A factory that is served already stays as it is: its replicas follow the registry.

    mask     takes personal data out of a text, where `runtime.gateway` wants that; pickled to the replicas
    """
    from ray import serve
    from ray.serve.config import HTTPOptions

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    config = books.config
    wanted = config.runtime.endpoint
    name = app_name(config.name)
    _require_guarded(config, _bound_host() if _is_started() else wanted.host)
    if not is_running(config.name):
        if config.runtime.gateway.keys == "required" and not books.keys.has_active():
            log_event("warned", of="nobody has an API key yet; make one: aifactory keys create NAME CONFIG")
        if not _is_started():
            serve.start(
                http_options=HTTPOptions(host=wanted.host, port=wanted.port or _free_port(wanted.host)),
                # The controller's environment is that of the proxies and of the replicas, which it starts.
                controller_options={"runtime_env": {"env_vars": _environment(wanted)}},
            )
        try:
            serve.run(application(books, mask), name=name, route_prefix=wanted.route_prefix)
        except (RuntimeError, ValueError) as error:
            raise PlacementError(f"expected the factory {config.name} to be served, found: {error}") from error
    endpoint = Endpoint(url=_url(wanted.route_prefix), model=config.name)
    log_event("served", url=endpoint.url, model=endpoint.model)
    return endpoint


def _require_guarded(config: Config, host: str | None) -> None:
    """Raises ConfigError where other machines could ask without a key."""
    if config.runtime.gateway.keys == "required" or is_loopback(host or "0.0.0.0"):
        return
    raise ConfigError(
        f"expected runtime.gateway.keys: required beside an endpoint that other machines reach, found keys: optional and the "
        f"address {host}. Set --set runtime.gateway.keys=required and make keys (aifactory keys create NAME CONFIG), or bind "
        "runtime.endpoint.host=127.0.0.1."
    )


def application(books: Books, mask: Mask | None) -> Any:
    """The factory's deployments, bound to one another; `mask` as in `start`."""
    from ray import serve
    from ray.serve.schema import LoggingConfig

    config = books.config
    wanted = config.runtime.endpoint
    # The gateway bounds its queue and what is open, and says 429. Serve's own limits come after: they leave it room to
    # say so. What finds no replica with room waits in the proxy, bounded as well.
    most_ongoing = wanted.most_open + _ROOM_TO_REFUSE
    of_both: dict[str, Any] = {
        "backpressure_config": {"status_code": 429, "retry_after_s": 1},
        "graceful_shutdown_timeout_s": wanted.drain_timeout_s,
        "graceful_shutdown_wait_loop_s": 0.2,
        "health_check_period_s": 2,
        "logging_config": LoggingConfig(enable_access_log=False, log_level="WARNING"),
    }
    replica = serve.deployment(
        name=_REPLICA,
        **_number_of_replicas(wanted),
        ray_actor_options={"num_cpus": wanted.cpus_per_replica, "num_gpus": wanted.gpus_per_replica},
        max_ongoing_requests=most_ongoing,
        max_queued_requests=most_ongoing,
        **of_both,
    )(Replica)
    app = replica.bind(books, mask)
    if wanted.mode == "resilient":
        most_open = wanted.most_open * wanted.most_replicas + _ROOM_TO_REFUSE
        front = serve.deployment(
            name=_FRONT,
            num_replicas=wanted.fronts,
            ray_actor_options={"num_cpus": 0},
            max_ongoing_requests=most_open,
            max_queued_requests=most_open,
            **of_both,
        )(FrontReplica)
        app = front.bind(config, app)
    return app


def require_declarable(books: Books) -> None:
    """Refuse what a declarative deployment can't serve.

    Raises   StateError without a release; ConfigError where other machines could ask without a key.
    """
    if books.registry.production() is None:
        raise StateError(
            f"expected a release of the factory {books.config.name} in production, found none; run a cycle first."
        )
    # Whoever deploys it binds the address; what the configuration says of that is all that is known here.
    _require_guarded(books.config, books.config.runtime.endpoint.host)


def _environment(wanted: EndpointOptions) -> dict[str, str]:
    """How Serve's processes are to work. Raises PlacementError where HAProxy is wanted and not there."""
    found = None if wanted.ingress == "serve" else haproxy.programs()
    if found is None and wanted.ingress == "haproxy":
        raise PlacementError(
            f"expected HAProxy and {haproxy.PROGRAM} for runtime.endpoint.ingress: haproxy, found not both; "
            "pip install 'ray[serve]' on Linux brings the one and aifactory the other, or leave ingress at auto"
        )
    ingress = {} if found is None else haproxy.environment(*found, folder=haproxy.new_folder())
    return {**SERVING, **ingress}


def stop(factory: str, *, drain_timeout_s: float = 30.0) -> None:
    """End the factory's replicas, after their last answers; other factories' stay.

    While they answer what they have begun, whoever asks anew is told that the endpoint is shutting down: Serve, which takes
    the route away first, would say that there is no such path.
    """
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if status(factory) is None:
        return
    left, deadline = 0, time.monotonic() + drain_timeout_s
    if is_running(factory):
        # The replicas last: they answer what the fronts have begun.
        left = max(_drain(factory, name, deadline) for name in (_FRONT, _REPLICA) if name in _deployments(factory))
    if left:
        log_event(
            "warned", of=f"{left} requests had not been answered {drain_timeout_s:g} s after the end was asked for"
        )
    serve.delete(app_name(factory))


def _drain(factory: str, deployment: str, deadline: float) -> int:
    """Tell each replica to take no more, and wait for those that it has; how many are left."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    handle = serve.get_deployment_handle(deployment, app_name(factory))
    left = 0
    while True:
        try:
            # To all of them: whom Serve would choose for a call is seldom the one that has the most to do.
            left = sum(handle.broadcast("drain").results(timeout_s=max(1.0, deadline - time.monotonic())))
            if not left:
                return 0
        except (RayError, RayServeException, TimeoutError) as error:  # one that was lost is left out the next time
            log_event("warned", of=f"a replica did not answer when it was told to take no more: {error}")
        if time.monotonic() >= deadline:
            return left
        time.sleep(_DRAIN_POLL_S)


def _deployments(factory: str) -> Mapping[str, Any]:
    """How Serve says that each of them is."""
    from ray import serve

    found: Mapping[str, Any] = serve.status().applications[app_name(factory)].deployments
    return found


def _number_of_replicas(wanted: EndpointOptions) -> dict[str, Any]:
    if isinstance(wanted.replicas, int):
        return {"num_replicas": wanted.replicas}
    return {
        "autoscaling_config": {
            "min_replicas": wanted.least_replicas,
            "max_replicas": wanted.most_replicas,
            "target_ongoing_requests": wanted.target_requests or wanted.slots,
            "upscale_delay_s": wanted.scale_up_after_s,
            "downscale_delay_s": wanted.scale_down_after_s,
            # What is averaged must be no older than what is decided by it.
            "look_back_period_s": min(_LOOK_BACK_S, max(1.0, wanted.scale_up_after_s)),
        }
    }


def _replica_name() -> str:
    from ray import serve

    return str(serve.get_replica_context().replica_id.unique_id)


def is_running(factory: str) -> bool:
    """Whether the connected cluster serves the factory."""
    return status(factory) == "RUNNING"


def status(factory: str) -> str | None:
    """Serve's word for how the factory's application is; None where there is none."""
    if "ray" not in sys.modules or not _is_started():
        return None
    from ray import serve

    found = serve.status().applications.get(app_name(factory))
    return None if found is None else str(found.status.value)


def _is_started() -> bool:
    import ray
    from ray.exceptions import RayActorError
    from ray.serve.context import _get_global_client
    from ray.serve.exceptions import RayServeException

    if not ray.is_initialized():
        return False
    try:
        return _get_global_client(raise_if_no_controller_running=True) is not None
    except (RayServeException, RayActorError):
        return False


def _bound_host() -> str | None:
    """The address of the Ray Serve that runs."""
    from ray.serve.context import _get_global_client

    host: str | None = _get_global_client().http_config.host
    return host


def _url(route_prefix: str) -> str:
    from ray.serve.context import _get_global_client

    options = _get_global_client().http_config
    host = "127.0.0.1" if options.host in ("0.0.0.0", None) else options.host
    return f"http://{host}:{options.port}{route_prefix.rstrip('/')}"


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
