"""Show the playground on a tiny model with random weights: `make playground`.

Makes, exports and serves the checkpoint of the demo on free ports of this machine, and shows the
page until Ctrl-C. Arguments are those of `triward playground`, as `--port 7860`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import demo

from triward.cli import main as triward
from triward_server.serving.launch import Endpoints, TritonServer


def main() -> int:
    """Serve the model and the page; Ctrl-C at any moment leaves nothing behind."""
    with tempfile.TemporaryDirectory(prefix="triward-demo-") as folder:
        checkpoint, repository = Path(folder, "checkpoint"), Path(folder, "repository")
        print("making a tiny checkpoint with random weights", flush=True)
        demo._run("make_checkpoint.py", "--size=tiny", "--seed=0", f"--output={checkpoint}")
        print("exporting it to a Triton model repository", flush=True)
        demo._run(
            "build_repository.py", f"--checkpoint={checkpoint}", f"--output={repository}",
            "--dtype=float32", "--device=cpu", "--preprocess-instances=1",
        )  # fmt: skip
        print("starting Triton Inference Server", flush=True)
        free = Endpoints("127.0.0.1", grpc_port=0, http_port=0, metrics_port=0)
        log = Path(folder, "triton.log")
        with log.open("w") as file, TritonServer(repository, free, log=file) as server:
            at = server.endpoints
            print(f"serving at {at.grpc}; try examples/chart.png; Ctrl-C ends it all", flush=True)
            return triward(
                [
                    "playground", "--url", at.grpc, "--http-url",
                    f"http://127.0.0.1:{at.http_port}", *sys.argv[1:],
                ]
            )  # fmt: skip


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
