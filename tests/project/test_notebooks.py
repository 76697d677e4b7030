"""examples/*.ipynb: they run from the top, and what they print is what the files hold."""

from __future__ import annotations

import base64
import importlib
import re
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.conftest import ROOT
from triward_server.serving.launch import TritonServer

EXAMPLES = ROOT / "examples"
PATHS = sorted(EXAMPLES.glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
# TRL's and the model card's imports take most of a run's time.
QUICK = {"judging_a_judge"}
_NUMBER = re.compile(r"-?\d+\.\d+")


@pytest.fixture(scope="module")
def runner() -> Iterator[Any]:
    """The script of `make notebooks`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module("notebooks")
        sys.modules.pop("notebooks")


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cell: Any) -> list[str]:
    """What a cell printed or shows as text."""
    return [
        output.text if output.output_type == "stream" else output.data["text/plain"]
        for output in cell.outputs
        if output.output_type == "stream" or "text/plain" in output.get("data", {})
    ]


def pictures(cell: Any) -> list[bytes]:
    found = (output.get("data", {}).get("image/png") for output in cell.outputs)
    return [base64.b64decode(picture) for picture in found if picture]


def differences(kept: str, now: str) -> list[tuple[str, str]]:
    """Return what differs: words, and fractions by more than 1e-4 and their last digit."""
    if _NUMBER.split(kept) != _NUMBER.split(now):
        return [(kept, now)]
    return [
        (one, other)
        for one, other in zip(_NUMBER.findall(kept), _NUMBER.findall(now), strict=True)
        if abs(float(one) - float(other)) > 1e-4 + 10.0 ** -len(one.partition(".")[2]) * 1.01
    ]


def assert_same(kept: Any, now: Any) -> None:
    for one, other in zip(code_cells(kept), code_cells(now), strict=True):
        assert [o.output_type for o in one.outputs] == [o.output_type for o in other.outputs]
        for before, after in zip(texts(one), texts(other), strict=True):
            assert differences(before, after) == [], one.source
        assert len(pictures(one)) == len(pictures(other)), one.source


def test_there_are_three() -> None:
    assert [path.stem for path in PATHS] == ["best_of_n", "judging_a_judge", "rewards_for_grpo"]


@each_notebook
class TestFile:
    def test_it_is_short_and_says_what_to_expect(self, path: Path) -> None:
        notebook = read(path)
        assert len(notebook.cells) < 15
        assert path.stat().st_size < 300_000
        assert "random" in notebook.cells[0].source and "TRIWARD_URL" in notebook.cells[0].source
        assert "random" in texts(code_cells(notebook)[0])[0]

    def test_its_outputs_are_of_one_run_without_errors(self, path: Path) -> None:
        cells = code_cells(read(path))
        assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
        outputs = [output for cell in cells for output in cell.outputs]
        assert [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"] == []
        assert sum(map(len, (texts(cell) for cell in cells))) >= 5

    def test_its_pictures_are_small(self, path: Path) -> None:
        shown = [picture for cell in code_cells(read(path)) for picture in pictures(cell)]
        assert all(picture.startswith(b"\x89PNG") for picture in shown)
        assert max(map(len, shown), default=0) < 60_000
        assert len(shown) == (3 if path.stem == "best_of_n" else 0)

    def test_it_says_nothing_of_the_machine(self, path: Path, runner: Any) -> None:
        text = path.read_text(encoding="utf-8")
        strange = [str(ROOT), "/home/", "/root/", "/tmp/", f'"{socket.gethostname()}', "iopub"]
        assert [trace for trace in strange if trace in text] == []
        notebook = read(path)
        before = nbformat.writes(notebook)
        assert nbformat.writes(runner.clean(notebook)) == before

    def test_its_links_lead_somewhere(self, path: Path) -> None:
        words = "".join(c.source for c in read(path).cells if c.cell_type == "markdown")
        links = re.findall(r"\]\(([^)#]+)\)", words)
        assert links
        assert [link for link in links if not (EXAMPLES / link).exists()] == []


@pytest.mark.parametrize(
    "path",
    [p if p.stem in QUICK else pytest.param(p, marks=pytest.mark.slow) for p in PATHS],
    ids=lambda path: path.stem,
)
def test_it_runs_and_prints_what_it_holds(
    path: Path, runner: Any, server: TritonServer, checkpoint: Path
) -> None:
    """On the session's server, whose checkpoint is the one that the notebooks make."""
    now = runner.execute(
        path, TRIWARD_URL=server.endpoints.grpc, TRIWARD_CHECKPOINT=str(checkpoint)
    )
    first = code_cells(now)[0].outputs[0]
    assert first.text == "The server that TRIWARD_URL names.\n"
    first.text = texts(code_cells(read(path))[0])[0]
    assert_same(read(path), now)


@pytest.mark.slow
def test_it_starts_a_server_of_its_own(
    runner: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TRIWARD_URL", raising=False)
    [path] = [path for path in PATHS if path.stem in QUICK]
    assert_same(read(path), runner.execute(path, TMPDIR=str(tmp_path)))
    assert left_by_the_server(tmp_path) == []


@pytest.mark.slow
def test_one_that_is_closed_before_its_last_cell_leaves_nothing(
    runner: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TRIWARD_URL", raising=False)
    begin = f"import sys\nsys.path.append({str(EXAMPLES)!r})\n"
    source = begin + "from local_server import start\nprint(start().checkpoint.is_dir())"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    nbformat.write(notebook, tmp_path / "closed.ipynb")
    (tmp_path / "temporary").mkdir()
    done = runner.execute(tmp_path / "closed.ipynb", TMPDIR=str(tmp_path / "temporary"))
    assert texts(done.cells[0]) == ["True\n"]
    assert left_by_the_server(tmp_path / "temporary") == []


def left_by_the_server(folder: Path) -> list[Path]:
    """What is still there of the folders that `local_server` makes."""
    return list(folder.glob("triward-*"))


def test_a_cell_that_raises_is_an_error(runner: Any, tmp_path: Path) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    nbformat.write(notebook, tmp_path / "wrong.ipynb")
    with pytest.raises(Exception, match="ZeroDivisionError"):
        runner.execute(tmp_path / "wrong.ipynb")


@pytest.mark.parametrize(
    ("kept", "now", "same"),
    [
        ("a 1.00000 b", "a 1.00009 b", True),
        ("a 1.00000 b", "a 1.00021 b", False),
        ("50.0 %", "50.1 %", True),
        ("50.0 %", "50.3 %", False),
        ("3 of 4", "2 of 4", False),
        ("1.5 right", "1.5 wrong", False),
        ("1.5", "1.5 1.5", False),
    ],
)
def test_how_outputs_are_compared(kept: str, now: str, same: bool) -> None:
    assert (differences(kept, now) == []) == same


def test_what_is_taken_out(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    new = nbformat.v4
    home = Path.home()
    shown = {"image/png": "iVBOR\n", "image/jpeg": "x", "text/plain": f"{ROOT}/examples/a.png"}
    cell = new.new_code_cell(
        "f()", metadata={"execution": {"iopub.execute_input": "2026-01-01T00:00:00Z"}},
        outputs=[
            new.new_output("stream", text=f"127.0.0.1:4321 at 2026-01-01 04:05:06 {home}/x"),
            new.new_output("display_data", shown),
        ],
    )  # fmt: skip
    cleaned = runner.clean(new.new_notebook(cells=[cell], metadata={"signature": "x"}))
    assert set(cleaned.metadata) == {"kernelspec", "language_info"}
    [cell] = cleaned.cells
    assert (cell.id, cell.metadata) == ("cell-1", {})
    assert texts(cell) == ["localhost:8001 at … ~/x", "examples/a.png"]
    assert [*cell.outputs[1].data] == ["image/png", "text/plain"]


class TestServer:
    """`examples/local_server.py`; that it starts one is seen above and in the demo's tests."""

    @pytest.fixture
    def start(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
        monkeypatch.syspath_prepend(EXAMPLES)
        return importlib.import_module("local_server").start  # type: ignore[no-any-return]

    def test_an_address_is_taken_as_it_is(
        self, start: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TRIWARD_URL", "rewards:8001")
        monkeypatch.delenv("TRIWARD_CHECKPOINT", raising=False)
        server = start()
        assert (server.url, server.http_url, server.checkpoint) == ("rewards:8001", None, None)
        server.stop()

    def test_a_checkpoint_that_cannot_be_made_says_why_and_leaves_nothing(
        self, start: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.delenv("TRIWARD_URL", raising=False)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        monkeypatch.setattr("local_server.ROOT", tmp_path / "gone")
        with pytest.raises(RuntimeError, match=r"make_checkpoint\.py ended with 2: .*gone"):
            start()
        assert list(tmp_path.iterdir()) == []
