"""The job script for Slurm, with stand-ins for Slurm's own commands: both "nodes" are this machine.

What a real Slurm adds (allocations, GPUs, signals between nodes) is not here to be tested.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.asking import wait_until
from tests.commands import BIN, Command, has_ended, named
from tests.conftest import ROOT
from tests.ports import fixed

SCRIPT = ROOT / "docker" / "slurm" / "triward.sbatch"

# Runs a step's tasks here, each with ports of its own, and hands SIGTERM on, as srun does.
SRUN = """#!/bin/bash
echo "$@" >> "$STUB_LOG"
tasks=1
while [[ $1 == --* ]]; do
    [[ $1 != --ntasks=* ]] || tasks=${1#*=}
    shift
done
pids=() ports=($STUB_PORTS)
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM
for ((i = 0; i < tasks; i++)); do
    SLURM_PROCID=$i SLURMD_NODENAME=127.0.0.1 TRIWARD_PORT=${ports[i]} "$@" &
    pids+=($!)
done
worst=0
for pid in "${pids[@]}"; do
    while true; do
        status=0
        wait "$pid" || status=$?
        kill -0 "$pid" 2>/dev/null || break
    done
    ((status == 0)) || { worst=$status; kill -TERM "${pids[@]}" 2>/dev/null; }
done
exit "$worst"
"""
SCONTROL = """#!/bin/sh
[ "$1 $2 $3" = "show hostnames nodes[1-3]" ] && exec printf 'node1\\nnode2\\nnode3\\n'
echo "scontrol knows no $3" >&2
exit 1
"""
TRAINER = """
import os, signal, sys, time
from pathlib import Path
from triward import RewardClient

def told(*_):
    Path("saved").touch()
    sys.exit(7)

signal.signal(signal.SIGTERM, told)
addresses = Path(os.environ["TRIWARD_ADDRESSES"]).read_text().split()
Path("addresses").write_text(" ".join(addresses))
for url in [addresses[:1], addresses[-1:], addresses]:
    with RewardClient(url, routing="prompt") as client:
        print(client.score_responses([{"role": "user", "content": "?"}], ["Yes.", "No."]))
Path("scored").touch()
while len(sys.argv) > 1:
    time.sleep(0.05)
"""


@pytest.fixture
def job(
    command: Callable[..., Command], echo_repository: Path, tmp_path: Path
) -> Callable[..., Command]:
    """Starts the script as Slurm starts a job."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    (tmp_path / "submitted").mkdir()
    (tmp_path / "train.py").write_text(TRAINER)

    def run(*flags: str, **environment: str) -> Command:
        ports = [int(fixed().grpc_port) + 1 for _ in range(2)]
        shell = f"cd {tmp_path / 'submitted'} && exec bash {SCRIPT} " + '"$@"'
        return command(
            "bash", "-c", shell, "job", sys.executable, tmp_path / "train.py", *flags,
            PATH=f"{stubs}:{BIN}:{os.environ['PATH']}",
            STUB_LOG=str(tmp_path / "steps"), STUB_PORTS=" ".join(map(str, ports)),
            SLURM_SUBMIT_DIR=str(tmp_path / "submitted"), SLURM_JOB_ID="17",
            SLURM_CPUS_ON_NODE="48",
            **{
                "TRIWARD_REPOSITORY": str(echo_repository), "SLURM_JOB_NODELIST": "nodes[1-3]",
                **environment,
            },
        )  # fmt: skip

    return run


def test_bash_accepts_it() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)


def test_its_options_come_first_and_are_slurms() -> None:
    """Slurm reads no option behind the first command."""
    head = SCRIPT.read_text().split("set -euo pipefail")[0].splitlines()
    assert all(line.startswith("#") for line in head)
    options = [line.removeprefix("#SBATCH ") for line in head if line.startswith("#SBATCH")]
    whole = {"--exclusive", "--mem=0"}
    assert {"--nodes=2", "--gpus-per-node=1", "--signal=B:TERM@120", *whole} <= {*options}
    assert all(re.fullmatch(r"--[a-z-]+(=\S+)?", option) for option in options)


def test_two_servers_and_a_trainer(job: Callable[..., Command], tmp_path: Path) -> None:
    running = job(TRIWARD_SERVERS="2")
    running.wait_for("^reward servers: ")
    family = running.family()
    assert running.wait() == 0, running.output
    scores = re.findall(r"^\[.*\]$", running.output, re.MULTILINE)
    assert len(scores) == 3 and len({*scores}) == 1, "all servers have one opinion"
    addresses = (tmp_path / "submitted" / "addresses").read_text().split()
    assert len({*addresses}) == 2
    steps = (tmp_path / "steps").read_text()
    serving, training = (line for line in steps.splitlines() if line.startswith("--exact"))
    assert {"--nodes=2", "--ntasks=2", "--nodelist=node1,node2", "--gpus-per-task=1"} <= {
        *serving.split()
    }
    assert {"--nodes=1", "--exclude=node1,node2"} <= {*training.split()}
    assert {"--cpus-per-task=8", "--mem=32G"} <= {*serving.split()}
    assert {"--cpus-per-task=48", "--mem=0"} <= {*training.split()}, "all of its node"
    assert all(has_ended(member) for member in family)
    assert {path.name for path in (tmp_path / "submitted").iterdir()} == {"addresses", "scored"}


def test_the_end_of_its_time(job: Callable[..., Command], tmp_path: Path) -> None:
    """Slurm tells the script alone; the trainer can save, then the server drains."""
    running = job("--stay", TRIWARD_TRAINER_STEP="--ntasks=1 --gpus=7")
    wait_until((tmp_path / "submitted" / "scored").exists, timeout=120)
    family = running.family()
    assert "--exact --ntasks=1 --gpus=7" in (tmp_path / "steps").read_text()
    running.process.send_signal(signal.SIGTERM)
    assert running.wait() == 7, running.output
    assert (tmp_path / "submitted" / "saved").exists()
    assert all(has_ended(member) for member in family)


def test_a_server_that_ends_ends_the_job(job: Callable[..., Command], tmp_path: Path) -> None:
    running = job("--stay")
    wait_until((tmp_path / "submitted" / "scored").exists, timeout=120)
    family = running.family()
    [triton] = named(family, "tritonserver")
    triton.kill()
    assert running.wait() == 1, running.output
    assert "a reward server ended before the trainer" in running.output
    assert (tmp_path / "submitted" / "saved").exists(), "the trainer was told"
    psutil.wait_procs(family, timeout=30)
    assert all(has_ended(member) for member in family)


def test_a_server_that_does_not_start_ends_the_job(job: Callable[..., Command]) -> None:
    running = job(TRIWARD_REPOSITORY="/nowhere")
    assert running.wait() == 1
    assert "is not a repository" in running.output
    assert "a reward server did not start" in running.output


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"TRIWARD_SERVERS": "4"}, "TRIWARD_SERVERS=4: the job has 3 nodes; one server a node"),
        ({"TRIWARD_SERVERS": "3"}, "TRIWARD_SERVERS=3: the job has 3 nodes, which leaves none"),
        ({"TRIWARD_SERVERS": "0"}, "TRIWARD_SERVERS=0: not a number of servers"),
        ({"SLURM_JOB_NODELIST": "unknown"}, "scontrol knows no unknown"),
    ],
)
def test_what_cannot_be_started_is_refused(
    job: Callable[..., Command], tmp_path: Path, environment: dict[str, str], sentence: str
) -> None:
    running = job(**environment)
    assert running.wait() in (1, 2), running.output
    assert sentence in running.output
    assert not (tmp_path / "steps").exists() and [*(tmp_path / "submitted").iterdir()] == []


def test_the_end_of_its_time_before_the_trainer(
    job: Callable[..., Command], tmp_path: Path
) -> None:
    """SIGTERM comes when the servers are ready and the trainer is not there yet."""
    early = tmp_path / "stubs" / "paste"
    early.write_text('#!/bin/sh\nkill -TERM "$PPID"\n')
    early.chmod(0o755)
    running = job("--stay")
    assert running.wait() == 128 + signal.SIGTERM, running.output
    assert (tmp_path / "steps").read_text().count("--exact") == 1, "that of the servers"


def test_the_trainer_gets_no_variable_of_the_scripts_own(
    job: Callable[..., Command], tmp_path: Path
) -> None:
    (tmp_path / "train.py").write_text("import os\nprint('new', sorted(os.environ))")
    running = job()
    assert running.wait() == 0, running.output
    [line] = re.findall(r"^new .*", running.output, re.MULTILINE)
    assert "'folder'" not in line and "'TRIWARD_FOLDER'" in line
