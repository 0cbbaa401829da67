"""Laws of the manifests: KubeRay takes them, they ask for what the configuration says, and what pods read is what was meant."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from kuberay_schema import SCHEMAS

from aifactory.cluster.kubernetes import CONFIG_NAME, STATE_VARIABLE, Values, kubernetes_name, manifests
from aifactory.cluster.session import SERVING
from aifactory.config import Config
from aifactory.errors import ConfigError

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "configs" / "kubernetes" / "quickstart.yaml"
VALUES = Values(
    image="registry/aifactory:1",
    namespace="models",
    secret="postgres",
    storage_class="shared",
    storage_size="1Ti",
    memory="64Gi",
    max_workers=6,
    idle_s=120,
)
GPUS = """\
name: chat-7b
ingest: {sources: [{name: docs, kind: text, path: /data/docs}]}
runtime:
  storage: s3://bucket/factories
  workers: [2, 8]
  gpus_per_worker: 1
  cpus_per_worker: 7.5
  endpoint: {replicas: [2, 5], gpus_per_replica: 1, cpus_per_replica: 4, port: 8100}
"""


def config_of(text: str, *overrides: str) -> Config:
    return Config.from_text(text, origin="test", overrides=overrides)


def by_kind(config: Config) -> dict[str, Any]:
    return {each["kind"]: each for each in manifests(config, VALUES)}


@pytest.mark.parametrize("overrides", [(), ("runtime.storage=/mnt/shared",), ("runtime.endpoint.mode=resilient",)])
def test_kuberay_takes_them(overrides: tuple[str, ...]) -> None:
    found = by_kind(config_of(GPUS, *overrides))

    for kind, schema in SCHEMAS.items():
        jsonschema.validate(found[kind], schema)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key of a manifest, by the way to it; but for those that name what they like."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if at[-1:] not in (("labels",), ("requests",), ("limits",), ("rayStartParams",), ("clusterSelector",)):
                yield (*at, key)
            yield from places(inner, (*at, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from places(inner, (*at, number))


@pytest.mark.parametrize("kind", list(SCHEMAS))
def test_the_schema_finds_every_key_that_is_misspelt(kind: str) -> None:
    """The negative control: no part of a manifest is looked at by nobody."""
    manifest = by_kind(config_of(GPUS))[kind]
    ways = list(places(manifest))
    assert len(ways) > 10
    validator = jsonschema.validators.validator_for(SCHEMAS[kind])(
        SCHEMAS[kind]
    )  # which looks at the schema itself once
    for way in ways:
        changed = copy.deepcopy(manifest)
        at = changed
        for key in way[:-1]:
            at = at[key]
        at[f"{way[-1]}x"] = at.pop(way[-1])
        with pytest.raises(jsonschema.ValidationError):
            validator.validate(changed)


def test_pods_ask_for_what_the_configuration_says() -> None:
    found = by_kind(config_of(GPUS))
    (training,) = found["RayCluster"]["spec"]["workerGroupSpecs"]
    (serving,) = found["RayService"]["spec"]["rayClusterConfig"]["workerGroupSpecs"]

    limits = training["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"cpu": "7500m", "memory": "64Gi", "nvidia.com/gpu": "1"}
    assert (training["minReplicas"], training["maxReplicas"]) == (0, 8)
    assert (serving["minReplicas"], serving["maxReplicas"]) == (2, 5)
    assert serving["template"]["spec"]["tolerations"]
    head = found["RayCluster"]["spec"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in head["template"]["spec"]["containers"][0]["resources"]["limits"]
    # Serve's controller and its proxies read how they are to work when they start.
    for pod in (found["RayService"]["spec"]["rayClusterConfig"]["headGroupSpec"], serving):
        variables = {each["name"]: each.get("value") for each in pod["template"]["spec"]["containers"][0]["env"]}
        assert SERVING.items() <= variables.items()
    serve = yaml.safe_load(found["RayService"]["spec"]["serveConfigV2"])
    assert serve["http_options"]["port"] == 8100
    assert found["RayJob"]["spec"]["clusterSelector"] == {"ray.io/cluster": found["RayCluster"]["metadata"]["name"]}


def test_pods_read_the_same_recipe_with_places_that_are_the_same_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(GPUS, "runtime.storage=/home/me/factories")
    found = by_kind(config)
    monkeypatch.setenv(STATE_VARIABLE, "postgresql+psycopg://u:secret@db/factory")

    text = found["ConfigMap"]["data"][CONFIG_NAME]
    read = Config.from_text(text, origin=CONFIG_NAME)

    sections = ("ingest", "tokenize", "model", "train", "evaluate", "promote", "improve")
    assert read.recipe(*sections) == config.recipe(*sections)
    assert read.runtime.state_url == "postgresql+psycopg://u:secret@db/factory"
    assert "secret" not in text
    mounts = found["RayCluster"]["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert read.runtime.storage in [mount["mountPath"] for mount in mounts]
    assert found["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]


def test_what_every_pod_mounts_and_reads_is_there() -> None:
    for overrides in ((), ("runtime.storage=/mnt/shared",)):
        found = by_kind(config_of(GPUS, *overrides))
        names = {each["metadata"]["name"] for each in found.values()}
        clusters = [found["RayCluster"]["spec"], found["RayService"]["spec"]["rayClusterConfig"]]
        groups = [group for c in clusters for group in (c["headGroupSpec"], *c["workerGroupSpecs"])]
        for group in groups:
            spec = group["template"]["spec"]
            volumes = {volume["name"]: volume for volume in spec["volumes"]}
            assert {mount["name"] for mount in spec["containers"][0]["volumeMounts"]} == set(volumes)
            assert volumes["config"]["configMap"]["name"] in names
            if "storage" in volumes:
                assert volumes["storage"]["persistentVolumeClaim"]["claimName"] in names


def test_books_on_one_pods_disk_and_amounts_that_are_none_are_refused() -> None:
    with pytest.raises(ConfigError, match="found SQLite"):
        by_kind(config_of(GPUS, "runtime.state_url=sqlite:////data/state.db"))
    with pytest.raises(ConfigError, match="--memory"):
        manifests(config_of(GPUS), Values(**{**{n: getattr(VALUES, n) for n in VALUES.__slots__}, "memory": "much"}))


def test_a_name_is_a_dns_label_with_room_for_what_kuberay_appends_and_two_factories_have_two() -> None:
    names = ["a", "chat-7b", "b-", "x" * 40, "x" * 39 + "y", "x-" * 20]
    made = [kubernetes_name(name) for name in names]
    for each in made:
        assert len(f"{each}-serve") <= 40
        jsonschema.validate(each, {"pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"})
    assert len(set(made)) == len({name.rstrip("-") for name in names})


def test_the_example_is_what_the_command_prints() -> None:
    command = [sys.executable, "-m", "aifactory", "kubernetes", "configs/quickstart.yaml"]
    command += ["--image", "registry.example.com/aifactory:1", "--storage-class", "shared"]

    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=True)

    assert EXAMPLE.read_text(encoding="utf-8") == done.stdout
    for manifest in yaml.safe_load_all(done.stdout):
        if manifest["kind"] in SCHEMAS:
            jsonschema.validate(manifest, SCHEMAS[manifest["kind"]])
