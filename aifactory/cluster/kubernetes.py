"""KubeRay manifests of a factory, from its configuration: a lasting RayCluster, a RayJob that runs a cycle, a RayService that serves.

What the configuration says of workers, replicas, CPUs and GPUs becomes worker groups; the database's URL comes from a Secret, and
storage is a volume that all pods mount, or any URI that they reach. Field names are those of KubeRay's API `ray.io/v1`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from aifactory.cluster.session import SERVING, app_name
from aifactory.config import Config
from aifactory.errors import ConfigError

API = "ray.io/v1"
STATE_VARIABLE = "AIFACTORY_STATE_URL"
"""Environment variable of every pod with the database's URL, from the Secret."""
CONFIG_FOLDER = "/etc/aifactory"
CONFIG_NAME = "factory.yaml"
STORAGE_FOLDER = "/data"
IMPORT_PATH = "aifactory.workshop.declared:application_of"
_LONGEST_NAME = 34
_QUANTITY = re.compile(r"^[0-9]+(\.[0-9]+)?(m|[kMGTP]i?)?$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """What a configuration does not say of a Kubernetes cluster."""

    image: str
    """With Ray, aifactory and its extras in the versions of constraints.txt."""
    namespace: str
    secret: str
    """Secret with the key `state_url`."""
    storage_class: str | None
    """Of the volume, which must be ReadWriteMany; the cluster's default where empty."""
    storage_size: str
    memory: str
    """Of each worker pod, and of the head."""
    max_workers: int
    """Pods that the autoscaler may add of each group."""
    idle_s: int
    """After how long without work the autoscaler takes a pod away."""


def manifests(config: Config, values: Values) -> list[dict[str, Any]]:
    """All of it, in the order in which it is applied.

    Raises   ConfigError where the factory would keep its books on one pod's disk.
    """
    _require_shared(config, values)
    name = kubernetes_name(config.name)
    volume = [] if _is_elsewhere(config) else [_volume(name, values)]
    return [
        _config_map(config, name, values),
        *volume,
        _object("RayCluster", name, values, _cluster(config, name, values)),
        _object("RayJob", f"{name}-run", values, _job(name)),
        _object("RayService", f"{name}-serve", values, _service(config, name, values)),
    ]


def as_yaml(found: Sequence[Mapping[str, Any]]) -> str:
    """All of it as one YAML text for `kubectl apply -f`; texts of several lines are written as they are."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """With literal blocks."""

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    return yaml.dump_all(found, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10_000)


def kubernetes_name(name: str) -> str:
    """What a factory's objects are called: a DNS label (RFC 1123), short enough for what we and KubeRay append to it."""
    label = f"aifactory-{name}"
    if len(label) > _LONGEST_NAME:
        label = f"{label[: _LONGEST_NAME - 9].rstrip('-')}-{sha256(name.encode()).hexdigest()[:8]}"
    return label.rstrip("-")


def _require_shared(config: Config, values: Values) -> None:
    url = config.runtime.state_url
    if url is not None and url.startswith("sqlite"):
        raise ConfigError(
            "expected runtime.state_url of PostgreSQL for a cluster of several machines, found SQLite, a file of one machine; leave it "
            f"out, and put the URL into the Secret {values.secret} under the key state_url."
        )
    for what, text in (("--memory", values.memory), ("--storage-size", values.storage_size)):
        if not _QUANTITY.match(text):
            raise ConfigError(f"expected an amount such as 16Gi at {what}, found {text!r}.")


def _is_elsewhere(config: Config) -> bool:
    storage = config.runtime.storage
    return storage is not None and "://" in storage


def _object(kind: str, name: str, values: Values, spec: Mapping[str, Any]) -> dict[str, Any]:
    return {"apiVersion": API, "kind": kind, "metadata": _metadata(name, values), "spec": dict(spec)}


def _metadata(name: str, values: Values) -> dict[str, Any]:
    return {"name": name, "namespace": values.namespace, "labels": {"app.kubernetes.io/part-of": "aifactory"}}


# ── what pods share ───────────────────────────────────────────────────────────────────────────────────────────────────


def _config_map(config: Config, name: str, values: Values) -> dict[str, Any]:
    """The configuration, with places that are the same on every pod."""
    import yaml

    told = config.model_dump(mode="json", exclude_defaults=True)
    runtime = {**told.get("runtime", {}), "state_url": "${" + STATE_VARIABLE + "}"}
    if not _is_elsewhere(config):
        runtime["storage"] = STORAGE_FOLDER
    runtime.pop("head", None)
    # A pod's address is not known before. Other machines reach it, so whoever asks needs a key.
    runtime["endpoint"] = {**runtime.get("endpoint", {}), "host": "0.0.0.0"}
    runtime["gateway"] = {**runtime.get("gateway", {}), "keys": "required"}
    told["runtime"] = runtime
    text = yaml.safe_dump(told, sort_keys=False, allow_unicode=True)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(f"{name}-config", values),
        "data": {CONFIG_NAME: text},
    }


