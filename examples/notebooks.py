"""Execute the notebooks beside this file and keep their outputs: `make notebooks`.

What an output says of the machine or of the hour is taken out, so that two runs leave equal files.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
_TIMEOUT = 600  # seconds that a cell may take
_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
_TIME = r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?"


def execute(path: Path, **environment: str) -> Any:
    """Run a notebook from its top in a kernel of its own.

    Args:
        path: of the notebook; its folder is the kernel's.
        environment: further variables of the kernel.

    Returns:
        The notebook with its outputs, cleaned.

    Raises:
        CellExecutionError: a cell raised; the message has its source and the traceback.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=_TIMEOUT, kernel_name="python3", record_timing=False,
        coalesce_streams=True, resources={"metadata": {"path": str(path.parent)}},
    )  # fmt: skip
    kernel = client.create_kernel_manager()
    with tempfile.TemporaryDirectory() as profile:  # IPython would write one at home
        # No port that others on this machine could listen to.
        kernel.transport, kernel.ip = "ipc", f"{profile}/kernel"
        client.execute(env={**os.environ, "IPYTHONDIR": profile, **environment})
    return clean(notebook)


def clean(notebook: Any) -> Any:
    """Take out what differs from run to run and from machine to machine; return the notebook."""
    notebook.metadata = nbformat.from_dict(_METADATA)
    for number, cell in enumerate(notebook.cells, start=1):
        cell.id, cell.metadata = f"cell-{number}", nbformat.NotebookNode()
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                output.pop("metadata", None)
                output.text = without_traces(output.text)
            elif "data" in output:
                output.metadata = nbformat.NotebookNode()
                _clean_data(output.data)
    return notebook


def _clean_data(data: dict[str, Any]) -> None:
    """Keep one picture where there are several of the same, and clean the texts."""
    if "image/png" in data:
        data.pop("image/jpeg", None)
        data["image/png"] = data["image/png"].strip()
    for kind in data:
        if kind.startswith("text/"):
            data[kind] = without_traces(data[kind])


def without_traces(text: str) -> str:
    """Return a text without paths, ports and the name of this machine, and without times."""
    root, home, host = FOLDER.parent, Path.home(), socket.gethostname()
    text = text.replace(f"{root}/", "")
    if home != Path(home.anchor):
        text = re.sub(rf"{re.escape(str(home))}\b", "~", text)
    text = re.sub(rf"{re.escape(tempfile.gettempdir())}(/[^\s'\",:)]*)?", "…", text)
    if re.search(r"[\d.-]", host):  # another one may be a word
        text = re.sub(rf"\b{re.escape(host)}\b", "localhost", text)
    text = re.sub(r"\b127\.0\.0\.1:(?!1\b)\d+", "localhost:8001", text)
    return re.sub(_TIME, "…", text)


if __name__ == "__main__":
    for notebook_path in NOTEBOOKS:
        print(notebook_path.name, file=sys.stderr)
        done = execute(notebook_path)
        nbformat.write(done, notebook_path)
