from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import triward
from tests.fakeserver import FakeServer

ROOT = Path(__file__).parents[2]
CLIENT = ROOT / "client"


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, **environment},
    )


def test_import_stays_light():
    heavy = (
        "torch",
        "transformers",
        "PIL",
        "requests",
        "urllib.request",
        "numpy",
        "grpc",
        "triward_server",
        "triward_tools",
        "pyarrow",
        "jinja2",
        "matplotlib",
        "ray",
        "rich",
        "tqdm",
        "datasets",
        "asyncio",
    )
    code = f"import sys, triward, triward.cli; print([m for m in {heavy} if m in sys.modules])"
    done = run("-c", code)
    assert done.stdout.strip() == "[]", done.stderr


def test_scoring_without_pil_does_not_import_it():
    code = """
import sys
from triward.deadline import Deadline
from triward.errors import MediaError
from triward.media import read_media
try:
    read_media(object(), Deadline(1))
except MediaError:
    print("PIL" in sys.modules)
"""
    assert run("-c", code).stdout.strip() == "False"


def test_exported_names():
    assert sorted(triward.__all__) == [
        "AsyncRewardClient",
        "DeadlineExceeded",
        "InvalidRequest",
        "MediaError",
        "RewardClient",
        "ServerError",
        "ServerUnavailable",
        "Tls",
        "TriwardError",
        "__version__",
        "pixels_of",
    ]
    assert all(hasattr(triward, name) for name in triward.__all__)
    assert triward.AsyncRewardClient.__module__ == "triward.aio"
    with pytest.raises(AttributeError, match="module 'triward' has no attribute 'RewardCleint'"):
        _ = triward.RewardCleint


def test_the_thin_client_stays_thin():
    project = (CLIENT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dependencies = ["cachetools", "numpy", "tqdm", "tritonclient[grpc]"]' in project
    assert '\ncompletion = ["shtab"]\n' in project
    assert (CLIENT / "triward" / "py.typed").is_file()


def test_a_narrow_console_gets_a_sentence_instead_of_a_traceback():
    arguments = ["score", "--prompt", "q", "--response", "r", "--image", "gone-ü.png"]
    done = run("-m", "triward", *arguments, PYTHONIOENCODING="ascii", PYTHONUTF8="1")
    assert done.returncode == 2
    assert done.stderr.startswith("triward: messages[0].content[0]: cannot read ")
    assert done.stderr.count("\n") == 1


def wheel_of(distribution, folder):
    source = shutil.copytree(
        ROOT / distribution, folder / distribution, ignore=shutil.ignore_patterns("build")
    )
    done = run("-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", folder, source)
    assert done.returncode == 0, done.stderr
    [wheel] = folder.glob(f"{'triward_tools' if distribution == 'tools' else 'triward'}-*.whl")
    return wheel


def names_in(wheel):
    with zipfile.ZipFile(wheel) as files:
        return set(files.namelist())


@pytest.fixture(scope="module")
def client_wheel(tmp_path_factory):
    return wheel_of("client", tmp_path_factory.mktemp("client"))


@pytest.fixture(scope="module")
def tools_wheel(tmp_path_factory):
    return wheel_of("tools", tmp_path_factory.mktemp("tools"))


def test_wheels_are_small_and_whole(client_wheel, tools_wheel):
    assert client_wheel.stat().st_size < 130_000
    assert tools_wheel.stat().st_size < 180_000
    names = names_in(client_wheel)
    assert {"triward/integrations/rows.py", "triward/py.typed"} < names
    assert not any("triward_tools" in name for name in names)
    names = names_in(tools_wheel)
    assert {"triward_tools/evaluation/report.html", "triward_tools/py.typed"} < names
    assert not any(name.startswith("triward/") for name in names)


class Environment:
    """An empty one, without this one's packages and paths."""

    def __init__(self, folder):
        self.bin = folder / ("Scripts" if os.name == "nt" else "bin")
        venv.create(folder, with_pip=True)
        self.empty = self.packages()

    def __call__(self, program, *arguments):
        return subprocess.run(
            [self.bin / program, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
            cwd=self.bin.parent,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        )

    def install(self, *arguments):
        tested = sys.version_info[:2] == (3, 11)  # the Python that these versions are for
        constraint = ("--constraint", ROOT / "constraints.txt") if tested else ()
        options = ("--quiet", "--disable-pip-version-check", *constraint)
        done = self("pip", "install", *options, *arguments)
        assert done.returncode == 0, done.stderr

    def packages(self):
        return set(self("pip", "list", "--format", "freeze").stdout.split())


@pytest.mark.slow
def test_wheels_in_an_empty_environment(tmp_path, client_wheel, tools_wheel):
    """The client alone, then with the tools: their help, and a call."""
    environment = Environment(tmp_path / "venv")
    environment.install(client_wheel)
    assert len(environment.packages() - environment.empty) <= 15
    assert environment("triward", "--help").returncode == 0
    evaluation = environment("triward", "eval", "--help")
    assert evaluation.returncode == 2
    assert "pip install ./tools" in evaluation.stderr
    loaded = "import sys, triward; print({*sys.modules} & {*sys.argv[1:]})"
    heavy = ("torch", "pyarrow", "jinja2", "matplotlib", "PIL", "triward_tools")
    assert environment("python", "-c", loaded, *heavy).stdout == "set()\n"

    line = {"messages": [{"role": "user", "content": "q"}], "responses": ["a", "bcd"]}
    (tmp_path / "in.jsonl").write_text(json.dumps(line), encoding="utf-8")
    with FakeServer() as server:
        options = ("--url", server.url, "--json")
        asked = ("--prompt", "q", "--response", "a", "--response", "bcd")
        scored = environment("triward", "score", *options, *asked)
        assert len(json.loads(scored.stdout)["scores"]) == 2, scored.stderr

        environment.install(tools_wheel)
        for name in ("eval", "best-of-n", "filter", "pairs"):
            told = environment("triward", name, "--help")
            assert told.returncode == 0
            assert told.stdout.startswith(f"usage: triward {name}")
        files = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
        chosen = environment("triward", "best-of-n", *options, *files)
        assert chosen.returncode == 0, chosen.stderr
    best = json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))
    assert best["scores"] == json.loads(scored.stdout)["scores"]
