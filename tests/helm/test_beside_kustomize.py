"""The chart's defaults beside kustomize's base, and charts that are broken on purpose."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

from tests.helm.accepting import accept
from tests.helm.conftest import CHART, HARDENED, Rendered, Yaml, server
from tests.project.test_deployment import BASE, MONITORED, only

pytestmark = pytest.mark.slow

MANAGED = {
    "app.kubernetes.io/instance",
    "app.kubernetes.io/version",
    "app.kubernetes.io/managed-by",
    "helm.sh/chart",
}
Helm = Callable[..., list[Rendered]]
Kustomize = Callable[[Path], dict[str, Yaml]]


def plain(manifest: Yaml, image: str) -> Yaml:
    """A manifest without what only Helm writes, and with its command in one list."""
    text = json.dumps(manifest)
    found: Yaml = json.loads(text)

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            for key in ("labels", "matchLabels", "selector"):
                if isinstance(value.get(key), dict):
                    for label in MANAGED & set(value[key]):
                        del value[key][label]
            if value.get("labels") == {}:
                del value["labels"]
            if "image" in value:
                command = value.pop("command", json.loads(only("ENTRYPOINT")))
                joined = " ".join([*command, *value["args"]])
                value["args"] = joined.replace("--repository ", "--repository=").split()
                value.pop("imagePullPolicy", None)
                assert value["image"].split(":")[0] == image
                del value["image"]
        for each in value.values() if isinstance(value, dict) else value:
            if isinstance(each, dict | list):
                walk(each)

    walk(found)
    if found["metadata"].get("labels") == {"app.kubernetes.io/name": "triward"}:
        del found["metadata"]["labels"]  # the chart labels everything, the base what needs it
    return found


def same(rendered: Rendered, built: dict[str, Yaml]) -> None:
    objects = {k: plain(o, "triward") for k, o in rendered.objects.items() if k != "Test"}
    assert objects == {kind: plain(manifest, "triward") for kind, manifest in built.items()}


class TestBesideKustomize:
    """The defaults are the base: security, ports, probes, arguments, volumes and the rest."""

    def test_the_defaults_are_the_base(
        self, matrix: dict[str, Rendered], kustomize: Kustomize
    ) -> None:
        same(matrix["defaults"], kustomize(BASE))

    def test_monitored_is_two_values(self, helm: Helm, kustomize: Kustomize) -> None:
        [rendered] = helm("{podMonitor: {enabled: true}, autoscaling: {enabled: true}}")
        built = kustomize(MONITORED)
        assert {"PodMonitor", "HorizontalPodAutoscaler"} <= set(built)
        same(rendered, built)


class TestABrokenChart:
    """Controls: each of these checks finds what it is for."""

    @pytest.fixture
    def broken(self, helm: Helm, tmp_path: Path) -> Callable[..., Rendered]:
        def render(file: str, old: str, new: str, values: str = "{}") -> Rendered:
            chart = Path(shutil.copytree(CHART, tmp_path / "triward"))
            text = (chart / file).read_text()
            assert re.search(old, text), f"{file} has no {old}"
            (chart / file).write_text(re.sub(old, new, text, count=1))
            return helm(values, chart=chart)[0]

        return render

    def test_indentation(self, broken: Callable[..., Rendered]) -> None:
        found = broken("templates/deployment.yaml", r"volumes\" \. \| trim \| nindent 8",
                       'volumes" . | trim | nindent 4')  # fmt: skip
        assert found.lint and "YAML" in found.error

    def test_a_field_in_the_wrong_place(self, broken: Callable[..., Rendered]) -> None:
        found = broken("templates/_container.tpl", "\nlifecycle:", "\nlifecycles:")
        with pytest.raises(kubernetes_validate.ValidationError, match="lifecycles"):
            accept(found.objects["Deployment"])

    def test_a_field_of_a_custom_resource(self, broken: Callable[..., Rendered]) -> None:
        on = "podMonitor: {enabled: true}"
        found = broken("templates/podmonitor.yaml", "jobLabel", "joblabel", on)
        with pytest.raises(jsonschema.ValidationError, match="joblabel"):
            accept(found.objects["PodMonitor"])

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("containerPort: 8001", "containerPort: 8011"),
            (r"readinessProbe:\n(  .*\n)+", ""),
            (r" - serve\n", " - serve\n  - --verify=off\n"),
            ("health, --timeout=30, --deep", "health, --timeout=30"),
            ("mountPath: /dev/shm", "mountPath: /shm"),
        ],
    )
    def test_another_server_than_the_base(
        self,
        broken: Callable[..., Rendered],
        kustomize: Kustomize,
        old: str,
        new: str,
    ) -> None:
        with pytest.raises(AssertionError):
            same(broken("templates/_container.tpl", old, new), kustomize(BASE))

    def test_less_hardening(self, broken: Callable[..., Rendered]) -> None:
        found = broken("templates/_helpers.tpl", "readOnlyRootFilesystem: true",
                       "readOnlyRootFilesystem: false")  # fmt: skip
        assert server(found)["securityContext"] != HARDENED
