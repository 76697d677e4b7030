"""No file holds the server up, takes it down, or costs more than its limits say."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton

from tests import hostile
from tests.commands import Command, named
from tests.conftest import encode
from tests.conversations import picture
from tests.hostile import Hostile
from triward_server.config import PreprocessConfig
from triward_server.errors import InvalidRequest, TriwardError, Unavailable
from triward_server.intake import image_codec, workers
from triward_server.intake.decoding import Decoder, Reading
from triward_server.intake.image_codec import count_scans
from triward_server.intake.preprocess import Preprocessor

LIMIT = 1.0  # seconds of decoding
SAMPLE = 60
LOOK = b'[{"role":"user","content":[{"type":"image"}]}]'
GOOD = encode(picture(90, 60, 0))


@pytest.fixture(scope="module")
def preprocessor(checkpoint: Path) -> Preprocessor:
    ready = Preprocessor(checkpoint, PreprocessConfig(max_decode_seconds=LIMIT))
    ready.warm_up()
    return ready


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    decoder = Decoder(PreprocessConfig(max_decode_seconds=LIMIT))
    yield decoder
    if decoder._running:
        decoder.end()


def messages_of(case: Hostile) -> bytes:
    part: dict[str, Any] = {"type": "image", "max_pixels": 100_352}
    if case.kind != "image":
        part = {"type": "video", **({"frames": 2} if case.kind == "frames" else {})}
    count = len(case.make()) if case.kind == "image" else 1
    return json.dumps([{"role": "user", "content": [part] * count}]).encode()


def judged(preprocessor: Preprocessor, case: Hostile) -> str | None:
    """What is wrong with the answer to a hostile file."""
    try:
        features = preprocessor.features(messages_of(case), [b"a"], list(case.make()))
    except InvalidRequest as error:
        assert error.field.startswith(("media[", "messages"))
    except Unavailable as error:
        return f"blamed on the machine: {error}"
    else:
        [pixels] = features.media
        if pixels.dtype != np.uint8 or pixels.shape[-1] != 3 or pixels.shape[-2] % 28:
            return f"pixels of {pixels.dtype} {pixels.shape}"
    return None


def no_worse_than_its_limits(
    preprocessor: Preprocessor, cases: list[Hostile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time is that which decoding is given to count, not what a busy machine adds around it."""
    decoder = preprocessor._decoder
    reading, left = decoder.reading, [LIMIT]

    @contextmanager
    def watched() -> Iterator[Reading]:
        with reading() as each:
            try:
                yield each
            finally:
                left.append(each._left)

    monkeypatch.setattr(decoder, "reading", watched)
    wrong = {}
    for case in cases:
        problem = judged(preprocessor, case)
        if problem:
            wrong[case.name] = problem
        if left[-1] < -1:
            wrong[case.name] = f"{LIMIT - left[-1]:.1f} s"
        peak = Path(f"/proc/{decoder.worker.pid}/status").read_text().split("VmHWM:")[1].split()[0]
        assert int(peak) * 1024 < decoder._max_bytes + 2**28, case.name
    assert wrong == {}
    good = preprocessor.features(LOOK, [b"a"], [GOOD])
    assert good.media[0].shape == (56, 84, 3)