def _volume(name: str, values: Values) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": values.storage_size}},
    }
    if values.storage_class is not None:
        spec["storageClassName"] = values.storage_class
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": _metadata(f"{name}-storage", values),
        "spec": spec,
    }


# ── clusters ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _cluster(config: Config, name: str, values: Values) -> dict[str, Any]:
    runtime = config.runtime
    training = _group(
        "training",
        cpus=max(runtime.cpus_per_worker, 1.0),
        gpus=runtime.gpus_per_worker,
        least=0,
        most=max(values.max_workers, runtime.most_workers),
        name=name,
        config=config,
        values=values,
    )
    return {**_head(config, name, values), "workerGroupSpecs": [training]}


def _serving(config: Config, name: str, values: Values) -> dict[str, Any]:
    endpoint = config.runtime.endpoint
    serving = _group(
        "serving",
        cpus=max(endpoint.cpus_per_replica, 1.0),
        gpus=endpoint.gpus_per_replica,
        least=endpoint.least_replicas,
        most=max(endpoint.most_replicas, endpoint.least_replicas),
        name=name,
        config=config,
        values=values,
    )
    return {**_head(config, name, values), "workerGroupSpecs": [serving]}


def _head(config: Config, name: str, values: Values) -> dict[str, Any]:
    import ray

    return {
        "rayVersion": ray.__version__,
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {"idleTimeoutSeconds": values.idle_s, "upscalingMode": "Default"},
        "headGroupSpec": {
            # Nothing of the factory's own work runs beside the GCS.
            "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
            "template": _pod(config, name, values, cpus=2.0, gpus=0.0, ports=True),
        },
    }


def _group(
    group: str, *, cpus: float, gpus: float, least: int, most: int, name: str, config: Config, values: Values
) -> dict[str, Any]:
    return {
        "groupName": group,
        "replicas": least,
        "minReplicas": least,
        "maxReplicas": most,
        "rayStartParams": {},
        "template": _pod(config, name, values, cpus=cpus, gpus=gpus, ports=False),
    }


def _pod(config: Config, name: str, values: Values, *, cpus: float, gpus: float, ports: bool) -> dict[str, Any]:
    amounts: dict[str, str] = {"cpu": f"{math.ceil(cpus * 1000)}m", "memory": values.memory}
    if gpus > 0:
        # A share of a GPU takes a whole one of the node; several workers of the group share it inside Ray.
        amounts["nvidia.com/gpu"] = str(math.ceil(gpus))
    mounts = [{"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True}]
    volumes: list[dict[str, Any]] = [
        {"name": "config", "configMap": {"name": f"{name}-config"}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]
    mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    if not _is_elsewhere(config):
        mounts.append({"name": "storage", "mountPath": STORAGE_FOLDER})
        volumes.append({"name": "storage", "persistentVolumeClaim": {"claimName": f"{name}-storage"}})
    container: dict[str, Any] = {
        "name": "ray-head" if ports else "ray-worker",
        "image": values.image,
        "resources": {"requests": dict(amounts), "limits": dict(amounts)},
        "env": [
            {
                "name": STATE_VARIABLE,
                "valueFrom": {"secretKeyRef": {"name": values.secret, "key": "state_url"}},
            },
            {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"},
            *({"name": variable, "value": value} for variable, value in SERVING.items()),
        ],
        "volumeMounts": mounts,
    }
    if ports:
        numbers: Sequence[tuple[str, int]] = (
            ("gcs-server", 6379),
            ("dashboard", 8265),
            ("client", 10001),
            ("serve", config.runtime.endpoint.port or 8000),
        )
        container["ports"] = [{"name": each, "containerPort": number} for each, number in numbers]
    spec: dict[str, Any] = {"containers": [container], "volumes": volumes}
    if gpus > 0:
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return {"metadata": {"labels": {"app.kubernetes.io/part-of": "aifactory"}}, "spec": spec}


# ── a cycle, and the endpoint ─────────────────────────────────────────────────────────────────────────────────────────


def _job(name: str) -> dict[str, Any]:
    """A cycle in the lasting cluster; applied again under another name it is another run, which does only what is left to do."""
    return {
        "clusterSelector": {"ray.io/cluster": name},
        "entrypoint": f"python -m aifactory run --config {CONFIG_FOLDER}/{CONFIG_NAME}",
        "submissionMode": "K8sJobMode",
        "submitterConfig": {"backoffLimit": 2},
        "shutdownAfterJobFinishes": False,
    }


def _service(config: Config, name: str, values: Values) -> dict[str, Any]:
    import yaml

    endpoint = config.runtime.endpoint
    application = {
        "name": app_name(config.name),
        "route_prefix": endpoint.route_prefix,
        "import_path": IMPORT_PATH,
        "args": {"config": f"{CONFIG_FOLDER}/{CONFIG_NAME}"},
    }
    serve = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": endpoint.port or 8000},
        "applications": [application],
    }
    return {
        "serveConfigV2": yaml.safe_dump(serve, sort_keys=False),
        "rayClusterConfig": _serving(config, name, values),
    }
