"""`triward completion`, in the shell that it is for."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

import triward.cli
from triward.completion import SHELLS

bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
# Completes the last word, as bash does at TAB.
PRESS_TAB = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
_shtab_triward
printf '%s\\n' "${COMPREPLY[@]}"
"""


def script(shell, capsys):
    pytest.importorskip("shtab")
    assert triward.cli.main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.fixture
def press_tab(tmp_path, capsys):
    """Words before the cursor -> what bash offers, in a folder with a file and a folder."""
    file = tmp_path / "triward.bash"
    file.write_text(script("bash", capsys), encoding="utf-8")
    here = tmp_path / "here"
    (here / "charts").mkdir(parents=True)
    (here / "chart.png").touch()

    def press(*words):
        command = ["bash", "--norc", "--noprofile", "-c", PRESS_TAB, "bash", file, *words]
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return sorted(done.stdout.split())

    return press


@bash
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["sc"], ["score"]),
        (["com"], ["compare", "completion"]),
        (["score", "--im"], ["--image"]),
        (["score", "--image", "cha"], ["chart.png", "charts"]),
        (["score", "--image", "chart.png", "--prompt", "q", "--res"], ["--response"]),
        (["rank", "--input", "chart."], ["chart.png"]),
        (["health", "--tls-ca", "chart."], ["chart.png"]),
        (["health", "--routing", "p"], ["prompt"]),
        (["completion", "t"], ["tcsh"]),
    ],
)
def test_what_bash_offers(press_tab, words, offered):
    assert press_tab("triward", *words) == offered


@bash
def test_commands_of_other_distributions_are_offered(press_tab):
    pytest.importorskip("triward_tools")
    assert press_tab("triward", "best") == ["best-of-n"]
    assert press_tab("triward", "eval", "vl") == ["vl-rewardbench"]
    folders = press_tab("triward", "eval", "vl-rewardbench", "--output", "cha")
    assert folders == ["charts"]


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_has_a_script(shell, capsys):
    out = script(shell, capsys)
    assert "health" in out and "best-of-n" in out
    if shell != "tcsh" and shutil.which(shell):
        checked = subprocess.run([shell, "-n"], input=out, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr


def test_a_client_without_tools_has_a_script(monkeypatch, capsys):
    monkeypatch.setattr(triward.cli, "entry_points", lambda group: ())
    assert "health" in script("bash", capsys)


def test_without_shtab_it_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as caught:
        triward.cli.main(["completion", "bash"])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith(
        "error: needs shtab; in a checkout of Triward: pip install './client[completion]'\n"
    )


def test_an_unknown_shell(capsys):
    with pytest.raises(SystemExit):
        triward.cli.main(["completion", "ksh"])
    assert "bash" in capsys.readouterr().err


def test_every_file_is_completed_as_one():
    """By the metavar, which the script goes by."""
    parser = triward.cli._parser()
    [commands] = [action for action in parser._actions if action.dest == "command"]
    files = {"image", "input", "output", "tls_ca", "tls_certificate", "tls_key", "data"}
    for name, command in commands.choices.items():
        found = {a.dest: a.metavar for a in command._actions if a.dest in files}
        assert set(found.values()) <= {"FILE", "FOLDER", "PATH"}, name
