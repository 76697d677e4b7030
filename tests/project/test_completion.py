"""`triward-server --show-completion`, in bash."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.commands import BIN

# The shell is found among the parents of the command. `-o default`: bash offers files by itself
# where the function offers nothing.
PRESS_TAB = """
eval "$(triward-server --show-completion)"
complete -p triward-server
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_triward_server_completion triward-server
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["ex"], ["export", "export-onnx"]),
        (["serve", "--repos"], ["--repository"]),
        (["serve", "--verify", "s"], ["sampled"]),
        (["serve", "--repository", "mod"], []),
    ],
)
def test_what_bash_offers(words: list[str], offered: list[str], tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    command = ["bash", "--norc", "--noprofile", "-c", PRESS_TAB, "bash", "triward-server", *words]
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    registered, *found = done.stdout.split("\n")
    assert registered == "complete -o default -F _triward_server_completion triward-server"
    assert [line for line in found if line] == offered
