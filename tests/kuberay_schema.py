"""What KubeRay's API `ray.io/v1` takes, reduced by hand from its Go types (RayClusterSpec, RayJobSpec, RayServiceSpec and what they hold).

Not the CRDs themselves, which are in no package registry. Every field of KubeRay's own specs is named, with its type and whether it is
required, and no other is let in, so a field that is misspelt or in the wrong place is found; of a pod's template only what manifests
of ours use, closed in the same way.
"""

from __future__ import annotations

from typing import Any

STRING: dict[str, Any] = {"type": "string"}
COUNT: dict[str, Any] = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
STRINGS: dict[str, Any] = {"type": "object", "additionalProperties": STRING}
BOOLEAN: dict[str, Any] = {"type": "boolean"}
NAME: dict[str, Any] = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}
QUANTITY: dict[str, Any] = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti|P|Pi)?$"}


def closed(*required: str, **fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def listed(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item}


_AMOUNTS = {"type": "object", "additionalProperties": QUANTITY}
_RESOURCES = closed(requests=_AMOUNTS, limits=_AMOUNTS)
_KEY = closed("name", "key", name=NAME, key=STRING)
_VARIABLE = closed("name", name=STRING, value=STRING, valueFrom=closed(secretKeyRef=_KEY))
_MOUNT = closed("name", "mountPath", name=NAME, mountPath=STRING, readOnly=BOOLEAN)
_PORT = closed("containerPort", name=NAME, containerPort={"type": "integer", "minimum": 1, "maximum": 65535})
_CONTAINER = closed(
    "name",
    "image",
    name=NAME,
    image=STRING,
    resources=_RESOURCES,
    env=listed(_VARIABLE),
    volumeMounts=listed(_MOUNT),
    ports=listed(_PORT),
)
_VOLUME = closed(
    "name",
    name=NAME,
    configMap=closed("name", name=NAME),
    emptyDir=closed(medium={"enum": ["", "Memory"]}, sizeLimit=QUANTITY),
    persistentVolumeClaim=closed("claimName", claimName=NAME),
)
_TOLERATION = closed(
    key=STRING,
    operator={"enum": ["Exists", "Equal"]},
    effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
    value=STRING,
)
_POD = closed(
    "spec",
    metadata=closed(labels=STRINGS, annotations=STRINGS),
    spec=closed("containers", containers=listed(_CONTAINER), volumes=listed(_VOLUME), tolerations=listed(_TOLERATION)),
)
_OPEN = {"type": "object"}

CLUSTER_SPEC = closed(
    "headGroupSpec",
    rayVersion=STRING,
    enableInTreeAutoscaling=BOOLEAN,
    suspend=BOOLEAN,
    headServiceAnnotations=STRINGS,
    autoscalerOptions=closed(
        resources=_RESOURCES,
        image=STRING,
        imagePullPolicy={"enum": ["Always", "Never", "IfNotPresent"]},
        env=listed(_VARIABLE),
        envFrom=listed(_OPEN),
        volumeMounts=listed(_MOUNT),
        securityContext=_OPEN,
        idleTimeoutSeconds=COUNT,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    ),
    headGroupSpec=closed(
        "rayStartParams",
        "template",
        serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]},
        headService=_OPEN,
        enableIngress=BOOLEAN,
        rayStartParams=STRINGS,
        template=_POD,
    ),
    workerGroupSpecs=listed(
        closed(
            "groupName",
            "minReplicas",
            "maxReplicas",
            "rayStartParams",
            "template",
            groupName=NAME,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            numOfHosts=COUNT,
            rayStartParams=STRINGS,
            template=_POD,
            scaleStrategy=closed(workersToDelete=listed(STRING), multihostReplicasToDelete=listed(STRING)),
        )
    ),
)
_DELETION = closed("policy", policy={"enum": ["DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"]})
JOB_SPEC = closed(
    activeDeadlineSeconds=COUNT,
    backoffLimit=COUNT,
    rayClusterSpec=CLUSTER_SPEC,
    submitterPodTemplate=_POD,
    metadata=STRINGS,
    clusterSelector=STRINGS,
    submitterConfig=closed(backoffLimit=COUNT),
    managedBy={"enum": ["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"]},
    deletionStrategy=closed("onSuccess", "onFailure", onSuccess=_DELETION, onFailure=_DELETION),
    entrypoint=STRING,
    runtimeEnvYAML=STRING,
    jobId=STRING,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
    entrypointResources=STRING,
    entrypointNumCpus={"type": "number"},
    entrypointNumGpus={"type": "number"},
    ttlSecondsAfterFinished=COUNT,
    shutdownAfterJobFinishes=BOOLEAN,
    suspend=BOOLEAN,
    schedule=STRING,
)
SERVICE_SPEC = closed(
    serveConfigV2=STRING,
    rayClusterConfig=CLUSTER_SPEC,
    serviceUnhealthySecondThreshold=COUNT,
    deploymentUnhealthySecondThreshold=COUNT,
    serveService=_OPEN,
)
_METADATA = closed("name", name=NAME, namespace=NAME, labels=STRINGS, annotations=STRINGS)


def _object(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    return closed(
        "apiVersion",
        "kind",
        "metadata",
        "spec",
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=_METADATA,
        spec=spec,
    )


SCHEMAS = {
    "RayCluster": _object("RayCluster", CLUSTER_SPEC),
    "RayJob": _object("RayJob", JOB_SPEC),
    "RayService": _object("RayService", SERVICE_SPEC),
}
