"""The chart without Helm: its values, their schema and table, and the script of `helm test`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomllib
import yaml
from jsonschema import Draft7Validator
from jsonschema.exceptions import best_match

from tests.certificates import write_certificates
from tests.client.helpers import encrypted
from tests.conftest import ROOT
from tests.fakeserver import FakeServer, Fault
from tests.helm.accepting import VERSIONS
from tests.helm.conftest import CASES, CHART
from tests.helm.table import table, values
from tests.project.test_deployment import DOCKER, MONITORED
from triward_server.serving.launch import TritonServer

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())
ABOUT = yaml.safe_load((CHART / "Chart.yaml").read_text())


def objects(schema: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Each object of the schema whose keys are listed."""
    if isinstance(schema, dict):
        if "properties" in schema and schema.get("type") == "object":
            yield path, schema
        for key, each in schema.items():
            yield from objects(each, f"{path}/{key}")


class TestSchema:
    def test_it_is_one(self) -> None:
        Draft7Validator.check_schema(SCHEMA)

    @pytest.mark.parametrize("case", ["defaults", *CASES])
    def test_it_takes_what_is_right(self, case: str) -> None:
        given = yaml.safe_load(CASES[case]) if case in CASES else DEFAULTS
        Draft7Validator(SCHEMA).validate(given)

    def test_it_knows_every_value_and_no_other(self) -> None:
        def compare(schema: Any, defaults: Any, path: str) -> None:
            known = set(schema["properties"]) - ({"global"} if not path else set())
            assert known == set(defaults), path
            for key, each in schema["properties"].items():
                if "properties" in each:
                    compare(each, defaults[key], f"{path}.{key}")

        compare(SCHEMA, DEFAULTS, "")
        assert all(schema["additionalProperties"] is False for _, schema in objects(SCHEMA))

    @pytest.mark.parametrize(
        ("given", "path"),
        [
            ({"replica": 2}, ""),
            ({"replicas": "2"}, "replicas"),
            ({"gpus": 1.5}, "gpus"),
            ({"model": {"source": "gcs"}}, "model.source"),
            ({"model": {"hf": {"uri": "Skywork/Skywork-VL-Reward-7B"}}}, "model.hf.uri"),
            ({"tmpSize": "1 GB"}, "tmpSize"),
            ({"podMonitor": {"interval": "15"}}, "podMonitor.interval"),
            ({"extraEnv": [{"key": "A", "value": "1"}]}, "extraEnv.0"),
            ({"extraEnv": [{"name": "A", "value": 1}]}, "extraEnv.0.value"),
            ({"podLabels": {"a": 1}}, "podLabels.a"),
        ],
    )
    def test_it_refuses_what_is_wrong(self, given: Any, path: str) -> None:
        error = best_match(Draft7Validator(SCHEMA).iter_errors(given))
        assert error is not None
        assert ".".join(map(str, error.absolute_path)) == path

    def test_every_value_has_a_case(self) -> None:
        """A file of `ci` sets it to something else than its default."""
        given = [yaml.safe_load(text) for text in CASES.values()]
        for value in values():
            *above, last = value.path.split(".")
            found = []
            for each in given:
                for key in above:
                    each = each.get(key, {})
                found += [each[last]] if last in each else []
            assert [each for each in found if each != value.default], value.path


class TestTexts:
    def test_the_readme_has_the_table(self) -> None:
        readme = (CHART / "README.md").read_text(encoding="utf-8")
        assert table() in readme, "paste what `python -m tests.helm.table` prints"
        assert all(value.comment for value in values()), "each value has a line"

    def test_its_links_lead_somewhere(self) -> None:
        readme = (CHART / "README.md").read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)]+)\)", readme):
            assert (CHART / target).exists(), target

    def test_it_is_this_version(self) -> None:
        version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
        assert (ABOUT["version"], ABOUT["appVersion"]) == (version, version)
        runtime = yaml.safe_load((DOCKER / "kserve" / "servingruntime.yaml").read_text())
        [container] = runtime["spec"]["containers"]
        assert container["image"] == f"triward:{version}"

    def test_it_asks_for_the_kubernetes_that_it_is_validated_with(self) -> None:
        assert ABOUT["kubeVersion"] == f">={VERSIONS[0]}.0-0"

    def test_the_autoscalers_numbers_are_those_of_the_manifests(self) -> None:
        scaling = yaml.safe_load((MONITORED / "horizontalpodautoscaler.yaml").read_text())["spec"]
        ours = DEFAULTS["autoscaling"]
        assert ours["behavior"] == scaling["behavior"]
        assert (ours["minReplicas"], ours["maxReplicas"]) == (
            scaling["minReplicas"],
            scaling["maxReplicas"],
        )


def test_make_runs_it_with_the_rest() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^test-all: .*\$\(HELM\)/\.ready", makefile, re.MULTILINE)
    assert "$(HELM)/.ready: tests/helm/requirements.txt" in makefile
    pinned = (ROOT / "tests" / "helm" / "requirements.txt").read_text().splitlines()
    assert all("==" in line for line in pinned if not line.startswith("#"))


class TestScript:
    """What the pod of `helm test` runs."""

    def ask(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, CHART / "files" / "score.py", *arguments]
        return subprocess.run(
            list(map(str, command)), capture_output=True, text=True, timeout=60, check=False
        )

    def test_a_server_that_scores(self, echo_server: TritonServer) -> None:
        done = self.ask(echo_server.endpoints.grpc, "", "reward")
        assert done.returncode == 0, done.stderr
        assert re.fullmatch(r"reward: \S+ for Four, \S+ for Five\n", done.stdout)

    def test_a_model_that_is_not_there(self, echo_server: TritonServer) -> None:
        done = self.ask(echo_server.endpoints.grpc, "", "reward", "judge")
        assert done.returncode == 1
        assert "judge" in done.stderr.splitlines()[-1]

    def test_scores_that_are_none(self) -> None:
        for fault in (Fault.NAN, Fault.WRONG_COUNT):
            with FakeServer(fault=lambda _, fault=fault: fault) as running:
                done = self.ask(running.url, "", "reward")
            assert (done.returncode, done.stdout) == (1, "")
            assert re.fullmatch(r"reward answered \[.*\], not two scores\n", done.stderr)

    @pytest.mark.parametrize("mutual", [False, True])
    def test_tls(self, tmp_path: Path, mutual: bool) -> None:
        pki = write_certificates(tmp_path, {"localhost": ["localhost"], "client": ["a@b.org"]})
        secret = tmp_path / "secret"
        secret.mkdir()
        (pki / "ca.pem").rename(secret / "ca.crt")
        (pki / "ca.pem").symlink_to(secret / "ca.crt")
        with encrypted(pki, "localhost", mutual=mutual) as running:
            address = running.url.replace("127.0.0.1", "localhost")
            without = self.ask(address, secret, "reward")
            (pki / "client.pem").rename(secret / "tls.crt")
            (pki / "client.key").rename(secret / "tls.key")
            with_one = self.ask(address, secret, "reward")
        assert (without.returncode, with_one.returncode) == (int(mutual), 0), with_one.stderr
