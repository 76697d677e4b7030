"""Several forward processes in one server: equal scores, shared work, and each is watched."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.asking import ASK, long_prompt, ready
from tests.commands import BIN, Command, assert_gone, named
from tests.conftest import Exit, brief, encode
from tests.conversations import picture
from triward import RewardClient
from triward_server.backend.metrics import CANARIES, CANARY, REQUESTS, WORKING
from triward_server.backend.triton_io import _config
from triward_server.config import ForwardConfig
from triward_server.contract import PARAMETER
from triward_server.errors import ConfigError, LaunchError
from triward_server.export.configuration import _read_config, configure
from triward_server.export.draft import copy_source
from triward_server.export.options import export_parameters, read_options
from triward_server.export.placement import placement
from triward_server.schema import CONTRACT_VERSION, REWARD
from triward_server.serving import instances, watchdog
from triward_server.serving.integrity import Verify, check_served
from triward_server.serving.launch import TritonServer
from triward_server.serving.repository import gpu_models
from triward_server.serving.triton_http import Series, TritonHttp, read_metrics
from triward_server.serving.watchdog import check_once
from triward_server.testing.echo import fault, make_echo

FIRST, SECOND = "reward_forward_0_0", "reward_forward_0_1"


# What an export writes


def values(folder: Path, **given: Any) -> dict[str, Any]:
    """What the command gets."""
    defaults = {each.name: each.default for each in export_parameters()}
    return {**defaults, "checkpoint": "none", "output": folder, **given}


def written(folder: Path, **given: Any) -> Path:
    """A repository without a model in it, as the options have it."""
    options = read_options(values(folder, **given))
    copy_source(folder, REWARD, "1", options)
    configure(folder, REWARD, options)
    return folder


def group(folder: Path, model: str) -> tuple[str, int, list[int]]:
    config = _read_config(folder / model / "config.pbtxt")
    [only] = config.instance_group
    return only.Kind.Name(only.kind), only.count, list(only.gpus)


@pytest.mark.parametrize(
    ("given", "device", "forward", "preprocess"),
    [
        ({}, "cuda", ("KIND_GPU", 1, []), 4),
        ({"device": "cuda:1"}, "cuda:1", ("KIND_GPU", 1, [1]), 4),
        ({"device": "cpu"}, "cpu", ("KIND_CPU", 1, []), 4),
        ({"devices": "all"}, "cuda", ("KIND_GPU", 1, []), 4),
        ({"devices": "cuda:0,cuda:3"}, "cuda", ("KIND_GPU", 1, [0, 3]), 8),
        ({"devices": "cpu,cpu,cpu"}, "cpu", ("KIND_CPU", 3, []), 12),
        ({"devices": "cpu,cpu", "preprocess_instances": 3}, "cpu", ("KIND_CPU", 2, []), 3),
    ],
)
def test_devices_become_instances(
    given: dict[str, Any], device: str, forward: tuple[str, int, list[int]], preprocess: int,
    tmp_path: Path,
) -> None:  # fmt: skip
    folder = written(tmp_path, **given)
    assert group(folder, "reward_forward") == forward
    assert group(folder, "reward_preprocess") == ("KIND_CPU", preprocess, [])
    sizes = [_read_config(folder / name / "config.pbtxt").max_batch_size
             for name in ("reward_preprocess", "reward_forward", "reward")]  # fmt: skip
    share = 64 // max(forward[1], len(forward[2]))
    assert sizes == [64, share, share], "what waits is for all of them"
    parameters = _read_config(folder / "reward_forward/config.pbtxt").parameters
    assert parameters["device"].string_value == device
    assert parameters["compile"].string_value == str(device != "cpu")
    if forward[0] == "KIND_GPU":
        assert gpu_models(folder) == {"reward_forward": tuple(forward[2])}


def test_a_batch_stays_large_enough_for_a_gpu(tmp_path: Path) -> None:
    options = read_options(values(tmp_path, devices=",".join(f"cuda:{n}" for n in range(16))))
    assert options.triton.forward_batch_size == 8
    assert options.triton.preprocess_instances == 64


@pytest.mark.parametrize("devices", ["", "cpu,cuda:0", "cuda,cuda", "cuda:0,cuda:0", "tpu", "2"])
def test_what_are_no_devices(devices: str) -> None:
    with pytest.raises(ConfigError, match=f"^--devices {devices!r}: "):
        placement(devices)


def test_device_and_devices_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--device cpu and --devices cpu,cpu: give one"):
        written(tmp_path, device="cpu", devices="cpu,cpu")


@pytest.mark.parametrize(
    ("device", "number", "chosen"),
    [("cuda", "1", "cuda:1"), ("cuda:2", "2", "cuda:2"), ("cpu", "0", "cpu")],
)
def test_an_instance_takes_the_device_that_triton_gives_it(
    device: str, number: str, chosen: str
) -> None:
    parameters = {"device": device, PARAMETER: CONTRACT_VERSION}
    config = {"parameters": {k: {"string_value": str(v)} for k, v in parameters.items()}}
    args = {"model_config": json.dumps(config), "model_instance_device_id": number}
    assert _config(ForwardConfig, args).device == chosen


# Two of them behind a real Triton


@pytest.fixture(scope="module")
def pair(
    export: Callable[..., Exit], checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("pair") / "models"
    result = export(
        "--checkpoint", checkpoint, "--output", output, "--devices=cpu,cpu", "--threads=1",
        "--preprocess-instances=2", "--dtype=float32",
    )  # fmt: skip
    assert result.code == 0, result.stderr
    return output


@pytest.fixture(scope="module")
def both(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with brief(pair, tmp_path_factory.mktemp("log") / "triton.log") as running:
        yield running


def series(server: TritonServer, name: str) -> dict[str, float]:
    """A metric by instance."""
    page = read_metrics("127.0.0.1", server.endpoints.metrics_port, 10)
    return {
        each.labels["instance"]: each.value
        for each in page
        if each.name == name and each.labels["model"] == "reward_forward"
    }


def test_two_instances_share_the_work_and_score_as_one(
    both: TritonServer, client: RewardClient
) -> None:
    image = {"type": "image", "image": encode(picture(84, 56, 3))}
    prompts = [[{"role": "user", "content": [image, {"type": "text", "text": "?"}]}]]
    prompts += [long_prompt(number) for number in range(7)]
    expected = [client.score_responses(prompt, ["yes", "no"]) for prompt in prompts]
    before = series(both, REQUESTS)
    with RewardClient(both.endpoints.grpc, timeout=120) as asking, ThreadPoolExecutor(8) as pool:
        scored = list(pool.map(lambda each: asking.score_responses(each, ["yes", "no"]), prompts))
        for _ in range(20):  # of two that are free any may take it
            assert asking.score_responses(prompts[0], ["yes", "no"]) == pytest.approx(
                expected[0], rel=1e-5
            )
    for got, wanted in zip(scored, expected, strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)
    took = {name: count - before[name] for name, count in series(both, REQUESTS).items()}
    assert set(took) == {FIRST, SECOND} and all(took.values()), "each served some"
    assert sum(took.values()) == len(prompts) + 20, "and no request twice"
    caches = series(both, "triward_embedding_cache_bytes")
    assert set(caches) == {FIRST, SECOND} and all(caches.values()), "each has a cache of its own"


def test_a_deep_health_check_asks_every_instance(both: TritonServer, pair: Path) -> None:
    before = series(both, CANARIES)
    command = [
        BIN / "triward-server", "health", "--deep", "--repository", pair,
        f"--http-port={both.endpoints.http_port}", f"--metrics-port={both.endpoints.metrics_port}",
    ]  # fmt: skip
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (0, "well\n"), result.stderr
    after = series(both, CANARIES)
    assert all(after[name] > before[name] for name in (FIRST, SECOND))


def test_the_manifest_knows_the_devices(pair: Path) -> None:
    manifest = json.loads((pair / "reward/1/manifest.json").read_text())
    assert manifest["options"]["devices"] == "cpu,cpu"
    assert manifest["options"]["forward"]["device"] == "cpu"
    said: list[str] = []
    check_served(pair, Verify.FULL, said.append)


# One of two fails


@pytest.fixture
def echoes(pair: Path, tmp_path: Path) -> Path:
    copy = Path(shutil.copytree(pair, tmp_path / "echoes"))
    make_echo(copy)
    return copy


def test_one_that_is_killed_is_named(echoes: Path, serve: Callable[..., Command]) -> None:
    running = serve(repository=echoes)
    url = ready(running)
    with RewardClient(url, timeout=60) as client:
        assert client.score(ASK)
    family = running.family()
    [victim] = named(family, "triton", SECOND)
    victim.kill()
    assert running.wait() == 1
    reason = running.output.splitlines()[-1]
    assert re.search(rf"process {victim.pid} of {SECOND} is dead|Stub process '{SECOND}'", reason)
    assert_gone(family)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("drift", rf"reward: the canary scores .*; by {SECOND}"),
        ("nan", rf"the model's score is nan.*; by {SECOND}"),
        ("hang", rf"{SECOND} has got nothing done for"),
    ],
)
def test_one_that_goes_wrong_is_named(
    damage: str, words: str, echoes: Path, serve: Callable[..., Command]
) -> None:
    running = serve("--hang-timeout=3", repository=echoes)
    ready(running)
    family = running.family()
    fault(echoes, f"{damage}@{SECOND}", "0.5")
    assert running.wait() == 1
    assert re.search(words, running.output.splitlines()[-1])
    assert_gone(family)


def test_a_deep_health_check_finds_the_one_that_drifts(echoes: Path, tmp_path: Path) -> None:
    with brief(echoes, tmp_path / "log") as running:
        port = running.endpoints.metrics_port
        check_once(running.http, echoes, 20, deep=True, metrics_port=port)
        fault(echoes, f"drift@{FIRST}", "0.5")
        with pytest.raises(LaunchError, match=rf"the canary scores .*; by {FIRST}$"):
            check_once(running.http, echoes, 20, deep=True, metrics_port=port)


# What the metrics page shows


def page(*rows: tuple[str, str, float], **labels: str) -> list[Series]:
    return [
        Series(name, {"model": "reward_forward", "version": "1", "instance": each, **labels}, n)
        for name, each, n in rows
    ]


@pytest.mark.parametrize(("busy", "missing"), [(0.0, [SECOND]), (17.5, [])])
def test_an_instance_without_an_answer(
    busy: float, missing: list[str], repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is missed if it is free: a deep health check asks eight times for each."""
    asked: list[float] = []

    def read(*_: object) -> list[Series]:
        counts = page((CANARIES, FIRST, len(asked)), (CANARIES, SECOND, 3.0))
        return counts + page((WORKING, FIRST, 0.0), (WORKING, SECOND, busy if asked else 0.0))

    monkeypatch.setattr(watchdog, "ask_canary", lambda *_: asked.append(time.monotonic()))
    monkeypatch.setattr(watchdog, "read_metrics", read)
    monkeypatch.setattr(TritonHttp, "is_ready", lambda *_: True)
    if missing:
        with pytest.raises(LaunchError, match=f"^{SECOND}: free, and answers no canary"):
            check_once(TritonHttp("h", 1), repository, 20, deep=True)
    else:
        check_once(TritonHttp("h", 1), repository, 20, deep=True)
    assert len(asked) == (16 if missing else 1)


