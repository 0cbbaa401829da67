"""`aifactory doctor [CONFIG]`: looks at everything, changes nothing. Exit status 1 where something is an error."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator

from aifactory.config import Config
from aifactory.doctor import cluster, factory, machine, network
from aifactory.doctor.check import Check, Findings, wrong
from aifactory.errors import AIFactoryError, ConfigError


def run(arguments: argparse.Namespace) -> Findings:
    """All checks of this machine, of the configuration, and of the cluster that RAY_ADDRESS names."""
    return Findings(checks=list(_checks(arguments.config_file, arguments.set)))


def _checks(config_file: str | None, overrides: list[str]) -> Iterator[Check]:
    config: Config | None = None
    broken: Check | None = None
    if config_file is not None:
        try:
            config = Config.from_yaml(config_file, overrides)
        except ConfigError as error:
            broken = wrong(
                "configuration",
                str(error),
                expected="a configuration without an error",
                remedy="Mend it as the message says; `aifactory config schema` says what may stand there.",
                is_error=True,
            )
    here, sockets = machine.look(), network.listening()
    gpus = 0.0 if config is None else max(config.runtime.gpus_per_worker, config.runtime.endpoint.gpus_per_replica)
    yield from machine.checks(here, gpus_asked=gpus)
    yield from network.checks(sockets)
    yield cluster.authentication_check(os.environ, sockets)
    if broken is not None:
        yield broken
    if config is None:
        return
    endpoint = config.runtime.endpoint
    yield network.host_check(endpoint.host)
    yield network.endpoint_check(endpoint.host, endpoint.port, sockets)
    yield from factory.checks(config)
    if not os.environ.get("RAY_ADDRESS"):
        # A cluster of its own has what this machine has.
        yield from cluster.room_checks(config, [{"CPU": here.cpus, "GPU": here.gpus}])
        return
    yield from _of_cluster(config)


def _of_cluster(config: Config) -> Iterator[Check]:
    from aifactory.cluster.nodes import node_clocks
    from aifactory.cluster.placement import cluster_hosts, cluster_nodes, require_shared_state
    from aifactory.cluster.session import connect, disconnect
    from aifactory.records.books import Books

    try:
        connect(config.name)
    except AIFactoryError as error:
        remedy = "Start it (ray start --head), or mend RAY_ADDRESS."
        yield wrong("cluster", str(error), expected="a cluster that answers", remedy=remedy, is_error=True)
        return
    try:
        yield from cluster.room_checks(config, cluster_nodes())
        yield from cluster.node_checks(node_clocks())
        books = Books(config)
        try:
            require_shared_state(cluster_hosts(), sqlite=books.database.is_sqlite, local_storage=books.storage.is_local)
        except AIFactoryError as error:
            remedy = "Set runtime.state_url to PostgreSQL."
            yield wrong("database", str(error), expected="a database for all machines", remedy=remedy, is_error=True)
        finally:
            books.close()
    finally:
        disconnect()
