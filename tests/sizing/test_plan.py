"""`triward-server plan`: its figures against the engine and the manifests, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.commands import BIN
from tests.conftest import ROOT
from triward_server.cli import app
from triward_server.config import ForwardConfig
from triward_server.errors import ConfigError
from triward_server.export.options import export_parameters
from triward_server.sizing.demand import Demand
from triward_server.sizing.footprint import GIB, device_memory, shm_bytes
from triward_server.sizing.gpus import GPUS, parse_gpus
from triward_server.sizing.measured import carried_rates
from triward_server.sizing.models import Subject
from triward_server.sizing.planner import CapacityPlan, make_plan
from triward_server.sizing.request import RequestShape, footing
from triward_server.sizing.speed import assumed, from_rates

SHAPE = RequestShape(300, 250, 8, images=1)
DEMAND = Demand(20.0, SHAPE, 0.5, timeout=30.0, p99=30.0, utilisation=0.7, devices=1)
H100 = assumed(GPUS["H100"], "bfloat16")


@pytest.fixture(scope="module")
def plan(large: Subject) -> CapacityPlan:
    return make_plan(large, H100, DEMAND, 8)


def planned(subject: Subject, **changes: Any) -> CapacityPlan:
    return make_plan(subject, H100, replace(DEMAND, **changes), None)


class TestReplicas:
    def test_seconds_are_flops_over_rate(self, plan: CapacityPlan) -> None:
        """46.5 TFLOP of the 7B with 8 responses and an image, by hand in an earlier analysis."""
        assert plan.work.flops == pytest.approx(47e12, rel=0.05)
        assert plan.work.seconds == pytest.approx(plan.work.flops / 395.6e12)

    def test_utilisation_decides_where_time_is_plenty(self, plan: CapacityPlan) -> None:
        assert plan.working == math.ceil(20 * plan.work.seconds / 0.7)
        assert plan.replicas == plan.working + 1
        assert plan.queue.utilisation <= 0.7

    def test_a_tight_objective_takes_more(self, large: Subject, plan: CapacityPlan) -> None:
        tight = planned(large, p99=0.6)
        assert tight.working > plan.working
        assert tight.queue.answer(0.99) <= 0.6
        fewer = replace(tight.queue, rate=20 / (tight.working - 1))
        assert fewer.answer(0.99) > 0.6, "one less would miss it"

    def test_a_shared_queue_waits_less(self, large: Subject) -> None:
        alone, shared = planned(large, rate=40), planned(large, rate=40, devices=4)
        assert shared.working * 4 < alone.working + 4
        assert shared.queue.mean_wait < alone.queue.mean_wait

    def test_prompts_that_are_remembered_save_devices(
        self, large: Subject, plan: CapacityPlan
    ) -> None:
        again = planned(large, shape=replace(SHAPE, repeat_share=0.5))
        assert again.work.flops < 0.85 * plan.work.flops
        assert again.work.variation > plan.work.variation

    def test_devices_that_are_missing(self, large: Subject, plan: CapacityPlan) -> None:
        assert plan.missing == 0
        assert make_plan(large, H100, DEMAND, 3).missing == plan.replicas - 3

    def test_the_range_is_of_the_assumed_speeds(self, plan: CapacityPlan) -> None:
        fewest, most = plan.between
        assert fewest < most
        assert most == math.ceil(20 * plan.work.flops / (0.25 * 989e12) / 0.7) + 1


class TestBudgets:
    def test_waiting_requests_are_begun_in_time(self, plan: CapacityPlan) -> None:
        budgets, work = plan.budgets, plan.work
        batch = budgets.forward_batch_size.value * work.seconds
        wait = budgets.queue_timeout_ms.value / 1000
        assert wait + batch < 30
        assert budgets.max_queue_size.value * work.seconds <= wait

    def test_large_requests_wait_in_bounded_memory(self, large: Subject) -> None:
        shape = replace(SHAPE, responses=1, images=4, image_size=(7000, 7000))
        budgets = planned(large, rate=0.01, shape=shape, timeout=600.0, p99=600.0).budgets
        held = 4 * 3 * 7000 * 7000
        assert 2 * budgets.max_queue_size.value * held <= 4 * GIB
        assert "4 GiB" in budgets.max_queue_size.why

    def test_a_slow_device_gets_short_passes(self, large: Subject) -> None:
        slow = assumed(GPUS["A100"], "bfloat16")
        budget = make_plan(large, slow, DEMAND, None).budgets.max_batch_tflop
        assert budget.value * 1e12 / slow.flops == pytest.approx(2.0, rel=0.05)
        assert "--hang-timeout" in budget.why

    def test_one_conversation_is_never_cut(self, large: Subject) -> None:
        shape = RequestShape(90_000, 250, 1)
        long = planned(large, shape=shape, rate=0.01, timeout=600.0, p99=600.0)
        assert long.budgets.max_batch_bytes.value == math.ceil(long.work.single)
        assert "one conversation" in long.budgets.max_batch_bytes.why

    def test_flags_are_the_exports(self, plan: CapacityPlan) -> None:
        known = {parameter.name for parameter in export_parameters()}
        assert set(vars(plan.budgets)) <= known


class TestMemory:
    def test_shm_is_the_manifests(self) -> None:
        """docker/compose.yaml: 4 instances, 64 images of a megapixel in and out, 4 GB."""
        assert 3e9 < shm_bytes(4, 1, 64, 2 * 3 * 10**6) < 4 * GIB

    def test_a_gpu_is_not_given_out_twice(self, large: Subject) -> None:
        for gpu in GPUS.values():
            memory = device_memory(large, gpu.memory, 1e9, 1e9, True)
            assert memory.used <= gpu.memory, gpu.name
            assert memory.batch <= ForwardConfig.max_batch_bytes

    def test_a_small_gpu_gets_smaller_passes(self, large: Subject) -> None:
        memory = device_memory(large, 24 * 10**9, 1e9, 1e9, True)
        assert memory.batch < 5 * GIB
        assert memory.prefixes > 0
        assert memory.used <= 24 * 10**9

    def test_on_a_cpu_the_process_holds_the_model(self, small: Subject) -> None:
        speed = from_rates(carried_rates("2026-11-22-cpu-small.json"), "float32", None)
        plan = make_plan(small, speed, replace(DEMAND, rate=0.5), None)
        assert plan.device.total is None
        assert plan.host.forward > plan.device.weights + plan.device.batch
        assert plan.budgets.max_batch_bytes.value < ForwardConfig.max_batch_bytes

    def test_the_container_holds_it_all(self, plan: CapacityPlan) -> None:
        host = plan.host
        parts = host.tritonserver + host.preprocessing + host.forward + host.shm
        assert host.limit * GIB >= parts
        assert host.limit >= 2 * host.max_memory


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"rate": -1}, "--requests-per-second -1: must be at least 1e-06"),
            ({"rate": math.nan}, "--requests-per-second nan"),
            ({"variation": -0.1}, "--variation -0.1"),
            ({"utilisation": 1.0}, "--utilisation 1: must be at least 0.01 and at most 0.95"),
            ({"devices": 0}, "--gpus-per-replica 0"),
            ({"p99": 31.0}, "--p99 31: must be at least 0.001 and at most 30"),
            ({"p99": 0.05}, "--p99 0.05 s: one request in a hundred takes"),
            ({"timeout": 0.0}, "--timeout 0"),
        ],
    )
    def test_of_the_demand(self, large: Subject, changes: dict[str, Any], words: str) -> None:
        with pytest.raises(ConfigError) as caught:
            planned(large, **changes)
        assert words in str(caught.value)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"responses": 0}, "--responses 0: must be at least 1"),
            ({"responses": 257}, "--responses: 257, the limit is 256 (--max-responses)"),
            ({"response_tokens": 0}, "--response-tokens 0"),
            ({"prompt_tokens": -1}, "--prompt-tokens -1"),
            ({"images": 65}, "--images: 65, the limit is 64 (--max-media)"),
            ({"image_size": (9000, 9000)}, "the limit is 64,000,000 (--max-image-pixels)"),
            ({"image_size": (9000, 1)}, "--image-size 9000x1: "),
            ({"prompt_tokens": 128_000}, "the limit is 128,000 (the model's positions)"),
            ({"responses": 256, "response_tokens": 1100}, "262,144 (--max-request-tokens)"),
            ({"repeat_share": 1.5}, "--repeat-share 1.5"),
        ],
    )
    def test_of_the_shape(self, large: Subject, changes: dict[str, Any], words: str) -> None:
        with pytest.raises(ConfigError) as caught:
            planned(large, shape=replace(SHAPE, **changes))
        assert words in str(caught.value)

    def test_of_a_text_model(self, large: Subject) -> None:
        text = replace(large, geometry=replace(large.geometry, image_token_id=None))
        with pytest.raises(ConfigError, match="--images 1: the model reads no images"):
            footing(SHAPE, text.geometry)

    def test_of_what_does_not_fit(self, large: Subject) -> None:
        with pytest.raises(ConfigError, match=r"exceed the GPU's 16\.0 GB; a larger GPU"):
            device_memory(large, 16 * 10**9, 1e9, 1e9, True)
        with pytest.raises(ConfigError, match=r"a pass over one conversation takes 70\.0 GB"):
            device_memory(large, 80 * 10**9, 70e9, 70e9, True)

    @pytest.mark.parametrize("text", ["H300", "0xH100", "x", "", "1.5xH100", "H100x2"])
    def test_of_gpus(self, text: str) -> None:
        with pytest.raises(ConfigError, match="--gpus"):
            parse_gpus(text)

    def test_of_dtypes(self) -> None:
        with pytest.raises(ConfigError, match="A100 has compute capability below"):
            assumed(GPUS["A100"], "float8")
        with pytest.raises(ConfigError, match=r"--efficiency 1\.2"):
            assumed(GPUS["A100"], "bfloat16", 1.2)


@pytest.fixture(scope="module")
def run() -> Callable[..., Any]:
    def invoke(*arguments: str) -> Any:
        environment = {"COLUMNS": "110", "TERM": "dumb"}
        result = CliRunner(env=environment).invoke(app, ["plan", *arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


ASKED = ("--requests-per-second=20", "--prompt-tokens=300", "--responses=8", "--images=1")


class TestCommand:
    def test_the_pages_example_is_what_it_prints(self) -> None:
        page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
        section = page.split("\n## Sizing replicas\n")[1]
        command, printed = section.split("\n```text\n$ ")[1].split("\n```\n")[0].split("\n", 1)
        words = command.split()
        # In a process of its own: rich reads the width from the environment it was imported in.
        environment = {"COLUMNS": "110", "PATH": os.environ["PATH"]}
        shown = subprocess.check_output([BIN / words[0], *words[1:]], env=environment, text=True)
        lines = [line.rstrip() for line in shown.splitlines()]
        assert printed.splitlines() == lines

    def test_an_unmeasured_gpu_says_so(self, run: Callable[..., Any]) -> None:
        text = " ".join(run("--gpus=H100", *ASKED).stdout.split())
        assert "No version of Triward has been measured on a GPU" in text
        assert "ASSUMPTION" in text
        assert "python -m benchmarks.gpu (docs/gpu.md)" in text
        assert "0.4 (assumed) of 989 TFLOP/s" in text

    def test_a_measured_device_names_its_file(self, run: Callable[..., Any]) -> None:
        few = ("--requests-per-second=0.5", "--prompt-tokens=300", "--model=small")
        text = " ".join(run("--gpus=cpu", *few).stdout.split())
        assert "2026-11-22-cpu-small.json" in text
        assert "ASSUMPTION" not in text

    @pytest.mark.parametrize("gpus", ["CPU", "4xcpu", "8 x Cpu"])
    def test_a_cpu_however_it_is_written(self, run: Callable[..., Any], gpus: str) -> None:
        few = ("--requests-per-second=0.5", "--prompt-tokens=300", "--model=small")
        result = run(f"--gpus={gpus}", *few)
        assert result.exit_code == 0, result.stderr
        assert "--dtype float32" in result.stdout

    def test_json(self, run: Callable[..., Any], plan: CapacityPlan) -> None:
        result = run("--gpus=8xH100", *ASKED, "--json")
        found = json.loads(result.stdout)
        assert (result.exit_code, found["replicas"]) == (0, plan.replicas)
        assert found["flags"]["max_queue_size"]["value"] == plan.budgets.max_queue_size.value
        assert found["manifests"]["helm"]["replicas"] == plan.replicas
        compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
        assert set(found["manifests"]["compose"]) <= set(compose["services"]["triward"])

    def test_values_are_the_charts(self, run: Callable[..., Any]) -> None:
        chart = ROOT / "docker" / "helm" / "triward" / "values.yaml"
        values = yaml.safe_load(chart.read_text())
        printed = run("--gpus=8xH100", *ASKED).stdout
        pasted = yaml.safe_load(printed.split("values.yaml\n")[1])
        assert set(pasted) <= set(values)
        assert {"requests", "limits"} == set(pasted["resources"]) <= set(values["resources"])
        assert pasted["resources"]["requests"]["cpu"] == int(values["resources"]["requests"]["cpu"])
        [flags] = pasted["model"]["hf"].values()
        assert flags[0] in values["model"]["hf"]["exportArgs"]
        export = next(line for line in printed.splitlines() if "triward-server export" in line)
        assert [word for flag in flags[1:] for word in flag.split("=")] == export.split()[6:]

    def test_a_rate_beyond_all_bounds(self, run: Callable[..., Any]) -> None:
        result = run("--gpus=H100", *ASKED, "--requests-per-second=1.7e308")
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
        assert "--requests-per-second 1.7e+308: must be at least 1e-06 and at most" in result.stderr

    def test_decoding_takes_cores(self, run: Callable[..., Any]) -> None:
        images = ("--gpus=H100", "--model=small", "--requests-per-second=400", "--json")
        found = json.loads(run(*ASKED, *images).stdout)
        instances = found["flags"]["preprocess_instances"]["value"]
        assert instances > 4
        assert found["manifests"]["helm"]["resources"]["requests"]["cpu"] == instances + 2

    def test_missing_gpus_are_an_exit_of_1(self, run: Callable[..., Any]) -> None:
        result = run("--gpus=2xH100", *ASKED)
        assert result.exit_code == 1
        assert "3 are missing" in result.stdout

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ((), "--gpus: name a GPU or cpu, or give --measured"),
            (("--gpus=H100", "--image-size=big"), "--image-size 'big': WIDTHxHEIGHT"),
            (("--gpus=cpu", "--efficiency=0.5"), "--efficiency 0.5: it is for a GPU"),
            (("--gpus=H100", "--measured=gone.json"), "--measured gone.json: FileNotFoundError"),
            (("--gpus=H100", "--dtype=float32"), "--dtype float32: on a GPU it is for checks"),
            (("--gpus=H100", "--checkpoint=a", "--repository=b"), "give one"),
        ],
    )
    def test_refusals(
        self, run: Callable[..., Any], arguments: tuple[str, ...], words: str
    ) -> None:
        result = run(*arguments, *ASKED)
        assert result.exit_code == 1
        assert result.stderr.startswith("triward-server plan: ")
        assert words in result.stderr
        assert result.stderr.count("\n") == 1
