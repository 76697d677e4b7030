"""Score the model card's conversation with a real Triton and with the card's own code: `make demo`.

Makes a tiny checkpoint with random weights, exports it, serves it on free ports, scores two
answers over gRPC, scores them again with the model card's code in this process, and shuts down.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# No model hub is needed.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ["NO_PROXY"] = "127.0.0.1"  # a proxy would not reach this machine itself

from rich.console import Console
from rich.table import Table

from triward import RewardClient
from triward_server.serving.launch import Endpoints, TritonServer

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "examples" / "chart.png"
QUESTION = (
    "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, "
    "at the end.\nQuestion: Is Purple the highest value?\nChoices:\n(A) no\n(B) yes"
)
ANSWERS = ("The answer is: B", "The answer is: A")
REAL = "Skywork/Skywork-VL-Reward-7B"

PROMPT: list[dict[str, Any]] = [
    {
        "role": "user",
        "content": [{"type": "image", "image": str(CHART)}, {"type": "text", "text": QUESTION}],
    }
]


def main() -> None:
    """Run the demo; Ctrl-C at any moment leaves nothing behind."""
    console = Console()
    with tempfile.TemporaryDirectory(prefix="triward-demo-") as folder:
        checkpoint, repository = Path(folder, "checkpoint"), Path(folder, "repository")
        console.print("[dim]1/4[/] making a tiny checkpoint with random weights")
        _run("make_checkpoint.py", "--size=tiny", "--seed=0", f"--output={checkpoint}")
        console.print("[dim]2/4[/] exporting it to a Triton model repository")
        _run(
            "build_repository.py", f"--checkpoint={checkpoint}", f"--output={repository}",
            "--dtype=float32", "--device=cpu", "--preprocess-instances=1",
        )  # fmt: skip
        console.print("[dim]3/4[/] starting Triton Inference Server")
        free = Endpoints("127.0.0.1", grpc_port=0, http_port=0, metrics_port=0)
        with (
            Path(folder, "triton.log").open("w") as log,
            TritonServer(repository, free, log=log) as server,
            RewardClient(server.endpoints.grpc) as client,
        ):
            console.print(f"[dim]4/4[/] scoring over gRPC at {server.endpoints.grpc}\n")
            served = client.score_responses(PROMPT, ANSWERS)
            reference = _reference(checkpoint)
    _show(console, served, reference)


def _run(script: str, *arguments: str) -> None:
    command = [sys.executable, str(ROOT / "export" / script), *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _reference(checkpoint: Path) -> list[float]:
    from triward_server.testing.oracle import Oracle

    oracle = Oracle(checkpoint)
    return [oracle.score([*PROMPT, {"role": "assistant", "content": a}]) for a in ANSWERS]


def _show(console: Console, served: list[float], reference: list[float]) -> None:
    table = Table(title=f"{CHART.name}: Is Purple the highest value?")
    for column in ("answer", "served by Triton", "model card's code", "difference"):
        table.add_column(column, justify="left" if column == "answer" else "right")
    for answer, ours, card in zip(ANSWERS, served, reference, strict=True):
        table.add_row(answer, f"{ours:.5f}", f"{card:.5f}", f"{abs(ours - card):.1e}")
    console.print(table)
    console.print(
        "\nThe weights are random, so the scores mean nothing; the point is that the columns agree."
        "\nThe real model, on a machine with a GPU:\n"
    )
    console.print(
        f"  triward-server export --checkpoint {REAL} --output skywork\n"
        "  triward-server serve --repository skywork\n",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
