"""What KubeRay's API `ray.io/v1` takes, reduced by hand from its CRDs and Go types (RayClusterSpec, RayJobSpec, RayServiceSpec and what they hold).

Not the CRDs themselves, which are in no package registry and of a megabyte each. Every field of KubeRay's own specs is named, with its
type and whether it is required, and no other is let in, so a field that is misspelt or in the wrong place is found; of a pod's
template only what manifests of ours use, closed in the same way.

Compared on 2026-11-26 with github.com/ray-project/kuberay, main after 1.6.0: CRDs of RayCluster and RayService
(helm-chart/kuberay-operator/crds) and raycluster_types.go at 02a80a6f2abf; rayjob_types.go and rayservice_types.go between 1.5 and that.
Names and what holds for them are the operator's own (controllers/ray/utils/validation.go, constant.go), which no CRD says.

Stricter than they are, on purpose: `rayStartParams` is optional since 1.6, and an operator from before refuses what has none; an image,
a Secret's name, a mount's path and amounts with their units are required or of one form, because ours always have them.
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


def named(longest: int) -> dict[str, Any]:
    """Metadata of an object with a name that the operator takes: a DNS label of RFC 1035, which begins with a letter."""
    name = {"type": "string", "maxLength": longest, "pattern": r"^[a-z]([-a-z0-9]*[a-z0-9])?$"}
    return closed("name", name=name, namespace=NAME, labels=STRINGS, annotations=STRINGS)


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
_MANAGED_BY = {"enum": ["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"]}

CLUSTER_SPEC = closed(
    "headGroupSpec",
    rayVersion=STRING,
    enableInTreeAutoscaling=BOOLEAN,
    suspend=BOOLEAN,
    idleSuspend=BOOLEAN,
    idleTerminationOptions=closed("timeoutSeconds", timeoutSeconds=COUNT, policy={"enum": ["Delete", "Suspend"]}),
    managedBy=_MANAGED_BY,
    headServiceAnnotations=STRINGS,
    authOptions=closed(mode={"enum": ["disabled", "token"]}, secretName=STRING, enableK8sTokenAuth=BOOLEAN),
    upgradeStrategy=closed(type={"enum": ["Recreate", "None"]}),
    tlsOptions=closed(enabled=BOOLEAN),
    gcsFaultToleranceOptions=_OPEN,
    historyServerOptions=_OPEN,
    networkPolicy=_OPEN,
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
        version={"enum": ["v1", "v2"]},
        command=listed(STRING),
        args=listed(STRING),
    ),
    headGroupSpec=closed(
        "rayStartParams",
        "template",
        serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]},
        headService=_OPEN,
        enableIngress=BOOLEAN,
        ingressOptions=_OPEN,
        resources=STRINGS,
        labels=STRINGS,
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
            suspend=BOOLEAN,
            idleTimeoutSeconds=COUNT,
            priority={"type": "integer"},
            resources=STRINGS,
            labels=STRINGS,
            rayStartParams=STRINGS,
            template=_POD,
            scaleStrategy=closed(workersToDelete=listed(STRING), scaleGate=listed(closed("type", type=STRING))),
            topology=closed(labelMappings=listed(closed("nodeLabel", nodeLabel=STRING, mapTo=STRING))),
        )
    ),
)
_POLICY = {"enum": ["DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"]}
_DELETION = closed(policy=_POLICY)
_CONDITION = closed(
    jobStatus={"enum": ["SUCCEEDED", "FAILED"]}, jobDeploymentStatus={"enum": ["Failed"]}, ttlSeconds=COUNT
)
JOB_SPEC = closed(
    activeDeadlineSeconds=COUNT,
    backoffLimit=COUNT,
    rayClusterSpec=CLUSTER_SPEC,
    submitterPodTemplate=_POD,
    metadata=STRINGS,
    clusterSelector=STRINGS,
    submitterConfig=closed(backoffLimit=COUNT),
    managedBy=_MANAGED_BY,
    deletionStrategy=closed(
        onSuccess=_DELETION,
        onFailure=_DELETION,
        deletionRules=listed(closed("policy", "condition", policy=_POLICY, condition=_CONDITION)),
    ),
    entrypoint=STRING,
    runtimeEnvYAML=STRING,
    jobId=STRING,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    entrypointResources=STRING,
    entrypointNumCpus={"type": "number"},
    entrypointNumGpus={"type": "number"},
    ttlSecondsAfterFinished=COUNT,
    shutdownAfterJobFinishes=BOOLEAN,
    suspend=BOOLEAN,
)
# What the operator asks for beyond types: a cluster of its own, or the name of one that lasts.
JOB_SPEC["oneOf"] = [
    {"required": ["rayClusterSpec"]},
    {"required": ["clusterSelector"], "properties": {"clusterSelector": {"required": ["ray.io/cluster"]}}},
]
SERVICE_SPEC = closed(
    "rayClusterConfig",
    serveConfigV2=STRING,
    rayClusterConfig=CLUSTER_SPEC,
    serviceUnhealthySecondThreshold=COUNT,
    deploymentUnhealthySecondThreshold=COUNT,
    serveService=_OPEN,
    excludeHeadPodFromServeSvc=BOOLEAN,
    rayClusterDeletionDelaySeconds=COUNT,
    managedBy=_MANAGED_BY,
    upgradeStrategy=_OPEN,
)


def _object(kind: str, longest: int, spec: dict[str, Any]) -> dict[str, Any]:
    return closed(
        "apiVersion",
        "kind",
        "metadata",
        "spec",
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=named(longest),
        spec=spec,
    )


# KubeRay appends up to ten characters to a cluster's name (63 are a label's), and six to a job's or service's for its cluster.
SCHEMAS = {
    "RayCluster": _object("RayCluster", 53, CLUSTER_SPEC),
    "RayJob": _object("RayJob", 47, JOB_SPEC),
    "RayService": _object("RayService", 47, SERVICE_SPEC),
}
