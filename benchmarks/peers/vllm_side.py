"""vLLM's side. The peers' environment runs it as a script; it needs vLLM and nothing of this tree.

    python vllm_side.py offline CHECKPOINT DTYPE          # a list of texts a line: a list of scores
    python vllm_side.py served CHECKPOINT DTYPE PORT      # vLLM's own HTTP server

It ends when its standard input does, so it outlives no benchmark.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

TOKENS = 8192  # of one conversation


def offline(checkpoint: str, dtype: str) -> int:
    """Answer line by line with `vllm.LLM`."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM's log goes to standard output, too
    from vllm import LLM, PoolingParams

    engine = LLM(
        checkpoint,
        runner="pooling",
        convert="classify",
        dtype=dtype,
        enforce_eager=True,
        enable_prefix_caching=True,
        max_model_len=TOKENS,
    )
    print(json.dumps("ready"), file=answers)
    raw = PoolingParams(use_activation=False)  # the head's number, not its sigmoid
    for line in sys.stdin:
        outputs = engine.classify(json.loads(line), pooling_params=raw, use_tqdm=False)
        print(json.dumps([output.outputs.probs[0] for output in outputs]), file=answers)
    return 0


def over_http(checkpoint: str, dtype: str, port: str) -> int:
    """Run what `vllm serve` runs; that command itself does not work in the CPU distribution."""
    server = subprocess.Popen(
        [
            sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry",
            f"--model={checkpoint}", "--runner=pooling", "--convert=classify",
            f"--dtype={dtype}", "--enforce-eager", "--enable-prefix-caching",
            f"--max-model-len={TOKENS}", "--host=127.0.0.1",
            f"--port={port}", "--disable-uvicorn-access-log",
        ],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
    )  # fmt: skip

    def end() -> None:
        os.read(0, 1)
        server.terminate()

    threading.Thread(target=end, daemon=True).start()
    return server.wait()


if __name__ == "__main__":
    mode, *arguments = sys.argv[1:]
    sys.exit(over_http(*arguments) if mode == "served" else offline(*arguments))
