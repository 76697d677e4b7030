"""Show the playground on a tiny model with random weights: `make playground`.

Makes, exports and serves the checkpoint of the demo on free ports of this machine, and shows the
page until Ctrl-C. Arguments are those of `triward playground`, as `--port 7860`.
"""

from __future__ import annotations

import sys

from local_server import local_server

from triward.cli import main as triward


def main() -> int:
    """Serve the model and the page; Ctrl-C at any moment leaves nothing behind."""
    with local_server(lambda step: print(step, flush=True)) as server:
        print(f"serving at {server.url}; try examples/chart.png; Ctrl-C ends it all", flush=True)
        at = ["--url", server.url, "--http-url", str(server.http_url)]
        return triward(["playground", *at, *sys.argv[1:]])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