def test_a_round_asks_once_for_each_instance(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first of eight answers all."""
    asked: list[object] = []

    def read(*_: object) -> list[Series]:
        counts = [float(len(asked)), *[0.0] * 7]
        return page(*[(CANARIES, f"reward_forward_0_{n}", each) for n, each in enumerate(counts)])

    monkeypatch.setattr(watchdog, "ask_canary", lambda *_: asked.append(_))
    monkeypatch.setattr(watchdog, "read_metrics", read)
    monkeypatch.setattr(watchdog.Watchdog, "_check_processes", lambda self: None)
    dog = watchdog.Watchdog(TritonHttp("h", 1), 2, repository, os.getpid(), hang_timeout=10)
    dog.check()
    assert len(asked) == 8


def test_versions_are_told_apart() -> None:
    """While they change, two have instances of one name, and one of them gets nothing."""
    other = page((CANARIES, FIRST, 5.0), version="2")
    before = instances.answered(page((CANARIES, FIRST, 1.0)) + other, REWARD)
    assert instances.silent(page((CANARIES, FIRST, 2.0)) + other, before, REWARD) == []
    both = page((CANARIES, FIRST, 2.0), (CANARIES, SECOND, 0.0))
    assert instances.silent(both, instances.answered(both, REWARD), REWARD) == []
    before = instances.answered(page((CANARIES, FIRST, 1.0), (CANARIES, SECOND, 0.0)), REWARD)
    assert instances.silent(both, before, REWARD) == [SECOND]


def test_who_is_wrong_is_read_by_response(repository: Path) -> None:
    canaries = watchdog.Canaries(repository)
    good = canaries.served(REWARD).scores
    assert good is not None and len(good) == 2
    rows = [
        row
        for place, score in enumerate(good)
        for row in page(
            (CANARY, FIRST, score), (CANARY, SECOND, score + place), response=str(place)
        )
    ]
    assert instances.wrong(rows[::-1], canaries, REWARD) == [SECOND]
    assert instances.wrong(rows[::2], canaries, REWARD) == []
