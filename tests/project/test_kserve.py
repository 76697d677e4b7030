"""KServe's manifests beside kustomize's base: the same server behind another front."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.helm.accepting import VERSIONS, accept, pod_of
from tests.project.test_deployment import BASE, DOCKER, container, only, pod

Yaml = dict[str, Any]
KSERVE = DOCKER / "kserve"
MOUNT = "/mnt/models"  # where KServe puts what `storageUri` names


def load(name: str) -> Yaml:
    return yaml.safe_load((KSERVE / f"{name}.yaml").read_text())


def runtime() -> Yaml:
    return load("servingruntime")["spec"]


def predictor() -> Yaml:
    return load("inferenceservice")["spec"]["predictor"]


def command(container: Yaml) -> list[str]:
    """Its whole command line; a `command` that is left out is the image's."""
    program = container.get("command", json.loads(only("ENTRYPOINT")))
    joined = " ".join([*program, *container["args"]])
    return joined.replace("--repository ", "--repository=").split()


def test_every_file_is_of_a_known_kind() -> None:
    kinds = {path.name: yaml.safe_load(path.read_text())["kind"] for path in KSERVE.iterdir()}
    assert kinds == {
        "servingruntime.yaml": "ServingRuntime",
        "inferenceservice.yaml": "InferenceService",
    }


@pytest.mark.parametrize("name", ["servingruntime", "inferenceservice"])
def test_its_fields_are_kserves(name: str) -> None:
    accept(load(name))


def test_an_unknown_field_is_found() -> None:
    wrong = load("inferenceservice")
    wrong["spec"]["predictor"]["model"]["storageURI"] = "pvc://a"
    with pytest.raises(jsonschema.ValidationError, match="storageURI"):
        accept(wrong)


def test_kubernetes_accepts_its_pod() -> None:
    """The runtime's containers with the service's fields, as KServe joins them."""
    inside = {k: runtime()[k] for k in ("containers", "volumes", "tolerations")}
    own = ("model", "minReplicas", "deploymentStrategy")
    inside |= {k: v for k, v in predictor().items() if k not in own}
    deployment = yaml.safe_load((BASE / "deployment.yaml").read_text())
    deployment["spec"]["strategy"] = predictor()["deploymentStrategy"]
    for version in VERSIONS:
        kubernetes_validate.validate(pod_of(inside), version, strict=True)
        kubernetes_validate.validate(deployment, version, strict=True)


def test_the_container_is_the_bases() -> None:
    [ours] = runtime()["containers"]
    base = container()
    at_mount = [word.replace("=/models", f"={MOUNT}") for word in command(base)]
    assert command(ours) == at_mount
    same = ("env", "resources", "lifecycle", "securityContext")
    assert {key: ours[key] for key in same} == {key: base[key] for key in same}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        expected = json.loads(json.dumps(base[probe]).replace("=/models", f"={MOUNT}"))
        assert ours[probe] == expected
    mounts = [mount for mount in base["volumeMounts"] if mount["name"] != "repository"]
    assert ours["volumeMounts"] == mounts, "the repository is mounted by KServe"
    volumes = [volume for volume in pod()["volumes"] if volume["name"] != "repository"]
    assert runtime()["volumes"] == volumes
    assert runtime()["tolerations"] == pod()["tolerations"]


def test_the_pod_is_the_bases() -> None:
    same = (
        "automountServiceAccountToken",
        "enableServiceLinks",
        "terminationGracePeriodSeconds",
        "securityContext",
    )
    assert {key: predictor()[key] for key in same} == {key: pod()[key] for key in same}
    strategy = yaml.safe_load((BASE / "deployment.yaml").read_text())["spec"]["strategy"]
    assert predictor()["deploymentStrategy"] == strategy
    [spread] = predictor()["topologySpreadConstraints"]
    name = load("inferenceservice")["metadata"]["name"]
    assert spread.pop("labelSelector")["matchLabels"] == {
        "serving.kserve.io/inferenceservice": name
    }
    [expected] = pod()["topologySpreadConstraints"]
    del expected["labelSelector"]
    assert spread == expected


def test_the_service_finds_its_runtime() -> None:
    model = predictor()["model"]
    assert model["runtime"] == load("servingruntime")["metadata"]["name"]
    assert model["modelFormat"] in runtime()["supportedModelFormats"]
    assert model["protocolVersion"] in runtime()["protocolVersions"]
    [claim] = [v["persistentVolumeClaim"] for v in pod()["volumes"] if v["name"] == "repository"]
    assert model["storageUri"] == f"pvc://{claim['claimName']}"


def test_kserve_knows_that_the_port_is_grpc() -> None:
    [ours] = runtime()["containers"]
    assert ours["name"] == "kserve-container"
    [port] = ours["ports"]
    assert port["name"] == "h2c"
    ports = {p["name"]: p["containerPort"] for p in container()["ports"]}
    assert port["containerPort"] == ports["grpc"]
    assert runtime()["annotations"]["prometheus.kserve.io/port"] == str(ports["metrics"])
