"""What Helm and kustomize make of the chart and the base, in the environment of `make chart`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

CHART = ROOT / "docker" / "helm" / "triward"
CASES = {path.stem: path.read_text() for path in sorted((CHART / "ci").glob("*.yaml"))}
BIN = ROOT / ".venv-helm" / "bin"

HARDENED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}

Yaml = dict[str, Any]


@dataclass(frozen=True)
class Rendered:
    """What Helm made of one case.

    Args:
        lint: its findings, warnings included.
        objects: manifests by kind; the pod of `helm test` is `Test`.
        notes: what an install prints.
        error: why nothing was rendered, or "".
    """

    lint: list[str]
    objects: dict[str, Yaml]
    notes: str
    error: str


def pod(rendered: Rendered) -> Yaml:
    return rendered.objects["Deployment"]["spec"]["template"]["spec"]


def server(rendered: Rendered) -> Yaml:
    """The container that serves."""
    [container] = pod(rendered)["containers"]
    return container


def run(*command: object, given: str = "") -> str:
    assert BIN.exists(), "run `make chart`, which makes .venv-helm"
    done = subprocess.run(
        [str(BIN / str(command[0])), *map(str, command[1:])],
        input=given, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


class Strict(yaml.SafeLoader):
    """Refuses what a cluster may take either way: a key that is there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Yaml:
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len({*keys}), f"twice the same key in {keys}, {node.start_mark}"
        return super().construct_mapping(node, deep)


def read(outcome: Yaml) -> Rendered:
    objects: dict[str, Yaml] = {}
    for file, text in ({} if "error" in outcome else outcome["files"]).items():
        found = [] if file.endswith("NOTES.txt") else yaml.load_all(text, Strict)
        for manifest in filter(None, found):
            kind = "Test" if "/tests/" in file else manifest["kind"]
            assert kind not in objects, f"two of {kind}"
            objects[kind] = manifest
    messages = [f"{m['path']}: {m['error']}" for m in outcome["lint"]]
    return Rendered(messages, objects, outcome.get("notes", ""), outcome.get("error", ""))


@pytest.fixture(scope="session")
def helm() -> Callable[..., list[Rendered]]:
    """Renders values, each a YAML document, as a release of this name."""

    def render(*values: str, chart: Path = CHART, name: str = "triward") -> list[Rendered]:
        cases = [
            {"chart": str(chart), "name": name, "namespace": "rewards", "values": text}
            for text in values
        ]
        answer = run("python", Path(__file__).with_name("renderer.py"), given=json.dumps(cases))
        return [read(outcome) for outcome in json.loads(answer)]

    return render


@pytest.fixture(scope="session")
def matrix(helm: Callable[..., list[Rendered]]) -> dict[str, Rendered]:
    """Every file of the chart's `ci`, and no values at all."""
    return dict(zip(["defaults", *CASES], helm("{}", *CASES.values()), strict=True))


@pytest.fixture(scope="session")
def kustomize() -> Callable[[Path], dict[str, Yaml]]:
    """Builds a folder as `kubectl apply -k` does; manifests by kind."""

    def build(folder: Path) -> dict[str, Yaml]:
        manifests = yaml.safe_load_all(run("kubectl", "kustomize", folder))
        return {manifest["kind"]: manifest for manifest in manifests}

    return build
