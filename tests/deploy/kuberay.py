"""The fields of a RayJob as KubeRay 1.7 has them: what Kubernetes' own schemas leave open.

From the API reference of `ray.io/v1`. Pod templates, resources and the like are Kubernetes' and checked by its schemas.
"""

from __future__ import annotations

from typing import Any

TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
BOOL: dict[str, Any] = {"type": "boolean"}
COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
SECONDS: dict[str, Any] = {"type": "integer", "minimum": 1}
NUMBER: dict[str, Any] = {"type": "number", "minimum": 0}
OF_KUBERNETES: dict[str, Any] = {"type": "object"}
TEXTS: dict[str, Any] = {"type": "object", "additionalProperties": {"type": "string"}}
"""`num-cpus: 0` without quotes is refused by the API server."""


def one_of(*names: str) -> dict[str, Any]:
    return {"enum": list(names)}


def mapping(required: str = "", **fields: Any) -> dict[str, Any]:
    """A mapping of these fields and no others."""
    return {"type": "object", "properties": fields, "required": required.split(), "additionalProperties": False}


AUTOSCALER_OPTIONS = mapping(
    resources=OF_KUBERNETES,
    image=TEXT,
    imagePullPolicy=one_of("Always", "IfNotPresent", "Never"),
    securityContext=OF_KUBERNETES,
    idleTimeoutSeconds=SECONDS,
    upscalingMode=one_of("Default", "Aggressive", "Conservative"),
    version=one_of("v1", "v2"),
    env={"type": "array"},
    envFrom={"type": "array"},
    volumeMounts={"type": "array"},
    command={"type": "array"},
    args={"type": "array"},
)
HEAD_GROUP = mapping(
    "template rayStartParams",
    template=OF_KUBERNETES,
    headService=OF_KUBERNETES,
    enableIngress=BOOL,
    resources=TEXTS,
    labels=TEXTS,
    rayStartParams=TEXTS,
    serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
)
WORKER_GROUP = mapping(
    "groupName minReplicas maxReplicas rayStartParams template",
    suspend=BOOL,
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    idleTimeoutSeconds=SECONDS,
    priority={"type": "integer"},
    resources=TEXTS,
    labels=TEXTS,
    rayStartParams=TEXTS,
    template=OF_KUBERNETES,
    scaleStrategy=OF_KUBERNETES,
    numOfHosts=SECONDS,
)
RAY_CLUSTER_SPEC = mapping(
    "headGroupSpec",
    upgradeStrategy=mapping(type=one_of("Recreate", "None")),
    authOptions=mapping(mode=one_of("token", "disabled"), secretName=TEXT, enableK8sTokenAuth=BOOL),
    suspend=BOOL,
    managedBy=TEXT,
    autoscalerOptions=AUTOSCALER_OPTIONS,
    headServiceAnnotations=TEXTS,
    enableInTreeAutoscaling=BOOL,
    gcsFaultToleranceOptions=OF_KUBERNETES,
    networkPolicy=OF_KUBERNETES,
    tlsOptions=mapping(enabled=BOOL),
    headGroupSpec=HEAD_GROUP,
    rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    workerGroupSpecs={"type": "array", "items": WORKER_GROUP},
)
RAY_JOB_SPEC = mapping(
    "entrypoint",
    activeDeadlineSeconds=SECONDS,
    backoffLimit=COUNT,
    rayClusterSpec=RAY_CLUSTER_SPEC,
    submitterPodTemplate=OF_KUBERNETES,
    metadata=TEXTS,
    clusterSelector=TEXTS,
    submitterConfig=mapping(backoffLimit=COUNT),
    managedBy=TEXT,
    deletionStrategy=OF_KUBERNETES,
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    jobId=TEXT,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    entrypointResources=TEXT,
    entrypointNumCpus=NUMBER,
    entrypointNumGpus=NUMBER,
    ttlSecondsAfterFinished=COUNT,
    preRunningDeadlineSeconds=SECONDS,
    shutdownAfterJobFinishes=BOOL,
    suspend=BOOL,
)
RAY_JOB = mapping(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=OF_KUBERNETES,
    spec=RAY_JOB_SPEC,
)
MAX_NAME = 47
"""Of a RayJob: what KubeRay hangs onto it has to fit into the 63 characters of a label."""