def test_a_sample_of_hostile_files(
    preprocessor: Preprocessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = hostile.corpus()
    assert len(every) >= 300
    assert {case.kind for case in every} == {"image", "video", "frames"}
    assert len({case.name for case in every}) == len(every)
    no_worse_than_its_limits(preprocessor, every[:: len(every) // SAMPLE], monkeypatch)


@pytest.mark.soak
def test_every_hostile_file(preprocessor: Preprocessor, monkeypatch: pytest.MonkeyPatch) -> None:
    no_worse_than_its_limits(preprocessor, hostile.corpus(), monkeypatch)


class TestScans:
    def test_too_many_are_refused_before_decoding(self, preprocessor: Preprocessor) -> None:
        killed = preprocessor._decoder.killed
        file = hostile.jpeg_of_scans(682)
        assert len(file) < 300_000 and count_scans(file) == 682
        with pytest.raises(InvalidRequest, match=r"^media\[0\]: a JPEG of 682 scans, the limit is"):
            preprocessor.features(LOOK, [b"a"], [file])
        assert preprocessor._decoder.killed == killed

    def test_the_limit(self) -> None:
        assert [count_scans(hostile.jpeg_of_scans(n, 64)) for n in (9, 100, 101)] == [9, 100, 101]
        image_codec.open_image(hostile.jpeg_of_scans(100, 64))

    def test_what_only_looks_like_scans(self) -> None:
        """In a thumbnail, a profile, or behind the picture's end, as phones append films."""
        file = encode(picture(90, 60, 0), "JPEG")
        fakes = b"\xff\xda" * 500
        segment = b"\xff\xe2" + (len(fakes) + 2).to_bytes(2, "big") + fakes
        assert count_scans(file) == count_scans(file[:2] + segment + file[2:]) == 1
        assert count_scans(file + fakes) == 1
        assert count_scans(b"no jpeg" + fakes) == 0


class TestDeadline:
    def test_a_slow_file_ends_its_worker_alone(self, preprocessor: Preprocessor) -> None:
        """100 scans are allowed and take longer; the next request finds another worker."""
        decoder = preprocessor._decoder
        killed, before = decoder.killed, decoder.worker.pid
        slow = Hostile("slow", "image", lambda: (GOOD, *[hostile.jpeg_of_scans(100)] * 3))
        with pytest.raises(InvalidRequest, match=r"^media\[[1-3]\]: .* longer than 1 s to decode$"):
            preprocessor.features(messages_of(slow), [b"a"], list(slow.make()))
        assert decoder.killed == killed + 1
        assert not psutil.pid_exists(before)
        assert preprocessor.features(LOOK, [b"a"], [GOOD]).media[0].shape == (56, 84, 3)
        assert decoder.worker.pid != before

    def test_waiting_is_progress(self) -> None:
        """Else the watchdog would take a slow file for a hung process."""
        ticks: list[float] = []
        config = PreprocessConfig(max_decode_seconds=3)
        decoder = Decoder(config, lambda: ticks.append(time.monotonic()))
        with (
            pytest.raises(InvalidRequest, match=r"^media\[0\]: .*longer than 3 s"),
            decoder.reading() as reading,
        ):
            os.kill(decoder.worker.pid, signal.SIGSTOP)  # a codec that never ends
            reading.open("media[0]", "image", GOOD)
        assert decoder.killed == 1
        assert len(ticks) >= 2

    def test_the_text_is_checked_before_anything_is_decoded(
        self, preprocessor: Preprocessor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("triward_server.intake.decoding.Reading.image", None)
        text = json.dumps({"type": "text", "text": "word " * 20_000}).encode()
        with pytest.raises(InvalidRequest, match=r"^messages: .* tokens"):
            preprocessor.features(LOOK.replace(b"]}]", b"," + text + b"]}]"), [b"a"], [GOOD])


class TestWorker:
    def test_a_crash_is_its_files_fault(self, decoder: Decoder) -> None:
        with (
            pytest.raises(InvalidRequest, match=r"^media\[7\]: .*crashes its decoder \(SIGSEGV\)"),
            decoder.reading() as reading,
        ):
            os.kill(decoder.worker.pid, signal.SIGSEGV)
            reading.open("media[7]", "image", GOOD)

    def test_a_kill_is_the_machines(self, decoder: Decoder) -> None:
        """As the kernel does it when memory runs out."""
        with (
            pytest.raises(Unavailable, match=r"^media\[7\]: .*lacks memory"),
            decoder.reading() as reading,
        ):
            os.kill(decoder.worker.pid, signal.SIGKILL)
            reading.open("media[7]", "image", GOOD)

    def test_one_that_died_idle_is_replaced(self, decoder: Decoder) -> None:
        first = decoder.worker.pid
        os.kill(first, signal.SIGKILL)
        while psutil.Process(first).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        with decoder.reading() as reading:
            assert reading.open("media[0]", "image", GOOD).size == (60, 90)
        assert decoder.worker.pid != first

    def test_its_zygote_may_die(self, decoder: Decoder) -> None:
        first = psutil.Process(decoder.worker.pid)
        psutil.Process(first.ppid()).kill()
        first.wait(60)
        with decoder.reading() as reading:
            assert reading.open("media[0]", "image", GOOD).size == (60, 90)

    def test_its_memory_is_bounded(self) -> None:
        """A picture within the limit of pixels, and codecs that want more than the limit says."""
        config = PreprocessConfig(max_image_pixels=10**6, max_request_bytes=10**6)
        decoder = Decoder(config)
        with decoder.reading() as reading:
            reading.open("media[0]", "image", GOOD)  # by now it has bound itself
        soft, hard = resource.prlimit(decoder.worker.pid, resource.RLIMIT_DATA)
        assert decoder._max_bytes < soft == hard < decoder._max_bytes + 2**29
        assert resource.prlimit(decoder.worker.pid, resource.RLIMIT_CORE) == (0, 0)
        with (
            pytest.raises(InvalidRequest, match=r"media\[0\]: .*(memory|MemoryError)"),
            decoder.reading() as reading,
        ):
            file = hostile.IMAGES["png of 16 bits"]()  # 500 MB
            reading.image("media[0]", reading.open("media[0]", "image", file), None)
        decoder.end()

    def test_what_it_opened_is_dropped_with_the_request(self, decoder: Decoder) -> None:
        with decoder.reading() as reading:
            header = reading.open("media[0]", "image", GOOD)
        with pytest.raises(TriwardError, match="ended by itself"), decoder.reading() as reading:
            reading.unread = 1
            reading.image("media[0]", header, None)

    def test_it_is_one_thread_of_few_modules(self, decoder: Decoder) -> None:
        with decoder.reading() as reading:
            reading.open("media[0]", "image", GOOD)  # by now it has got its name
        worker = psutil.Process(decoder.worker.pid)
        assert worker.num_threads() == worker.parent().num_threads() == 1
        assert worker.name() == "triward-worker" and worker.parent().name() == "triward-zygote"
        assert os.getpgid(worker.pid) == os.getpgid(0), "who ends the group ends it"

    def test_nothing_is_left(self) -> None:
        decoder = Decoder(PreprocessConfig())
        worker = psutil.Process(decoder.worker.pid)
        family = [worker, worker.parent()]
        workers.close_all()
        assert psutil.wait_procs(family, timeout=60)[1] == []


class TestServed:
    """The hostile files against a whole server that is watched."""

    @pytest.fixture
    def limited(self, build: Callable[..., Path]) -> Path:
        return build("--dtype=float32", "--max-decode-seconds=4", "--preprocess-instances=1")

    def test_a_slow_file_ends_no_server(self, serve: Callable[..., Command], limited: Path) -> None:
        """The hang timeout is shorter than the file may take, and neighbours are scored."""
        running = serve("--hang-timeout=2", repository=limited)
        url = running.wait_for(r"ready\s+grpc\s+(127.0.0.1:\d+)")[1]
        slow = Hostile("slow", "image", lambda: (hostile.jpeg_of_scans(100),) * 12)
        some = [case for case in hostile.corpus() if case.kind != "frames"][::40]
        with triton.InferenceServerClient(url) as client, ThreadPoolExecutor(16) as pool:
            good = Hostile("good", "image", lambda: (GOOD,))
            expected = ask(client, good)
            assert isinstance(expected, float)
            cases = [slow, good, good, *some, good, slow, good]
            answers = list(pool.map(lambda case: ask(client, case), cases))
            for case, answer in zip(cases, answers, strict=True):
                if case is good:
                    assert answer == pytest.approx(expected, rel=1e-5)
                elif case is slow:
                    assert "INVALID_ARGUMENT" in answer and "longer than 4 s" in answer
                else:
                    assert isinstance(answer, float) or "INVALID_ARGUMENT" in answer, case.name
            assert ask(client, good) == pytest.approx(expected, rel=1e-5)
        assert running.process.poll() is None
        family = running.family()
        assert named(family, "triward-zygote") and named(family, "triward-worker")
        running.process.send_signal(signal.SIGTERM)
        assert running.wait() == 0
        assert psutil.wait_procs(family, timeout=60)[1] == []


def ask(client: Any, case: Hostile) -> Any:
    """The score, or how it failed."""
    inputs = []
    for name, values in (
        ("messages", [messages_of(case)]), ("responses", [b"a"]), ("media", list(case.make())),
    ):  # fmt: skip
        array = np.empty((1, len(values)), dtype=np.object_)
        array[0, :] = values
        tensor = triton.InferInput(name, array.shape, "BYTES")
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    try:
        return float(client.infer("reward", inputs, client_timeout=120).as_numpy("scores")[0, 0])
    except triton.InferenceServerException as error:
        return f"{error.status()}: {error.message()}"
