"""A model hub on this machine, for `export` to download from: one model, from a folder's files."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def fake_hub(model: str, folder: Path) -> Iterator[str]:
    """Yield the address of a hub that has the model, for HF_ENDPOINT."""
    handler = type("Handler", (_Handler,), {"model": model, "folder": folder})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    """What huggingface_hub asks: the commit of a revision, its files, and each of them."""

    model: str
    folder: Path

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        path = self.path.partition("?")[0]
        api, files = f"/api/models/{self.model}/", f"/{self.model}/resolve/{COMMIT}/"
        if path.startswith(f"{api}revision/"):
            self._answer(json.dumps({"id": self.model, "sha": COMMIT, "siblings": []}).encode())
        elif path.startswith(f"{api}tree/"):
            self._answer(json.dumps([*map(self._entry, sorted(self.folder.iterdir()))]).encode())
        elif path.startswith(files):
            self._answer((self.folder / path.removeprefix(files)).read_bytes(), body)
        else:
            self.send_error(404)

    @staticmethod
    def _entry(file: Path) -> dict[str, object]:
        oid = hashlib.sha1(file.read_bytes()).hexdigest()
        return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": oid}

    def _answer(self, content: bytes, body: bool = True) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass
