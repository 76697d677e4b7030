"""vLLM beside us: both are asked the same, no wrong side is timed, and all of vLLM ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from benchmarks.peers import sides
from benchmarks.peers.steps import (
    OURS,
    PEER,
    Times,
    Wave,
    all_conversations,
    check_parity,
    distance,
    draw_round,
)
from benchmarks.workloads import Messages, Writer


def drawn(seed: int, scale: float = 0.1) -> dict[str, tuple[Wave, ...]]:
    return draw_round(Writer(np.random.default_rng(seed)), scale)


def prompts(waves: tuple[Wave, ...]) -> set[str]:
    return {group.prompt[0]["content"] for wave in waves for group in wave}


def test_a_round_has_the_requests_that_its_rows_say() -> None:
    shapes = {
        step: [[len(group.responses) for group in wave] for wave in waves]
        for step, waves in drawn(0).items()
    }
    assert shapes == {
        "16 singles at once": [[1] * 16],
        "8 responses, one request": [[8]],
        "a second wave of 8 to the same prompt": [[8]],
        "8 responses, as 8 requests at once": [[1] * 8],
        "8 responses, one after another": [[1]] * 8,
        "64 responses, one request": [[64]],
        "a dialogue of 10 turns, scored after each": [[1]] * 10,
    }


def test_no_prompt_comes_again_but_where_a_row_is_about_that() -> None:
    rounds = [drawn(seed) for seed in (1, 2)]
    again = "a second wave of 8 to the same prompt"
    seen = [
        prompt for each in rounds for s, w in each.items() if s != again for prompt in prompts(w)
    ]
    assert len(seen) == len(set(seen)) == 2 * (16 + 1 + 1 + 1 + 1 + 1)
    for each in rounds:
        assert prompts(each[again]) == prompts(each["8 responses, one request"])
        old, new = (all_conversations(each[s]) for s in ("8 responses, one request", again))
        assert all(one not in old for one in new)


def test_each_turn_of_a_dialogue_begins_with_all_of_the_turn_before() -> None:
    turns = all_conversations(drawn(0)["a dialogue of 10 turns, scored after each"])
    before: Messages = []
    for turn in turns:
        assert turn[: len(before)] == before
        assert [message["role"] for message in turn[len(before) :]] == ["user", "assistant"]
        before = turn


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_lengths_follow_the_scale(scale: float) -> None:
    (prompt,) = prompts(drawn(0, scale)["8 responses, one request"])
    assert len(prompt.split()) == 600 * scale


def test_a_ratio_is_of_one_round_and_above_1_where_the_peer_took_longer() -> None:
    times = Times(8)
    for ours, peer in [(2.0, 3.0), (4.0, 2.0)]:
        times.add("offline", OURS, ours)
        times.add("offline", PEER, peer)
    summary: dict[str, Any] = times.summary()
    offline = summary["columns"]["offline"]
    assert offline["peer_time_over_ours"] == [1.5, 0.5]
    assert offline["sides"][OURS]["all_s"] == [2.0, 4.0]
    assert offline["sides"][OURS]["conversations_per_s"] == round(8 / 3, 3)


def test_a_side_that_is_wrong_in_one_score_ends_the_measurement() -> None:
    assert distance([1.0, -10.0], [1.0, -10.0005]) == pytest.approx(5e-5, rel=1e-3)
    check_parity({"triward, offline": 5e-5}, 1e-4)
    for wrong in (1.001, float("nan")):
        off = distance([wrong, -10.0], [1.0, -10.0])
        with pytest.raises(RuntimeError, match="vllm, served"):
            check_parity({"triward, offline": 0.0, "vllm, served": off}, 1e-4)


GRANDCHILD = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
child.wait()
"""


def test_all_processes_of_a_side_end_with_it_and_leave_no_shared_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sides, "_END", 0.5)
    with subprocess.Popen(
        [sys.executable, "-c", GRANDCHILD],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout
        grandchild = int(process.stdout.readline())
        region = Path(f"/dev/shm/__KMP_REGISTERED_LIB_{grandchild}_0")
        region.touch()
        sides._end(process)
    assert not region.exists()
    assert not psutil.pid_exists(grandchild) or (
        psutil.Process(grandchild).status() == psutil.STATUS_ZOMBIE
    )


def test_vllms_own_last_words_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sides, "PYTHON", Path(sys.executable))  # which has no vLLM
    side = sides.peer_engine(tmp_path, "float32", lambda group: [], tmp_path)
    with pytest.raises(RuntimeError, match=r"vLLM ended:[\s\S]*No module named 'vllm'"), side:
        pass


BUSY = """
import time
print("computes", flush=True)
while time.process_time() < 1:
    pass
print("rests", flush=True)
time.sleep(600)
"""


def test_a_turn_begins_when_the_other_side_rests() -> None:
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"computes\n"
        try:
            sides.wait_until_idle()
            spent = sum(psutil.Process(process.pid).cpu_times()[:2])
        finally:
            process.kill()
    assert spent > 0.9  # of 1 second


def test_a_side_that_never_rests_ends_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sides, "_END", 1.2)
    endless = BUSY.replace("< 1", "< 60")
    with subprocess.Popen([sys.executable, "-c", endless], stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"computes\n"
        try:
            with pytest.raises(RuntimeError, match="after its last request"):
                sides.wait_until_idle()
        finally:
            process.kill()
