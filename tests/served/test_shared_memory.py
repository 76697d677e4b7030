"""Media through shared memory, with the real server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from tests.conftest import encode
from triward import InvalidRequest, RewardClient, ServerUnavailable
from triward.sharedmemory import FOLDER, PREFIX
from triward_server.serving.launch import TritonServer

MB = 2**20


def conversation(seed: int, side: int = 200) -> list[dict[str, Any]]:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    image = {"type": "image", "image": Image.fromarray(pixels)}
    question = {"type": "text", "text": f"question {seed}"}
    return [
        {"role": "user", "content": [image, question]},
        {"role": "assistant", "content": "An answer."},
    ]


@pytest.fixture
def headers(server: TritonServer) -> dict[str, str]:
    return {"triton-grpc-protocol-admin-key": server.admin_key}


@pytest.fixture
def sharing(server: TritonServer, headers: dict[str, str]) -> Iterator[RewardClient]:
    with RewardClient(
        server.endpoints.grpc, timeout=120, headers=headers, shared_memory_bytes=4 * MB
    ) as client:
        yield client


@pytest.fixture
def admin(server: TritonServer) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(server.endpoints.grpc) as client:
        yield client


def registered(admin: InferenceServerClient, headers: dict[str, str]) -> set[str]:
    """Files of the regions that the server knows, under whatever name."""
    known = admin.get_system_shared_memory_status(headers=headers).regions
    return {region.key.lstrip("/") for region in known.values()}


def regions() -> set[str]:
    return {path.name for path in FOLDER.glob(PREFIX + "*")}


def test_scores_are_the_same(
    sharing: RewardClient,
    client: RewardClient,
    admin: InferenceServerClient,
    headers: dict[str, str],
) -> None:
    """Also when more is in flight than the region holds, which then goes over gRPC."""
    conversations = [conversation(seed, 200 + 10 * (seed % 40)) for seed in range(48)]
    expected = client.score_many(conversations)
    assert sharing.score_many(conversations) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert registered(admin, headers) == regions() != set()
    assert sharing.score([{"role": "assistant", "content": "text alone"}]) == pytest.approx(
        client.score([{"role": "assistant", "content": "text alone"}]), rel=1e-5
    )
    sharing.close()
    assert registered(admin, headers) == regions() == set()


def test_media_do_go_through_the_region(sharing: RewardClient) -> None:
    """What lies there is what is scored."""
    red = encode(Image.new("RGB", (64, 64), "red"), "BMP")
    message = [{"role": "user", "content": [{"type": "image", "image": red}]}]
    sharing.score_responses(message, ["r"])
    [name] = regions()
    assert (FOLDER / name).read_bytes()[4 : 4 + len(red)] == red


def test_a_bad_image_is_the_callers_error(sharing: RewardClient, client: RewardClient) -> None:
    message = [{"role": "user", "content": [{"type": "image", "image": b"no image"}]}]
    texts = []
    for asked in (sharing, client):
        with pytest.raises(InvalidRequest) as caught:
            asked.score_responses(message, ["r"])
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


def test_a_server_that_has_forgotten_the_region(
    sharing: RewardClient, admin: InferenceServerClient, headers: dict[str, str]
) -> None:
    """As one does that was started again; many callers find out at once."""
    conversations = [conversation(seed) for seed in range(16)]
    first = sharing.score_many(conversations)
    for _ in range(3):
        admin.unregister_system_shared_memory(headers=headers)
        assert sharing.score_many(conversations) == pytest.approx(first, rel=1e-5, abs=1e-5)
    assert registered(admin, headers) == regions()


def test_nobody_without_the_key_reads_or_writes_a_region(
    server: TritonServer, sharing: RewardClient
) -> None:
    """Triton asks for no key when a request names a region, so its name must not be found out.

    Who is on the machine can list /dev/shm, whatever the files' modes are.
    """
    red = encode(Image.new("RGB", (64, 64), "red"), "BMP")
    message = [{"role": "user", "content": [{"type": "image", "image": red}]}]
    sharing.score_responses(message, ["r"])
    [name] = regions()
    before = (FOLDER / name).read_bytes()
    listed = [path.name for path in FOLDER.iterdir()]
    assert name in listed
    with InferenceServerClient(server.endpoints.grpc) as stranger:
        for guess in (guess for file in listed for guess in (file, f"/{file}")):
            region = {"region": guess, "size": 4 + len(red)}
            for where in ("media", "scores"):
                with pytest.raises(InferenceServerException, match="Unable to find shared memory"):
                    infer(stranger, **{where: region})
        assert infer(stranger) is not None, "with tensors of its own it may ask"
    assert (FOLDER / name).read_bytes() == before


def infer(
    client: InferenceServerClient,
    media: dict[str, Any] | None = None,
    scores: dict[str, Any] | None = None,
) -> Any:
    """A raw request, with its media from, or its scores to, a region."""
    content = [{"type": "image"}] if media else "?"
    inputs = []
    for name, text in (
        ("messages", json.dumps([{"role": "user", "content": content}])),
        ("responses", "yes"),
    ):
        tensor = InferInput(name, [1, 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[text.encode()]], dtype=np.object_))
        inputs.append(tensor)
    tensor = InferInput("media", [1, int(media is not None)], "BYTES")
    if media:
        tensor.set_shared_memory(media["region"], media["size"])
    else:
        tensor.set_data_from_numpy(np.empty((1, 0), dtype=np.object_))
    output = InferRequestedOutput("scores")
    if scores:
        output.set_shared_memory(scores["region"], 64)
    done = client.infer("reward", [*inputs, tensor], outputs=[output], client_timeout=120)
    return done.as_numpy("scores")


def test_the_files_are_their_owners(sharing: RewardClient) -> None:
    sharing.score(conversation(1))
    [name] = regions()
    assert (FOLDER / name).stat().st_mode & 0o777 == 0o600


def test_without_the_key(server: TritonServer) -> None:
    with (
        RewardClient(server.endpoints.grpc, shared_memory_bytes=MB, max_attempts=1) as client,
        pytest.raises(ServerUnavailable, match="admin-key"),
    ):
        client.score(conversation(1))
    assert regions() == set()


def test_what_a_killed_client_leaves(
    server: TritonServer,
    sharing: RewardClient,
    admin: InferenceServerClient,
    headers: dict[str, str],
    tmp_path: Path,
) -> None:
    """Its region goes from /dev/shm and from the server when the next client comes."""
    image = tmp_path / "image.png"
    Image.new("RGB", (50, 50)).save(image)
    code = f"""
import os, signal
from triward import RewardClient
client = RewardClient({server.endpoints.grpc!r}, headers={headers!r}, shared_memory_bytes={MB})
part = {{"type": "image", "image": {str(image)!r}}}
client.score_responses([{{"role": "user", "content": [part]}}], ["r"])
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False, timeout=120)
    left = regions()
    assert len(left) == 1 and registered(admin, headers) == left
    sharing.score(conversation(1))
    now = regions()
    assert len(now) == 1 and not now & left
    assert registered(admin, headers) == now
