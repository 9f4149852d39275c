"""The manifests against Kubernetes' published schemas, against KubeRay's fields, and against each other."""

from __future__ import annotations

import copy
import re
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from files import DEPLOY, KUBERAY, command, documents, image, pinned
from kuberay import MAX_NAME, RAY_JOB

from pipeline import config

KUBERNETES = "1.34"
(JOB,) = documents("kuberay/rayjob.yaml")
(KUSTOMIZATION,) = documents("kuberay/kustomization.yaml")
OBJECTS = documents("kuberay/refresh.yaml")
SPEC = JOB["spec"]
CLUSTER = SPEC["rayClusterSpec"]
(GPU,) = CLUSTER["workerGroupSpecs"]
(SCHEDULE,) = [each for each in OBJECTS if each["kind"] == "CronJob"]
TEMPLATES: dict[str, dict[str, Any]] = {
    "submitter": SPEC["submitterPodTemplate"],
    "head": CLUSTER["headGroupSpec"]["template"],
    "gpu": GPU["template"],
    "schedule": SCHEDULE["spec"]["jobTemplate"]["spec"]["template"],
}
MAPS = {each["name"]: each["files"] for each in KUSTOMIZATION["configMapGenerator"]}
SETTINGS = config.load(KUBERAY / "config.yaml")


def names(kind: str) -> set[str]:
    return {each["metadata"]["name"] for each in OBJECTS if each["kind"] == kind}


def container(template: str) -> dict[str, Any]:
    (only,) = TEMPLATES[template]["spec"]["containers"]
    return dict(only)


def mounted(template: str, path: str) -> tuple[str, str]:
    """ConfigMap and key behind a path in a container."""
    (mount,) = [each for each in container(template)["volumeMounts"] if path.startswith(each["mountPath"] + "/")]
    (volume,) = [each for each in TEMPLATES[template]["spec"]["volumes"] if each["name"] == mount["name"]]
    return volume["configMap"]["name"], path.removeprefix(mount["mountPath"] + "/")


@pytest.mark.parametrize("thing", OBJECTS, ids=lambda each: f"{each['kind']} {each['metadata']['name']}")
def test_kubernetes_takes_every_object(thing: dict[str, Any]) -> None:
    kubernetes_validate.validate(thing, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_kubernetes_takes_every_pod(name: str) -> None:
    pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": name}, "template": TEMPLATES[name]}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    pod["template"] = copy.deepcopy(TEMPLATES[name])
    pod["template"]["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="volumeMount"):
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_kuberay_takes_the_job() -> None:
    jsonschema.validate(JOB, RAY_JOB)
    for field, wrong in (("runtimeEnv", {}), ("submissionMode", "Http"), ("ttlSecondsAfterFinished", "600")):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**JOB, "spec": {**SPEC, field: wrong}}, RAY_JOB)


def test_one_image_everywhere_with_the_ray_that_is_pinned() -> None:
    assert CLUSTER["rayVersion"] == pinned("ray")
    assert {container(name)["image"] for name in ("submitter", "head", "gpu")} == {image()}
    for file in ("Dockerfile", "vm/cluster.yaml"):
        assert set(re.findall(r"\S+/frozen-pipeline:\S+", (DEPLOY / file).read_text())) == {image()}


def test_the_job_runs_the_config_that_is_mounted() -> None:
    name, parameters = command(SPEC["entrypoint"])
    assert name == "run"
    assert mounted("head", parameters["path"]) == ("pipeline-config", "config.yaml")
    with pytest.raises(Exception, match="No such option: --retry"):
        command(f"{SPEC['entrypoint']} --retry")
    assert SPEC["submissionMode"] == "K8sJobMode"
    assert "entrypointNumCpus" not in SPEC, "the head has none to give"


def test_the_schedule_creates_that_job() -> None:
    *kubectl, path, cache, _ = container("schedule")["command"]
    assert (kubectl, cache) == (["kubectl", "create", "--filename"], "--cache-dir")
    assert mounted("schedule", path) == ("pipeline-refresh", "rayjob.yaml")


def test_config_maps_are_made_of_files_that_are_there_and_each_is_mounted() -> None:
    used = {mounted("head", command(SPEC["entrypoint"])[1]["path"]), ("pipeline-refresh", "rayjob.yaml")}
    assert {(name, file) for name, files in MAPS.items() for file in files} == used
    assert all((KUBERAY / file).is_file() for files in MAPS.values() for file in files)
    assert KUSTOMIZATION["resources"] == ["refresh.yaml"]
    assert KUSTOMIZATION["generatorOptions"]["disableNameSuffixHash"], "rayjob.yaml names them as they are"


def test_the_actors_ask_for_as_many_gpus_as_there_can_be() -> None:
    limits = container("gpu")["resources"]["limits"]
    assert (GPU["minReplicas"], GPU["replicas"]) == (0, 0)
    assert SETTINGS.run.num_gpus == 1, "no node has a GPU yet: auto would mean CPUs"
    assert SETTINGS.run.workers == GPU["maxReplicas"] * limits["nvidia.com/gpu"]
    assert CLUSTER["enableInTreeAutoscaling"]
    assert (
        CLUSTER["headGroupSpec"]["rayStartParams"] | {"num-cpus": "0", "num-gpus": "0"}
        == (CLUSTER["headGroupSpec"]["rayStartParams"])
    )
    tolerated = {each["key"] for each in GPU["template"]["spec"]["tolerations"]}
    assert {"nvidia.com/gpu", "cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"} <= tolerated
    assert all(GPU["template"]["spec"]["nodeSelector"].values())
    for name in TEMPLATES:
        resources = container(name)["resources"]
        assert {"cpu", "memory"} <= resources["requests"].keys() & resources["limits"].keys()


def test_one_night_ends_before_the_next() -> None:
    minute, hour, *rest = SCHEDULE["spec"]["schedule"].split()
    assert minute.isdigit() and hour.isdigit() and rest == ["*", "*", "*"], "every night"
    interval_s, tries = 24 * 3600, 1 + SPEC["backoffLimit"]
    # KubeRay lets a cluster that is past its deadline live on like one that has finished.
    assert tries * (SPEC["activeDeadlineSeconds"] + SPEC["ttlSecondsAfterFinished"]) < interval_s
    assert SPEC["preRunningDeadlineSeconds"] < SPEC["activeDeadlineSeconds"]
    assert SPEC["shutdownAfterJobFinishes"], "ttlSecondsAfterFinished means nothing without it"
    assert SCHEDULE["spec"]["concurrencyPolicy"] == "Forbid"
    assert SCHEDULE["spec"]["startingDeadlineSeconds"] < interval_s


def test_names_fit() -> None:
    assert len(JOB["metadata"]["generateName"]) + 5 <= MAX_NAME
    assert "name" not in JOB["metadata"], "every night is a job of its own"
    assert len(SCHEDULE["metadata"]["name"]) <= 52
    namespaces = {each["metadata"]["namespace"] for each in [JOB, *OBJECTS] if each["kind"] != "Namespace"}
    assert namespaces == names("Namespace") == {KUSTOMIZATION["namespace"]}


def test_the_schedule_may_create_jobs_and_nothing_else() -> None:
    (role,) = [each for each in OBJECTS if each["kind"] == "Role"]
    (binding,) = [each for each in OBJECTS if each["kind"] == "RoleBinding"]
    (subject,) = binding["subjects"]
    assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create"]}]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    account = TEMPLATES["schedule"]["spec"]["serviceAccountName"]
    assert (subject["name"], subject["namespace"]) == (account, KUSTOMIZATION["namespace"])
    assert {TEMPLATES[name]["spec"]["serviceAccountName"] for name in ("head", "gpu")} == names("ServiceAccount") - {account}
    # Workers run models and decoders: they have no way into the cluster's API.
    assert not any(TEMPLATES[name]["spec"]["automountServiceAccountToken"] for name in ("submitter", "gpu"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_nothing_runs_as_root_or_may_become_it(name: str) -> None:
    """The fields that Kubernetes' restricted pod security standard asks for."""
    pod, only = TEMPLATES[name]["spec"], container(name)
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for context in (only["securityContext"], CLUSTER["autoscalerOptions"]["securityContext"]):
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
    assert not any("hostPath" in volume for volume in pod.get("volumes", []))


def test_secrets_are_referred_to_and_the_cluster_wants_a_token() -> None:
    assert CLUSTER["authOptions"] == {"mode": "token"}
    references = [each for name in ("head", "gpu") for each in container(name)["envFrom"]]
    assert references == [{"secretRef": {"name": "pipeline-credentials", "optional": True}}] * 2
    given = {each["name"] for name in TEMPLATES for each in container(name).get("env", []) if "value" in each}
    assert given == {"RAY_JOB_STOP_WAIT_TIME_S"}
    assert not SETTINGS.source.storage.options and not SETTINGS.output.storage.options
    assert not any(each["kind"] == "Secret" for each in OBJECTS)
