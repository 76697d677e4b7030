"""What a cluster would refuse in a manifest: unknown fields and wrong types.

Kubernetes' own kinds have its published schemas (kubernetes-validate). The schemas of Prometheus'
operator and of KServe come in no package that is installed here. `CUSTOM` restates, by hand, the
fields that this project's manifests use, as prometheus-operator 0.93 and KServe 0.20 publish them.
Another field may exist, and is refused here until somebody has looked it up.
"""

from __future__ import annotations

from typing import Any

import kubernetes_validate
from jsonschema import Draft202012Validator

Yaml = dict[str, Any]

# The oldest whose preStop has `sleep` by default, and the newest there is a schema of.
VERSIONS = ("1.30", kubernetes_validate.latest_version())
_TEXT = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}
_LABELS = {"type": "object", "additionalProperties": _TEXT}
_ANY = {"type": "object"}


def _fields(required: list[str] | None = None, **properties: Any) -> Yaml:
    return {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "required": required or [],
    }


def _list(item: Yaml) -> Yaml:
    return {"type": "array", "items": item, "minItems": 1}


def _monitor(endpoints: str) -> Yaml:
    endpoint = _fields(
        ["port"], port=_TEXT, interval={"type": "string", "pattern": r"^\d+(ms|s|m|h)$"}
    )
    spec = {
        "jobLabel": _TEXT,
        "selector": _fields(matchLabels=_LABELS),
        endpoints: _list(endpoint),
    }
    return _fields(["selector", endpoints], **spec)


_PROTOCOLS = {"enum": ["v1", "v2", "grpc-v1", "grpc-v2"]}
_FORMAT = _fields(["name"], name=_TEXT, version=_TEXT)
_RUNTIME = _fields(
    ["containers", "supportedModelFormats"],
    annotations=_LABELS,
    supportedModelFormats=_list(_FORMAT),
    protocolVersions=_list(_PROTOCOLS),
    # These two, and the containers, are a pod's: `pod_of` has Kubernetes' schema check them.
    tolerations=_list(_ANY),
    volumes=_list(_ANY),
    containers=_list(_ANY),
)
_MODEL = _fields(
    ["modelFormat", "storageUri"],
    runtime=_TEXT,
    modelFormat=_FORMAT,
    protocolVersion=_PROTOCOLS,
    storageUri={"type": "string", "pattern": r"^(pvc|s3|gs|https?)://"},
)
_PREDICTOR = _fields(
    ["model"],
    minReplicas=_COUNT,
    deploymentStrategy=_ANY,
    automountServiceAccountToken={"type": "boolean"},
    enableServiceLinks={"type": "boolean"},
    terminationGracePeriodSeconds=_COUNT,
    securityContext=_ANY,
    topologySpreadConstraints=_list(_ANY),
    model=_MODEL,
)
CUSTOM = {
    "PodMonitor": ("monitoring.coreos.com/v1", _monitor("podMetricsEndpoints")),
    "ServiceMonitor": ("monitoring.coreos.com/v1", _monitor("endpoints")),
    "ServingRuntime": ("serving.kserve.io/v1alpha1", _RUNTIME),
    "InferenceService": ("serving.kserve.io/v1beta1", _fields(["predictor"], predictor=_PREDICTOR)),
}


def accept(manifest: Yaml) -> None:
    """Raise unless every known version of a cluster would take this manifest."""
    if manifest["kind"] in CUSTOM:
        version, spec = CUSTOM[manifest["kind"]]
        metadata = _fields(["name"], name=_TEXT, labels=_LABELS, annotations=_LABELS)
        parts = {"apiVersion": {"const": version}, "kind": _TEXT, "metadata": metadata}
        schema = _fields([*parts, "spec"], **parts, spec=spec)
        Draft202012Validator(schema).validate(manifest)
        return
    for each in VERSIONS:
        kubernetes_validate.validate(manifest, each, strict=True)


def pod_of(spec: Yaml) -> Yaml:
    """A pod with this specification, for Kubernetes' own schema."""
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "any"}, "spec": spec}
