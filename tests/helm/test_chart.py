"""The chart as Helm renders it: every file of its `ci`, its features, and what it refuses."""

from __future__ import annotations

import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from tests.helm.accepting import accept
from tests.helm.conftest import CASES, CHART, HARDENED, Rendered, pod, run, server
from tests.project.test_deployment import (
    TRITON_EXIT,
    flags_in,
    flags_of,
    triton_flags,
)

pytestmark = pytest.mark.slow

Helm = Callable[..., list[Rendered]]
every_case = pytest.mark.parametrize("case", ["defaults", *CASES])


@every_case
class TestMatrix:
    def test_helm_has_nothing_to_say(self, matrix: dict[str, Rendered], case: str) -> None:
        assert (matrix[case].error, matrix[case].lint) == ("", [])

    def test_kubernetes_accepts_it(self, matrix: dict[str, Rendered], case: str) -> None:
        assert "Deployment" in matrix[case].objects
        for manifest in matrix[case].objects.values():
            accept(manifest)

    def test_everything_selects_the_servers_pods(
        self, matrix: dict[str, Rendered], case: str
    ) -> None:
        objects = dict(matrix[case].objects)
        labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
        asking = objects.pop("Test", None)
        selectors = {
            "Deployment": objects["Deployment"]["spec"]["selector"]["matchLabels"],
            "Service": objects["Service"]["spec"]["selector"],
        }
        for kind, key in [("PodDisruptionBudget", "selector"), ("PodMonitor", "selector"),
                          ("NetworkPolicy", "podSelector")]:  # fmt: skip
            if kind in objects:
                selectors[kind] = objects[kind]["spec"][key]["matchLabels"]
        for kind, selector in selectors.items():
            assert selector.items() <= labels.items(), kind
            if asking:
                assert not selector.items() <= asking["metadata"]["labels"].items(), kind
        if "ServiceMonitor" in objects:
            selector = objects["ServiceMonitor"]["spec"]["selector"]["matchLabels"]
            assert selector.items() <= objects["Service"]["metadata"]["labels"].items()
        if "HorizontalPodAutoscaler" in objects:
            target = objects["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
            assert target["name"] == objects["Deployment"]["metadata"]["name"]
            assert "replicas" not in objects["Deployment"]["spec"]

    def test_ports_and_volumes_are_there(self, matrix: dict[str, Rendered], case: str) -> None:
        objects = matrix[case].objects
        ports = {port["name"] for port in server(matrix[case])["ports"]}
        named = [port["targetPort"] for port in objects["Service"]["spec"]["ports"]]
        policy = objects.get("NetworkPolicy", {"spec": {"ingress": []}})["spec"]["ingress"]
        named += [port["port"] for rule in policy for port in rule["ports"]]
        assert set(named) <= ports
        if "ServiceMonitor" in objects:
            served = {port["name"] for port in objects["Service"]["spec"]["ports"]}
            assert {e["port"] for e in objects["ServiceMonitor"]["spec"]["endpoints"]} <= served
        pods = [pod(matrix[case])] + [o["spec"] for k, o in objects.items() if k == "Test"]
        for spec in pods:
            containers = spec["containers"] + spec.get("initContainers", [])
            mounted = {mount["name"] for each in containers for mount in each["volumeMounts"]}
            assert mounted == {volume["name"] for volume in spec["volumes"]}
            for each in containers:
                files = [a.split("=")[1] for a in each["args"] if "=/run/secrets" in a]
                files += [e["value"] for e in each.get("env", []) if e["name"].endswith("_FILE")]
                folders = {mount["mountPath"] for mount in each["volumeMounts"]}
                assert {str(Path(file).parent) for file in files} <= folders

    def test_containers_may_do_nothing_more_than_they_must(
        self, matrix: dict[str, Rendered], case: str
    ) -> None:
        objects = matrix[case].objects
        pods = [pod(matrix[case])] + [o["spec"] for k, o in objects.items() if k == "Test"]
        for spec in pods:
            assert spec["securityContext"]["runAsNonRoot"] is True
            assert spec["automountServiceAccountToken"] is False
            for container in spec["containers"] + spec.get("initContainers", []):
                assert container["securityContext"] == HARDENED
                assert container["resources"]["limits"]["memory"]

    def test_flags_exist(self, matrix: dict[str, Rendered], case: str) -> None:
        program, *args = server(matrix[case])["command"] + server(matrix[case])["args"]
        split = args.index("--")
        assert (program, args[0]) == ("triward-server", "serve")
        assert flags_in(args[:split]) <= flags_of("serve")
        assert flags_in(args[split:]) <= triton_flags()
        for container in pod(matrix[case]).get("initContainers", []):
            assert '|| triward-server export "$@" ||' in container["command"][-1]
            flags = {flag.replace("--no-", "--") for flag in flags_in(container["args"])}
            assert flags <= flags_of("export")

    def test_a_stop_has_the_time_it_needs(self, matrix: dict[str, Rendered], case: str) -> None:
        container = server(matrix[case])
        [drain] = [a.split("=")[1] for a in container["args"] if a.startswith("--drain-timeout=")]
        pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        grace = pod(matrix[case])["terminationGracePeriodSeconds"]
        assert grace >= pause + float(drain) + TRITON_EXIT

    def test_a_rollout_waits_for_what_a_start_may_take(
        self, matrix: dict[str, Rendered], case: str
    ) -> None:
        startup = server(matrix[case])["startupProbe"]
        loading = startup["periodSeconds"] * startup["failureThreshold"]
        fetching = 3600 if "initContainers" in pod(matrix[case]) else 0
        spec = matrix[case].objects["Deployment"]["spec"]
        assert spec["progressDeadlineSeconds"] > loading + fetching


class TestFeatures:
    def test_a_model_of_the_hub(self, matrix: dict[str, Rendered]) -> None:
        [export] = pod(matrix["hf"])["initContainers"]
        assert "--checkpoint=Skywork/Skywork-VL-Reward-7B" in export["args"]
        assert "--revision=0123abc" in export["args"]
        env = {each["name"]: each for each in export["env"]}
        assert env["HF_HUB_OFFLINE"]["value"] == "0"
        token = env["HF_TOKEN"]["valueFrom"]["secretKeyRef"]
        assert token == {"name": "hub", "key": "token"}
        assert "HF_TOKEN" not in str(server(matrix["hf"])), "the server downloads nothing"
        egress = matrix["hf"].objects["NetworkPolicy"]["spec"]["egress"]
        assert [port["port"] for rule in egress for port in rule["ports"]] == [53, 53, 443]
        repository = {v["name"]: v for v in pod(matrix["hf"])["volumes"]}["repository"]
        assert repository["emptyDir"] == {"sizeLimit": "40Gi"}
        [writes] = [m for m in export["volumeMounts"] if m["name"] == "repository"]
        [reads] = [m for m in server(matrix["hf"])["volumeMounts"] if m["name"] == "repository"]
        assert (writes.get("readOnly"), reads["readOnly"]) == (None, True)
        assert pod(matrix["hf"])["securityContext"]["fsGroup"] == 1000

    def test_where_an_export_is_kept(self, matrix: dict[str, Rendered]) -> None:
        kept = {
            case: {v["name"]: v for v in pod(matrix[case])["volumes"]}["repository"]
            for case in ("hf-claim", "hf-volume")
        }
        assert kept["hf-claim"]["persistentVolumeClaim"] == {"claimName": "exported"}
        asked = kept["hf-volume"]["ephemeral"]["volumeClaimTemplate"]["spec"]
        assert (asked["storageClassName"], asked["resources"]["requests"]["storage"]) == (
            "fast-nvme",
            "60Gi",
        )
        [export] = pod(matrix["hf-claim"])["initContainers"]
        assert export["args"][:2] == ["judge", "--name=judge"]
        # The name is where the script looks, and what `helm test` asks.
        assert export["command"][-1].startswith(
            'whole="/models/$0/config.pbtxt"\ntest -f "$whole" ||'
        )
        assert matrix["hf-claim"].objects["Test"]["spec"]["containers"][0]["args"][2:] == ["judge"]

    def test_a_baked_image_mounts_no_repository(self, matrix: dict[str, Rendered]) -> None:
        assert "repository" not in [v["name"] for v in pod(matrix["baked"])["volumes"]]
        version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
        assert server(matrix["defaults"])["image"] == f"triward:{version}"
        digest = yaml.safe_load(CASES["baked"])["image"]["digest"]
        assert server(matrix["baked"])["image"] == f"triward-skywork@{digest}"
        assert pod(matrix["pvc"])["imagePullSecrets"] == [{"name": "registry"}]

    def test_tls(self, matrix: dict[str, Rendered]) -> None:
        keys = ("--tls-certificate", "--tls-key", "--tls-client-ca")
        flags = {
            case: flags_in(server(matrix[case])["args"]) for case in ("defaults", "tls", "mtls")
        }
        assert [sum(k in flags[c] for k in keys) for c in flags] == [0, 2, 3]
        assert "Test" not in matrix["tls"].objects, "it has no authority to trust"
        assert "tests.tlsSecret" in matrix["tls"].notes
        assert (
            matrix["mtls"].objects["Test"]["spec"]["containers"][0]["args"][1] == "/run/secrets/tls"
        )
        [ca] = [v["secret"] for v in pod(matrix["mtls"])["volumes"] if v["name"] == "client-ca"]
        assert ca == {"secretName": "clients", "items": [{"key": "ca.crt", "path": "ca.crt"}]}

    def test_gpus(self, matrix: dict[str, Rendered]) -> None:
        limits = {c: server(matrix[c])["resources"]["limits"] for c in ("defaults", "gpus", "cpu")}
        assert limits["defaults"] == {"memory": "32Gi", "nvidia.com/gpu": 1}
        assert limits["gpus"] == {"memory": "96Gi", "nvidia.com/mig-3g.40gb": 4}
        assert limits["cpu"] == {"memory": "16Gi", "cpu": "8"}
        assert matrix["gpus"].objects["Deployment"]["spec"]["replicas"] == 4

    def test_what_a_cluster_rules_itself_is_left_out(self, matrix: dict[str, Rendered]) -> None:
        assert set(matrix["bare"].objects) == {"Deployment", "Service"}
        assert pod(matrix["bare"])["serviceAccountName"] == "default"
        assert "env" not in server(matrix["bare"]), "no admin key"

    def test_scheduling(self, matrix: dict[str, Rendered]) -> None:
        spec = pod(matrix["scheduling"])
        assert spec["nodeSelector"] == {"gpu": "h100"}
        ours, theirs = (c["labelSelector"] for c in spec["topologySpreadConstraints"])
        assert ours["matchLabels"]["app.kubernetes.io/instance"] == "triward"
        assert theirs["matchLabels"] == {"app": "any"}
        assert matrix["scheduling"].objects["Test"]["spec"]["nodeSelector"] == {"gpu": "h100"}
        assert matrix["gpus"].objects["Test"]["spec"]["runtimeClassName"] == "nvidia"
        assert matrix["scheduling"].objects["Service"]["metadata"]["name"] == "judge"
        assert "dns:///judge.rewards.svc:8001" in matrix["scheduling"].notes

    def test_names_of_releases(self, helm: Helm) -> None:
        for name, expected in [("judge", "judge-triward"), ("my-triward", "my-triward"),
                               ("a" * 53, "a" * 53)]:  # fmt: skip
            [rendered] = helm("autoscaling: {enabled: true}", name=name)
            assert rendered.objects["Service"]["metadata"]["name"] == expected
            for manifest in rendered.objects.values():
                accept(manifest)

    def test_the_services_name_is_one(self, helm: Helm) -> None:
        """A release may be called what a Service may not."""
        for name in ("7b", "123", "a.b"):
            [refused] = helm("{}", name=name)
            assert f'the release\'s name "{name}": the Service is called by it' in refused.error
            [rendered] = helm("{fullnameOverride: judge}", name=name)
            for manifest in rendered.objects.values():
                accept(manifest)

    def test_the_hub_is_reached_through_a_proxy(self, matrix: dict[str, Rendered]) -> None:
        [export] = pod(matrix["hf-claim"])["initContainers"]
        [proxy] = [each["value"] for each in export["env"] if each["name"] == "HTTPS_PROXY"]
        for case, port in (("hf-claim", urlsplit(proxy).port), ("hf", 443)):
            [_, hub] = matrix[case].objects["NetworkPolicy"]["spec"]["egress"]
            assert hub["ports"] == [{"protocol": "TCP", "port": port}]

    def test_the_volumes_group_is_a_value(self, helm: Helm) -> None:
        hf = "model: {source: hf, hf: {uri: hf://a/b}}"
        user = f"{hf}\npodSecurityContext: {{runAsGroup: 2000}}"
        given = f"{hf}\npodSecurityContext: {{runAsGroup: 2000, fsGroup: 3000}}"
        groups = [pod(each)["securityContext"]["fsGroup"] for each in helm(hf, user, given)]
        assert groups == [1000, 2000, 3000]

    def test_names_that_look_like_numbers(self, helm: Helm) -> None:
        [rendered] = helm(
            """
            image: {pullSecrets: ["1"]}
            model: {source: hf, hf: {uri: hf://1/2, name: "3", claim: "4", tokenSecret: "5"}}
            admin: {secret: "6", key: "7"}
            tls: {secret: "8", clientCASecret: "9"}
            tests: {tlsSecret: "10", models: ["1e5"]}
            serviceAccount: {name: "11"}
            runtimeClassName: "12"
            priorityClassName: "13"
            nodeSelector: {a: "14"}
            """
        )
        for manifest in rendered.objects.values():
            accept(manifest)

    def test_the_export_runs_once(self, matrix: dict[str, Rendered], tmp_path: Path) -> None:
        """The init container's command in a shell, with a stand-in for the exporter."""
        [export] = pod(matrix["hf-claim"])["initContainers"]
        models, log, waited = tmp_path / "models", tmp_path / "log", tmp_path / "waited"
        stand_in = tmp_path / "triward-server"
        stand_in.write_text(
            f'#!/bin/sh\nprintf "%s\\n" "$@" >> {log}\nif test -d {waited}\n'
            f"then mv {waited} {models}; fi\nexit 1\n"
        )
        stand_in.chmod(0o755)
        script, name, *flags = [*export["command"][2:], *export["args"]]
        command = ["/bin/sh", "-ec", script.replace("/models", str(models)), name, *flags]
        there = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        assert subprocess.run(command, env=there).returncode == 1, "refused, and there is no model"
        # Another pod writes it meanwhile: the export waits for that, then refuses.
        (waited / "judge").mkdir(parents=True)
        (waited / "judge" / "config.pbtxt").touch()
        subprocess.run(command, check=True, env=there)
        subprocess.run(command, check=True, env=there)
        assert log.read_text().split() == ["export", *flags] * 2, "the third found the model"
        assert flags == [
            "--name=judge",
            "--checkpoint=Skywork/Skywork-Reward-V2-Qwen3-8B",
            "--output=/models",
        ]

    def test_it_packages(self, tmp_path: Path) -> None:
        name = run("python", Path(__file__).with_name("renderer.py"), "package", CHART, tmp_path)
        with tarfile.open(tmp_path / name.strip()) as archive:
            files = archive.getnames()
        assert {"triward/values.schema.json", "triward/files/score.py"} <= set(files)
        assert not [file for file in files if file.startswith("triward/ci/")]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ("replicaz: 2", "additional properties 'replicaz' not allowed"),
        ("model: {hf: {url: x}}", "at '/model/hf': additional properties 'url' not allowed"),
        ("gpus: two", "at '/gpus': got string, want integer"),
        ("gpus: -1", "at '/gpus': minimum: got -1, want 0"),
        ("shmSize: 4", "at '/shmSize': got number, want string"),
        ("shmSize: 4GB", "at '/shmSize': '4GB' does not match pattern"),
        ("model: {source: s3}", "at '/model/source': value must be one of 'pvc', 'hf', 'baked'"),
        ("model: {hf: {uri: 'https://hub/a/b'}}", "at '/model/hf/uri': 'https://hub/a/b' does not"),
        ("image: {digest: 'sha256:12'}", "at '/image/digest': 'sha256:12' does not match pattern"),
        ("networkPolicy: {hubPorts: [0]}", "at '/networkPolicy/hubPorts/0': minimum: got 0"),
        ("admin: {secret: Not_A_Name}", "at '/admin/secret': 'Not_A_Name' does not match pattern"),
        ("server: {extraArgs: [serve]}", "at '/server/extraArgs/0': 'serve' does not match"),
        ("networkPolicy: {clients: []}", "at '/networkPolicy/clients': minItems: got 0, want 1"),
        ("model: {source: hf}", "model.hf.uri: model.source is hf, so name the model as hf://"),
        ("tls: {clientCASecret: ca}", "tls.clientCASecret: clients' certificates need TLS"),
        ("{replicas: 2, autoscaling: {enabled: true}}", "replicas: the autoscaler sets it"),
        ("autoscaling: {enabled: true, minReplicas: 9}", "autoscaling.minReplicas: 9 is more than"),
        ("{podMonitor: {enabled: true}, serviceMonitor: {enabled: true}}", "enable one of them"),
    ],
)
def test_a_wrong_value_is_refused(helm: Helm, values: str, sentence: str) -> None:
    [rendered] = helm(values)
    assert sentence in rendered.error
