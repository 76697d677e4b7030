"""The container, the compose file and the cluster's manifests, as far as no engine is needed.

Validated by what validates them elsewhere: hadolint, Kubernetes' and compose's own schemas, a
PromQL parser, pip. What only holds between files (ports, names, timeouts, flags) is compared here.
"""

from __future__ import annotations

import configparser
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import tomllib
import typer.main
import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema
from jsonschema import Draft202012Validator

from tests import promql
from tests.conftest import ROOT
from tests.container import contained, missing
from triward_server.cli import app
from triward_server.export.random_checkpoint import make_checkpoint
from triward_server.schema import REWARD, ModelNames
from triward_server.serving.installation import find_triton
from triward_server.serving.launch import Endpoints

DOCKER = ROOT / "docker"
DOCKERFILE = DOCKER / "Dockerfile"
BASE = DOCKER / "kubernetes" / "base"
MONITORED = DOCKER / "kubernetes" / "monitored"
MANIFESTS = sorted(p for f in (BASE, MONITORED) for p in f.glob("*.yaml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMAGE_PYTHON = "3.12"  # Triton 26.04's
TRITON_EXIT = 40  # seconds that the launcher grants Triton after draining
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
CUSTOM_RESOURCES = {"Kustomization", "PodMonitor"}  # not Kubernetes' own, no schema to be had

Yaml = dict[str, Any]


@dataclass(frozen=True)
class Instruction:
    """One of the Dockerfile's, with the name of its stage."""

    stage: str
    name: str
    arguments: str


def instructions() -> Iterator[Instruction]:
    stage = ""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    for line in text.replace("\\\n", " ").splitlines():
        name, _, arguments = line.strip().partition(" ")
        if name == "FROM":
            stage = arguments.split(" AS ")[-1] if " AS " in arguments else ""
        if name:
            yield Instruction(stage, name, arguments.strip())


def only(name: str) -> str:
    """Arguments of an instruction that stands in the Dockerfile once."""
    (found,) = [i.arguments for i in instructions() if i.name == name]
    return found


def load(path: Path) -> Yaml:
    return yaml.safe_load(path.read_text())


def pins(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if "==" in line and line[0] != "#"]
    return {normal(name): version for name, version in (line.split("==") for line in lines)}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def flags_of(command: str) -> set[str]:
    """What a command of triward-server takes."""
    parameters = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    return {flag for each in parameters for flag in (*each.opts, *each.secondary_opts)}


def default_of(command: str, parameter: str) -> Any:
    parameters = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    [default] = [each.default for each in parameters if each.name == parameter]
    return default


def flags_in(arguments: list[str]) -> set[str]:
    return {a.split("=")[0] for a in arguments if a.startswith("--") and a != "--"}


class TestDockerfile:
    def test_hadolint_has_nothing_to_say(self) -> None:
        command = [Path(sysconfig.get_path("scripts")) / "hadolint", "--no-color", DOCKERFILE]
        result = subprocess.run(command, capture_output=True, text=True)
        assert (result.returncode, result.stdout + result.stderr) == (0, "")

    def test_its_commands_exist(self) -> None:
        check = json.loads(only("HEALTHCHECK").split(" CMD ")[1].strip())
        for command in (served_by_default(), check):
            assert command[0] in PROJECT["scripts"]
            assert flags_in(command) <= flags_of(command[1])
        # HTTP is the container's own.
        ports = {Endpoints.grpc_port, Endpoints.metrics_port}
        assert set(map(int, only("EXPOSE").split())) == ports

    def test_signals_reach_the_server(self) -> None:
        """No shell stands in between that would keep SIGTERM to itself."""
        assert served_by_default()[:2] == ["triward-server", "serve"]
        assert only("STOPSIGNAL") == "SIGTERM"

    def test_it_runs_every_command(self) -> None:
        assert json.loads(only("ENTRYPOINT")) == ["triward-server"]
        lines = DOCKERFILE.read_text().replace("\\\n# ", "").splitlines()
        shown = [line for line in lines if line.startswith("#     docker run")]
        for line in shown:
            # What follows the image's name, if anything does.
            found = re.search(r" triward(?:-compiling)? +([^#]+)", line)
            if found:
                command, *flags = shlex.split(found[1])
                assert flags_in(flags) <= flags_of(command), line
        assert [" export " in line for line in shown].count(True) == 1

    def test_the_health_check_asks_where_http_listens(self) -> None:
        asked = default_of("health", "host"), default_of("health", "http_port")
        assert asked == (Endpoints.http_host, Endpoints.http_port)
        for command in (only("HEALTHCHECK"), only("CMD")):
            assert "--http-" not in command and "--host" not in command

    def test_what_it_copies_is_there_and_not_ignored(self) -> None:
        ignored = (ROOT / ".dockerignore").read_text().split("\n")
        for copy in [i for i in instructions() if i.name == "COPY"]:
            if "--from" in copy.arguments:
                continue
            for source in copy.arguments.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source}" in ignored, source

    def test_what_serves_has_no_package_that_was_not_asked_for(self) -> None:
        steps = [i for i in instructions() if i.name == "RUN" and i.stage != "compiler"]
        asked = re.compile(r"\bapt(-get)?\b|\bgcc\b|-dev\b")
        assert not [step for step in steps if asked.search(step.arguments)]
        # The compiler is there for whoever builds on it, and only then.
        assert "SERVER_BASE=triton" in [i.arguments for i in instructions() if i.name == "ARG"]
        [base] = [i.arguments for i in instructions() if i.name == "FROM" and i.stage == "server"]
        assert base == "${SERVER_BASE} AS server"
        [compiler] = [
            i.arguments for i in instructions() if (i.name, i.stage) == ("RUN", "compiler")
        ]
        assert "--no-install-recommends gcc libc6-dev python3-dev " in compiler

    def test_its_user_is_a_number_and_not_root(self) -> None:
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", only("USER"))

    def test_its_pins_are_the_tested_ones(self) -> None:
        tested, image = pins(ROOT / "constraints.txt"), pins(DOCKER / "constraints.txt")
        differ = {name for name in image if image[name] != tested.get(name)}
        # tritonclient is that of the image's release, which takes numpy 2 and bounds the others.
        assert differ == {"numpy", "tritonclient", "protobuf", "grpcio"}
        assert image["numpy"].startswith("2.")

    @pytest.mark.slow
    def test_its_install_steps_install(
        self, tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        """Every RUN up to the server, in a shell, with the image's paths moved into a folder.

        The packages are gigabytes: pip resolves them for the image's Python but installs none, and
        this environment's stand in. Our own wheel is built and installed.
        """
        venv = tmp_path / "opt" / "triward"
        workdir = tmp_path / "build"
        workdir.mkdir()
        paths = {"/opt/triward": venv, "/dist": tmp_path / "dist"}
        paths |= {path: tmp_path / path[1:] for path in ("/models", "/cache")}
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        environment.pop("PYTHONPATH", None)  # pip would find our package there, and install none

        def run(arguments: str, **variables: str) -> None:
            command = re.sub(r"--mount=\S+", "", arguments)
            for there, here in paths.items():
                command = command.replace(there, str(here))
            subprocess.run(
                ["/bin/sh", "-ec", command], cwd=workdir, env=environment | variables, check=True
            )

        for step in instructions():
            sources = step.arguments.split()[:-1]
            if step.name == "COPY" and "--from" not in step.arguments:
                for source in sources:
                    copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                    copy(ROOT / source, workdir / Path(source).name)
            elif step.name == "RUN" and step.stage == "packages":
                resolved = self._resolved(
                    getattr(request.config, "cache", None), run, step.arguments, tmp_path
                )
                assert resolved == pins(DOCKER / "constraints.txt")
                assert venv.is_dir(), "made by the same step"
                self._stand_in(venv)
            elif step.name == "RUN" and step.stage != "compiler":
                run(step.arguments)

        self._exports(venv, tmp_path)
        where = "import triward_server; print(triward_server.__file__)"
        isolated = [venv / "bin" / "python3", "-I", "-c", where]
        file = subprocess.check_output(isolated, text=True)
        assert Path(file.strip()).is_relative_to(venv)
        assert (Path(file.strip()).parent / "py.typed").is_file()

    @staticmethod
    def _exports(venv: Path, folder: Path) -> None:
        """`docker run … triward export`, of the wheel that was installed, as the image's user."""
        if why := missing():
            pytest.skip(f"no mounts here: {why}")
        variables = dict(word.split("=", 1) for word in shlex.split(only("ENV")))
        variables["PATH"] = f"{venv / 'bin'}:{os.environ['PATH']}"
        make_checkpoint("tiny", 0, folder / "checkpoint")
        folder.chmod(0o755)
        (folder / "root").mkdir()
        mounts = {path: folder / path[1:] for path in ("/models", "/cache")}
        words = [
            *json.loads(only("ENTRYPOINT")), "export", "--checkpoint", folder / "checkpoint",
            "--output", "/models", "--device=cpu", "--threads=1", "--no-verify",
        ]  # fmt: skip
        command = contained(folder / "root", mounts, *words, readable=[folder])
        result = subprocess.run(command, env=variables, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        served = served_by_default()
        assert served[served.index("--repository") + 1] == "/models"
        assert (folder / "models" / "reward" / "config.pbtxt").is_file()
        assert [path.name for path in (folder / "models").glob(".*")] == [".models.lock"]

    @staticmethod
    def _resolved(cache: Any, run: Any, step: str, folder: Path) -> dict[str, str]:
        """What pip would install; kept from run to run, as what PyPI has does not change."""
        report = folder / "report.json"
        asked = step + (DOCKER / "constraints.txt").read_text() + "\n".join(PROJECT["dependencies"])
        key = f"triward/resolved-{hashlib.sha256(asked.encode()).hexdigest()}"
        known = cache.get(key, None) if cache else None
        if known is not None:
            step = step.split("&&")[0]  # only the virtual environment is still needed
        run(
            step,
            PIP_DRY_RUN="1",
            PIP_QUIET="3",
            PIP_REPORT=str(report),
            PIP_PYTHON_VERSION=IMAGE_PYTHON,
            PIP_TARGET=str(folder / "nothing"),
        )
        if known is None:
            found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
            known = {normal(item["name"]): item["version"] for item in found}
            if cache:
                cache.set(key, known)
        return known

    @staticmethod
    def _stand_in(venv: Path) -> None:
        """Give an empty virtual environment the packages of this one, and the pinned setuptools."""
        python = venv / "bin" / "python3"
        setuptools = f"setuptools=={pins(DOCKER / 'constraints.txt')['setuptools']}"
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "-qqq", setuptools]
        subprocess.run(pip, check=True)
        (site,) = venv.glob("lib/python*/site-packages")
        (site / "stand_in.pth").write_text(sysconfig.get_path("purelib") + "\n")


class TestKubernetes:
    @pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: f"{p.parent.name}/{p.name}")
    def test_kubernetes_accepts_it(self, path: Path) -> None:
        manifest = load(path)
        if manifest["kind"] not in CUSTOM_RESOURCES:
            # The oldest whose preStop has `sleep` by default, and the newest there is a schema of.
            for version in ("1.30", kubernetes_validate.latest_version()):
                kubernetes_validate.validate(manifest, version, strict=True)

    @pytest.mark.parametrize("folder", [BASE, MONITORED], ids=lambda p: p.name)
    def test_kustomizations_list_what_is_there(self, folder: Path) -> None:
        listed = load(folder / "kustomization.yaml")["resources"]
        files = {p.name for p in folder.iterdir()} - {"kustomization.yaml"}
        assert {name for name in listed if name.endswith(".yaml")} == files
        assert all((folder / name).exists() for name in listed)

    def test_the_image_is_this_version(self) -> None:
        (image,) = load(BASE / "kustomization.yaml")["images"]
        assert image == {"name": container()["image"], "newTag": PROJECT["version"]}

    def test_everything_selects_the_servers_pods(self) -> None:
        deployment = load(BASE / "deployment.yaml")
        labels = deployment["spec"]["template"]["metadata"]["labels"].items()
        spread = pod()["topologySpreadConstraints"][0]["labelSelector"]
        selectors = [
            deployment["spec"]["selector"]["matchLabels"],
            spread["matchLabels"],
            load(BASE / "service.yaml")["spec"]["selector"],
            load(BASE / "networkpolicy.yaml")["spec"]["podSelector"]["matchLabels"],
            load(BASE / "poddisruptionbudget.yaml")["spec"]["selector"]["matchLabels"],
            load(MONITORED / "podmonitor.yaml")["spec"]["selector"]["matchLabels"],
        ]
        assert all(selector and selector.items() <= labels for selector in selectors)
        target = load(MONITORED / "horizontalpodautoscaler.yaml")["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
        account = load(BASE / "serviceaccount.yaml")["metadata"]["name"]
        assert pod()["serviceAccountName"] == account

    def test_ports_are_the_servers(self) -> None:
        ports = {port["name"]: port["containerPort"] for port in container()["ports"]}
        assert ports == {
            "grpc": Endpoints.grpc_port,
            "metrics": Endpoints.metrics_port,
        }
        (service,) = load(BASE / "service.yaml")["spec"]["ports"]
        assert (service["targetPort"], service["port"]) == ("grpc", Endpoints.grpc_port)
        ingress = load(BASE / "networkpolicy.yaml")["spec"]["ingress"]
        assert [p["port"] for rule in ingress for p in rule["ports"]] == ["grpc", "metrics"]
        (endpoint,) = load(MONITORED / "podmonitor.yaml")["spec"]["podMetricsEndpoints"]
        assert endpoint["port"] == "metrics"
        # The kubelet, outside the pod, cannot reach HTTP on its loopback.
        for probe in PROBES:
            assert "exec" in container()[probe]
        assert "--http-host" not in flags_in(container()["args"])

    def test_flags_exist(self) -> None:
        split = container()["args"].index("--")
        ours, tritons = container()["args"][:split], container()["args"][split + 1 :]
        assert ours[0] == "serve"
        assert flags_in(ours) <= flags_of("serve")
        assert flags_in(tritons) <= triton_flags()
        for probe in PROBES:
            program, command, *health = container()[probe]["exec"]["command"]
            assert program in PROJECT["scripts"]
            assert flags_in(health) <= flags_of(command)
            assert "--http-port" not in flags_in(health)

    def test_volumes_are_mounted_where_they_are_looked_for(self) -> None:
        mounts = {mount["name"]: mount["mountPath"] for mount in container()["volumeMounts"]}
        assert set(mounts) == {volume["name"] for volume in pod()["volumes"]}
        assert mounts["repository"] == argument(container()["args"], "--repository")
        (key,) = [e["value"] for e in container()["env"] if e["name"].endswith("_KEY_FILE")]
        assert str(Path(key).parent) == mounts["admin"]
        # A read-only root needs these two.
        assert {mounts["shm"], mounts["tmp"]} == {"/dev/shm", "/tmp"}

    def test_a_stop_has_the_time_it_needs(self) -> None:
        pause = container()["lifecycle"]["preStop"]["sleep"]["seconds"]
        drain = float(argument(container()["args"], "--drain-timeout"))
        assert pod()["terminationGracePeriodSeconds"] >= pause + drain + TRITON_EXIT
        readiness = container()["readinessProbe"]
        assert pause >= readiness["periodSeconds"], "endpoints need a moment to forget the pod"

    def test_probes_are_patient_enough(self) -> None:
        startup, liveness = container()["startupProbe"], container()["livenessProbe"]
        # The launcher gives up after 900 s by itself, with a reason in its log.
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 900
        for each in PROBES:
            probe = container()[each]
            timeout = float(argument(probe["exec"]["command"], "--timeout"))
            assert timeout < probe["timeoutSeconds"] <= probe["periodSeconds"]
        assert liveness["failureThreshold"] * liveness["periodSeconds"] >= 300

    def test_memory_is_bounded(self) -> None:
        memory = container()["resources"]["limits"]["memory"]
        volatile = [v["emptyDir"] for v in pod()["volumes"] if "emptyDir" in v]
        assert all(each["medium"] == "Memory" for each in volatile)
        assert enough(memory, [each["sizeLimit"] for each in volatile])

    def test_capacity_is_kept(self) -> None:
        update = load(BASE / "deployment.yaml")["spec"]["strategy"]
        assert update["type"] == "RollingUpdate"
        assert update["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
        budget = load(BASE / "poddisruptionbudget.yaml")["spec"]["maxUnavailable"]
        scaling = load(MONITORED / "horizontalpodautoscaler.yaml")["spec"]
        assert budget < scaling["minReplicas"] <= scaling["maxReplicas"]
        assert "replicas" not in load(BASE / "deployment.yaml")["spec"], "the autoscaler's"

    def test_the_autoscalers_metric_is_defined(self) -> None:
        metrics = load(MONITORED / "horizontalpodautoscaler.yaml")["spec"]["metrics"]
        defined = {rule["name"]["as"] for rule in promql.adapter_rules()}
        assert {metric["pods"]["metric"]["name"] for metric in metrics} == defined

    def test_the_container_may_do_nothing_more_than_it_must(self) -> None:
        # What the restricted pod security standard asks for, and a read-only root.
        assert pod()["securityContext"]["runAsNonRoot"] is True
        user = f"{pod()['securityContext']['runAsUser']}:{pod()['securityContext']['runAsGroup']}"
        assert user == only("USER")
        assert pod()["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
        assert container()["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        account = load(BASE / "serviceaccount.yaml")
        assert not account["automountServiceAccountToken"]
        assert not pod()["automountServiceAccountToken"]
        policy = load(BASE / "networkpolicy.yaml")["spec"]
        assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
        assert all(rule["from"] for rule in policy["ingress"])
        assert {p["port"] for rule in policy["egress"] for p in rule["ports"]} == {53}


class TestCompose:
    def test_compose_accepts_it(self) -> None:
        schema = get_builtin_schema("vendor.compose-spec")
        Draft202012Validator(schema).validate(load(DOCKER / "compose.yaml"))

    def test_services_may_do_nothing_more_than_they_must(self) -> None:
        for name, service in services().items():
            assert service["read_only"], name
            assert service["cap_drop"] == ["ALL"], name
            assert service["security_opt"] == ["no-new-privileges:true"], name
            assert service["restart"] == "unless-stopped", name
            image = re.fullmatch(r"\S+:v?\d+\.\d+\.\d+", service["image"])
            assert image, f"{name}: {service['image']} is not an exact version"
            for port in service["ports"]:
                assert port == "8001:8001" or port.startswith("127.0.0.1:"), name

    def test_the_image_is_this_version(self) -> None:
        assert services()["triward"]["image"] == f"triward:{PROJECT['version']}"

    def test_flags_exist(self) -> None:
        command, *flags = services()["triward"]["command"]
        assert command == "serve"
        assert flags_in(flags) <= flags_of("serve")
        [mounted] = [v.rsplit(":", 2)[1] for v in services()["triward"]["volumes"]]
        assert argument(flags, "--repository") == mounted

    def test_what_it_mounts_is_there(self) -> None:
        sources = [v.split(":")[0] for s in services().values() for v in s["volumes"]]
        files = [source for source in sources if source.startswith(".")]
        assert len(files) == 4
        assert all((DOCKER / file).exists() for file in files)

    def test_a_stop_has_the_time_it_needs(self) -> None:
        server = services()["triward"]
        drain = float(argument(server["command"], "--drain-timeout"))
        assert float(server["stop_grace_period"].removesuffix("s")) >= drain + TRITON_EXIT

    def test_memory_is_bounded(self) -> None:
        for name, service in services().items():
            assert gibibytes(service["mem_limit"]) > 0, name
        server = services()["triward"]
        assert enough(server["mem_limit"], [server["shm_size"]])
        assert server["memswap_limit"] == server["mem_limit"], "swap would only make it slow"

    def test_it_holds_no_secret(self) -> None:
        secrets = load(DOCKER / "compose.yaml")["secrets"]
        assert all(secret["file"].startswith("${") for secret in secrets.values())
        for name, service in services().items():
            for key, value in service.get("environment", {}).items():
                secret = re.search(r"KEY|TOKEN|PASSWORD|SECRET", key)
                assert not secret or value.startswith("/run/secrets/"), f"{name}: {key}"


class TestSystemd:
    def unit(self) -> configparser.SectionProxy:
        parser = configparser.ConfigParser(interpolation=None)
        parser.optionxform = str  # type: ignore[assignment, method-assign]
        text = (DOCKER / "systemd" / "triward.service").read_text()
        parser.read_string(text.replace("\\\n", " "))
        return parser["Service"]

    def test_its_command_exists(self) -> None:
        program, command, *flags = shlex.split(self.unit()["ExecStart"])
        assert Path(program).name in PROJECT["scripts"]
        assert flags_in(flags) <= flags_of(command)

    def test_it_drains_and_comes_back(self) -> None:
        unit = self.unit()
        assert unit["KillMode"] == "mixed", "SIGTERM is not for tritonserver"
        drain = float(argument(shlex.split(unit["ExecStart"]), "--drain-timeout"))
        assert float(unit["TimeoutStopSec"]) >= drain + TRITON_EXIT
        assert unit["Restart"] == "always"

    def test_memory_is_bounded(self) -> None:
        unit = self.unit()
        most = argument(shlex.split(unit["ExecStart"]), "--max-memory")
        assert gibibytes(unit["MemoryMax"]) >= 2 * float(most)
        assert unit["MemoryMax"].rstrip("G") == services()["triward"]["mem_limit"].rstrip("gb")


class TestMonitoring:
    @pytest.mark.parametrize("where", promql.expressions())
    def test_it_is_promql(self, where: str) -> None:
        assert promql.selected(promql.expressions()[where])

    def test_the_server_is_scraped_as_alerts_expect(self) -> None:
        config = load(DOCKER / "prometheus" / "prometheus.yml")
        (job,) = config["scrape_configs"]
        (target,) = job["static_configs"][0]["targets"]
        host, port = target.split(":")
        assert (host in services(), int(port)) == (True, Endpoints.metrics_port)
        assert all((DOCKER / "prometheus" / file).is_file() for file in config["rule_files"])
        label = load(MONITORED / "podmonitor.yaml")["spec"]["jobLabel"]
        labels = load(BASE / "deployment.yaml")["spec"]["template"]["metadata"]["labels"]
        looked_for = set(re.findall(r'job="([^"]*)"', promql.ALERTS.read_text()))
        assert looked_for == {job["job_name"]} == {labels[label]}

    def test_models_of_any_name_are_watched(self) -> None:
        """What an expression says of a model's name holds for every name that export takes."""
        for where, expression in promql.expressions().items():
            for operator, pattern in re.findall(r'model(=~|!~|=|!=)"([^"]*)"', expression):
                assert operator in ("=~", "!~"), f"{where}: {operator}{pattern}"
                found = [
                    [bool(re.fullmatch(pattern, model)) for model in (n.ensemble, *n.steps)]
                    for n in (REWARD, ModelNames("judge-2.5"))
                ]
                assert found[0] == found[1], f"{where}: {pattern}"
                assert not found[0][0], f"{where}: {pattern} is of steps"
                assert operator == "=~" or all(found[0][1:]), f"{where}: {pattern} is of no step"

    @pytest.mark.parametrize(
        "alert", [r for r in promql.rules() if "alert" in r], ids=lambda r: r["alert"]
    )
    def test_an_alert_says_what_to_do(self, alert: Yaml) -> None:
        assert alert["labels"]["severity"] in ("critical", "warning")
        assert alert["annotations"]["summary"]
        file, _, heading = alert["annotations"]["runbook"].partition("#")
        assert heading in headings(ROOT / file)

    def test_alerts_fire_when_they_should(self) -> None:
        """Prometheus' own unit tests, where its promtool is there to run them."""
        promtool = shutil.which("promtool")
        if promtool is None:
            pytest.skip("promtool (Debian: prometheus) is not on PATH")
        tests = DOCKER / "prometheus" / "alerts_test.yml"
        result = subprocess.run([promtool, "test", "rules", tests], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr

    @pytest.mark.parametrize("path", sorted(promql.DASHBOARDS.glob("*.json")), ids=lambda p: p.stem)
    def test_panels_do_not_overlap(self, path: Path) -> None:
        taken = set()
        for panel in promql.panels(path):
            grid = panel["gridPos"]
            columns = range(grid["x"], grid["x"] + grid["w"])
            assert columns.stop <= 24, f"{panel['title']}: Grafana has 24 columns"
            cells = {(x, y) for x in columns for y in range(grid["y"], grid["y"] + grid["h"])}
            assert not cells & taken, panel["title"]
            taken |= cells

    def test_grafana_finds_its_dashboards(self) -> None:
        mounts = [volume.split(":") for volume in services()["grafana"]["volumes"]]
        (provider,) = load(DOCKER / "grafana" / "provider.yaml")["providers"]
        folder = provider["options"]["path"]
        assert ["./grafana/dashboards", folder, "ro"] in mounts
        home = services()["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
        assert (promql.DASHBOARDS / Path(home).relative_to(folder)).is_file()
        (source,) = load(DOCKER / "grafana" / "datasource.yaml")["datasources"]
        assert source["isDefault"], "panels name no datasource"


def served_by_default() -> list[str]:
    """The image's command when none is given."""
    return [*json.loads(only("ENTRYPOINT")), *json.loads(only("CMD"))]


def pod() -> Yaml:
    return load(BASE / "deployment.yaml")["spec"]["template"]["spec"]


def container() -> Yaml:
    (only_one,) = pod()["containers"]
    return only_one


def services() -> dict[str, Yaml]:
    return load(DOCKER / "compose.yaml")["services"]


def gibibytes(size: str) -> float:
    found = re.fullmatch(r"(\d+)\s*(gb|g|gi)", size.lower())
    assert found, f"{size} is not in GiB"
    return float(found[1])


def enough(limit: str, volatile: list[str]) -> bool:
    """Whether the half that `serve` leaves over holds what lies in memory, and the models."""
    models = 8  # GiB: tokenizers, torch and the files' pages of six processes
    return gibibytes(limit) / 2 >= sum(map(gibibytes, volatile)) + models


def argument(arguments: list[str], flag: str) -> str:
    """The value of `--flag value` or `--flag=value`."""
    words = shlex.split(" ".join(arguments).replace("=", " "))
    return words[words.index(flag) + 1]


def triton_flags() -> set[str]:
    """What the Triton that is installed here takes."""
    with ExitStack() as cleanup:
        triton = find_triton(cleanup)
        command = [triton.executable, "--help"]
        result = subprocess.run(command, env=triton.environment, capture_output=True, text=True)
    return set(re.findall(r"^\s*(--[a-z0-9-]+)", result.stdout + result.stderr, re.MULTILINE))


def headings(path: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    found = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text).strip().lower().replace(" ", "-") for text in found}
