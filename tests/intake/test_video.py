"""Videos score as the model card's code scores them, are shared, and are refused by name."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
from transformers import AutoProcessor

from tests.conftest import encode
from tests.conversations import Messages, picture, says, user
from tests.features import scores_of
from tests.videos import conversations, film, frames, video
from triward import RewardClient
from triward_server.config import ForwardConfig, PreprocessConfig
from triward_server.engine import packing, positions, vision
from triward_server.engine.passes import Pass
from triward_server.engine.scoring import Scorer
from triward_server.errors import InvalidRequest
from triward_server.intake import video as video_files
from triward_server.intake.conversation import VideoPart
from triward_server.intake.decoding import Decoder, Reading
from triward_server.intake.media import ImageLoader
from triward_server.intake.preprocess import Preprocessor
from triward_server.intake.video import VideoLoader
from triward_server.intake.video_codec import VideoFile, open_video
from triward_server.schema import Features
from triward_server.serving.launch import TritonServer
from triward_server.testing.oracle import Oracle, fp32_budget, read_video

ASK = json.dumps([{"role": "user", "content": [{"type": "video"}]}]).encode()


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Messages]:
    return conversations(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def references(oracle: Oracle, films: dict[str, Messages]) -> dict[str, float]:
    return {name: oracle.score(messages) for name, messages in films.items()}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return film(tmp_path_factory.mktemp("clip") / "clip.mp4", 20)


@pytest.fixture(scope="module")
def loader_of(checkpoint: Path) -> Callable[..., VideoLoader]:
    processor = AutoProcessor.from_pretrained(checkpoint)

    def make(max_pixels: int = 64_000_000) -> VideoLoader:
        images = ImageLoader(processor.image_processor, max_pixels)
        return VideoLoader(processor.video_processor, images, 768)

    return make


@pytest.fixture(scope="module")
def reading() -> Iterator[Reading]:
    with Decoder(PreprocessConfig(max_decode_seconds=600)).reading() as reading:
        yield reading


@pytest.fixture
def scorer(checkpoint: Path) -> Scorer:
    return Scorer(checkpoint, ForwardConfig(dtype="float32", device="cpu", prefix_cache_bytes=0))


class TestParity:
    def test_every_conversation(
        self, client: RewardClient, films: dict[str, Messages], references: dict[str, float]
    ) -> None:
        assert len(films) > 30
        wrong = {}
        for name, messages in films.items():
            score, expected = client.score(messages), references[name]
            if abs(score - expected) > fp32_budget(expected):
                wrong[name] = (score, expected)
        assert wrong == {}
        assert np.std(list(references.values())) > 1, "scores that do not differ prove nothing"

    def test_in_company(
        self, client: RewardClient, films: dict[str, Messages], references: dict[str, float]
    ) -> None:
        scores = client.score_many(films.values(), concurrency=16)
        for score, expected in zip(scores, references.values(), strict=True):
            assert abs(score - expected) <= fp32_budget(expected)

    def test_several_responses(
        self, client: RewardClient, oracle: Oracle, films: dict[str, Messages]
    ) -> None:
        prompt = films["mixed/all"][:-1]
        responses = ["It moves.", "Nothing moves at all.", ""]
        for response, score in zip(
            responses, client.score_responses(prompt, responses), strict=True
        ):
            expected = oracle.score([*prompt, says(response)])
            assert abs(score - expected) <= fp32_budget(expected)

    def test_frames_of_any_kind(self, client: RewardClient, oracle: Oracle) -> None:
        shown = frames(3)
        expected = oracle.score([user(video(shown), "What?"), says("It moves.")])
        mixed = [shown[0], encode(shown[1]), encode(shown[2], "BMP")]
        score = client.score([user(video(mixed), "What?"), says("It moves.")])
        assert abs(score - expected) <= fp32_budget(expected)

    def test_control_frames_reversed(
        self, client: RewardClient, films: dict[str, Messages], references: dict[str, float]
    ) -> None:
        [question, answer] = films["frames/even"]
        listed = question["content"][0]
        turned = {**listed, "video": listed["video"][::-1]}
        score = client.score([{**question, "content": [turned, question["content"][1]]}, answer])
        expected = references["frames/even"]
        assert abs(score - expected) > 10 * fp32_budget(expected)


def features(scorer: Scorer, seconds: float = 1.0, **changes: Any) -> Features:
    """A prompt with a video of 4 pairs of frames, 2 x 3 tokens each, between words."""
    rng = np.random.default_rng(5)
    pad = np.full(24, scorer.geometry.video_token_id, np.int32)
    text = rng.integers(0, 700, 40).astype(np.int32)
    pixels = rng.integers(0, 256, (8, 56, 84, 3), dtype=np.uint8)
    given = Features(
        np.concatenate([text[:10], pad, text[10:20]]), (text[20:],), (pixels,), (seconds,)
    )
    return replace(given, **changes)


class TestPositions:
    """Frames advance the temporal axis by their seconds."""

    # Below and above one position a grid, whole and broken, and far beyond what follows.
    SECONDS = (0.0, 1 / 12, 0.4, 0.75, 1.0, 3.3, 40.0)

    def test_parity(self, scorer: Scorer, oracle: Oracle) -> None:
        batch = [features(scorer, seconds) for seconds in self.SECONDS]
        for item, result in zip(batch, scorer.score(batch), strict=True):
            [expected] = oracle.score_features(item)
            assert abs(scores_of(result)[0] - expected) <= fp32_budget(expected)

    def test_positions_are_the_references(self, scorer: Scorer, oracle: Oracle) -> None:
        item = features(scorer, 0.7)
        ids = torch.from_numpy(item.prompt_ids.astype(np.int64))[None]
        grid = scorer.geometry.grid(item.media[0])
        expected, _ = oracle.model.pretrained_model.model.get_rope_index(
            ids,
            mm_token_type_ids=2 * (ids == scorer.geometry.video_token_id).int(),
            video_grid_thw=torch.tensor([grid]),
            second_per_grid_ts=torch.tensor([0.7]),
        )
        ours, following = positions.mrope_positions(item.prompt_ids, [grid], [0.7], scorer.geometry)
        np.testing.assert_array_equal(ours, expected[:, 0].numpy())
        assert following == ours[0, -1] + 1

    def test_control_wrong_seconds(self, scorer: Scorer, oracle: Oracle) -> None:
        [expected] = oracle.score_features(features(scorer, 1.0))
        [result] = scorer.score([features(scorer, 2.0)])
        assert abs(scores_of(result)[0] - expected) > 10 * fp32_budget(expected)


class TestSharing:
    def test_a_video_is_encoded_once(self, scorer: Scorer) -> None:
        seen: list[Pass] = []
        scorer.score([features(scorer), features(scorer)], observe=seen.append)
        scorer.score([features(scorer)], observe=seen.append)
        assert [(p.images, p.images_cached) for p in seen] == [(1, 0), (1, 1)]
        assert seen[0].tokens == seen[1].tokens, "the whole prompt was shared"

    def test_another_speed_shares_the_embedding_but_no_node(
        self, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pair = [features(scorer, 1.0), features(scorer, 2.0)]
        alone = [scores_of(scorer.score([item])[0])[0] for item in pair]
        assert abs(alone[0] - alone[1]) > 1e-3
        scorer._model.embeddings.clear()
        seen: list[Pass] = []
        together = [scores_of(r)[0] for r in scorer.score(pair, observe=seen.append)]
        assert together == pytest.approx(alone, rel=1e-5, abs=1e-5)
        assert [(p.images, p.images_cached) for p in seen] == [(1, 0)]
        # The words before the video are shared, nothing behind its first token is.
        assert sum(len(item.prompt_ids) + 20 for item in pair) - seen[0].tokens == 10

        # The control: told apart by pixels alone, one would get the other's positions.
        def same(item: Features) -> list[float]:
            return [1.0]

        monkeypatch.setattr(packing, "_seconds", same)
        mixed = [scores_of(r)[0] for r in scorer.score(pair)]
        assert mixed != pytest.approx(alone, rel=1e-4, abs=1e-4)

    def test_an_image_is_no_video_of_equal_pixels(self, scorer: Scorer, oracle: Oracle) -> None:
        still = np.random.default_rng(1).integers(0, 256, (56, 84, 3), dtype=np.uint8)
        tail = (np.arange(9, dtype=np.int32),)
        geometry = scorer.geometry
        image = Features(np.full(6, geometry.image_token_id, np.int32), tail, (still,))
        twice = np.stack([still, still])
        film_ = Features(np.full(6, geometry.video_token_id, np.int32), tail, (twice,), (1.0,))
        digests = [i.digest for i in packing.sort_batch({0: image, 1: film_}, geometry).media]
        assert len(set(digests)) == 2
        for item, result in zip((image, film_), scorer.score([image, film_]), strict=True):
            [expected] = oracle.score_features(item)
            assert abs(scores_of(result)[0] - expected) <= fp32_budget(expected)

    def test_over_grpc(
        self, client: RewardClient, films: dict[str, Messages], metric: Callable[[str, str], float]
    ) -> None:
        messages = films["several/twice-the-same"]
        client.score(messages)
        encoded = metric("triward_images_encoded_total", "reward_forward")
        client.score(messages)
        assert metric("triward_images_encoded_total", "reward_forward") == encoded

    def test_deterministic_scores_are_bitwise(self, checkpoint: Path) -> None:
        config = ForwardConfig(dtype="float32", device="cpu", deterministic=True)
        scorer = Scorer(checkpoint, config)
        batch = [features(scorer, s) for s in (1.0, 2.0, 1.0)]
        together = [scores_of(r)[0] for r in scorer.score(batch)]
        assert together == [scores_of(scorer.score([item])[0])[0] for item in batch]


class TestProcessorsResize:
    """Below the processor's own limits frames are resized again, in float32."""

    def test_rounding_it_would_be_seen(
        self, oracle: Oracle, scorer: Scorer, preprocessor: Preprocessor, clip: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        limits = {"min_pixels": 784, "max_pixels": 1600}
        expected = oracle.score([user(video(clip, **limits), "What?"), says("It moves.")])
        messages = [user({"type": "video", **limits}, "What?")]
        item = preprocessor.features(
            json.dumps(messages).encode(), [b"It moves."], [Path(clip).read_bytes()]
        )
        assert item.media[0].shape[1:3] == (28, 28), "a frame has fewer pixels than 56 x 56"
        [result] = scorer.score([item])
        assert abs(scores_of(result)[0] - expected) <= fp32_budget(expected)
        scorer._model.embeddings.clear()
        sized = vision._sized
        monkeypatch.setattr(vision, "_sized", lambda *a: sized(*a).round().clamp(0, 255))
        [rounded] = scorer.score([item])
        assert abs(scores_of(rounded)[0] - expected) > 10 * fp32_budget(expected)


class TestReader:
    """Frames are those that a reader finds who decodes the whole file and then chooses."""

    @pytest.fixture
    def loader(self, loader_of: Callable[..., VideoLoader]) -> VideoLoader:
        return loader_of()

    @pytest.mark.parametrize("options", [{}, {"fps": 8}, {"nframes": 6, "video_start": 1.1}])
    def test_pixels(
        self, options: dict[str, Any], loader: VideoLoader, reading: Reading, tmp_path: Path
    ) -> None:
        path = film(tmp_path / "a.mp4", 33, bf="3", g="100")
        part = VideoPart(type="video", resized_height=56, resized_width=84, **options)
        ours = loader.open(reading, "media[0]", Path(path).read_bytes(), "p", part).read()
        chosen, *_ = read_video({"video": path, **options})
        expected = video_files.resize(
            chosen, [56, 84], video_files.InterpolationMode.BICUBIC, antialias=True
        )
        np.testing.assert_array_equal(ours, expected.permute(0, 2, 3, 1).numpy())

    def test_nothing_is_decoded_behind_the_last_frame(
        self, clip: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shown: list[int] = []
        rgb = VideoFile._rgb

        def watched(self: Any, number: int, frame: Any) -> Any:
            shown.append(number)
            return rgb(self, number, frame)

        monkeypatch.setattr(VideoFile, "_rgb", watched)
        assert len(list(open_video(Path(clip).read_bytes()).decoded([0, 1, 3, 4]))) == 4
        assert shown == [0, 1, 3, 4]

    def test_time_is_bounded(self, preprocessor: Preprocessor, checkpoint: Path, clip: str) -> None:
        slow = Preprocessor(checkpoint, PreprocessConfig(max_decode_seconds=1e-9))
        with pytest.raises(InvalidRequest, match=r"media\[0\]: .*longer than 1e-09 s to decode"):
            slow.features(ASK, [b"a"], [Path(clip).read_bytes()])


def _audio() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def _empty() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    return buffer.getvalue()


@pytest.fixture(scope="module")
def send(server: TritonServer) -> Callable[..., Any]:
    def send(part: dict[str, Any], *media: bytes) -> Any:
        messages = json.dumps([{"role": "user", "content": [{"type": "video", **part}]}])
        inputs = []
        for name, values in (("messages", [messages]), ("responses", [b"a"]), ("media", media)):
            array = np.empty((1, len(values)), dtype=np.object_)
            array[0, :] = values
            tensor = triton.InferInput(name, array.shape, "BYTES")
            tensor.set_data_from_numpy(array)
            inputs.append(tensor)
        with triton.InferenceServerClient(server.endpoints.grpc) as connection:
            return connection.infer("reward", inputs).as_numpy("scores")

    return send


HLS = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n%s\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [("film.mkv", "ffv1", "yuv420p"), ("film.mov", "prores_ks", "yuv422p10le"),
     ("film.avi", "huffyuv", "rgb24"), ("film.mov", "png", "rgb24")],
)  # fmt: skip
def test_only_listed_codecs_are_decoded(
    name: str,
    codec: str,
    pixels: str,
    loader_of: Callable[..., VideoLoader],
    reading: Reading,
    tmp_path: Path,
) -> None:
    """In a container that is allowed; FFmpeg has hundreds of decoders."""
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
        for frame in frames(4):
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    loader = loader_of()
    data = (tmp_path / name).read_bytes()
    with pytest.raises(InvalidRequest, match=r"media\[0\]: codec \w+; only h264, hevc"):
        loader.open(reading, "media[0]", data, "part", VideoPart(type="video"))


class TestBadInput:
    def refused(self, send: Callable[..., Any], words: str, part: Any, *media: bytes) -> None:
        with pytest.raises(triton.InferenceServerException) as caught:
            send(part, *media)
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
        assert words in caught.value.message()
        assert len(caught.value.message()) < 600

    @pytest.mark.parametrize(
        ("words", "data"),
        [
            ("media[0]: 0 bytes were given; an encoded video is needed", b""),
            ("media[0]: the video cannot be read: 5 bytes in no known format", b"hello"),
            ("media[0]: a file of", _audio()),
            ("media[0]", _empty()),
            ("bytes in no known format", encode(picture(64, 48, 0), "JPEG")),
        ],
        ids=["nothing", "text", "audio alone", "no frame", "an image"],
    )
    def test_no_video(self, words: str, data: bytes, send: Callable[..., Any]) -> None:
        self.refused(send, words, {}, data)

    @pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "faststart.mp4"])
    @pytest.mark.parametrize("kept", [0.02, 0.3, 0.6, 0.9])
    def test_truncated(
        self, name: str, kept: float, send: Callable[..., Any], tmp_path: Path
    ) -> None:
        options = {"codec": "mpeg4"} if name == "a.avi" else {}
        path = tmp_path / name
        with av.open(
            str(path), "w", options={"movflags": "faststart"} if "fast" in name else {}
        ) as container:
            stream = container.add_stream(options.get("codec", "libx264"), rate=2)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for frame in frames(60):
                container.mux(stream.encode(av.VideoFrame.from_image(frame)))
            container.mux(stream.encode())
        data = path.read_bytes()
        assert send({"nframes": 2, "min_pixels": 784}, data).shape == (1, 1)
        self.refused(
            send, "media[0]", {"nframes": 2, "min_pixels": 784}, data[: int(kept * len(data))]
        )

    @pytest.mark.parametrize("url", [b"file://%s", b"%s", b"http://127.0.0.1:9/a.mp4"])
    def test_a_playlist_opens_nothing(
        self, url: bytes, send: Callable[..., Any], clip: str
    ) -> None:
        target = url % clip.encode() if b"%s" in url else url
        self.refused(send, "no known format", {}, HLS % target)
        self.refused(send, "no known format", {}, b"ffconcat version 1.0\nfile '%s'\n" % target)

    def test_control_the_playlist_would_open(self, clip: str) -> None:
        """Without the list of formats the file that a playlist names is found and decoded."""
        playlist = io.BytesIO(b"ffconcat version 1.0\nfile '%s'\n" % clip.encode())
        with av.open(playlist, format="concat", options={"safe": "0"}) as container:
            assert len(list(container.decode(video=0))) == 20

    @pytest.mark.parametrize(
        ("words", "part"),
        [
            ("[0].content[0]: fps and nframes exclude each other", {"fps": 1.0, "nframes": 4}),
            ("media[0]: no frames can be chosen: nframes should", {"nframes": 22}),
            ("media[0]: no frames can be chosen: Invalid time range", {"video_start": 9.0}),
            ("[0].content[0]: min_pixels 100352 is above max_pixels 50000", {"max_pixels": 50000}),
            ("media[0]: the video cannot be used: its limits", {"min_pixels": 1, "max_pixels": 2}),
            ("messages[0].content[0].fps", {"fps": -1.0}),
            ("messages[0].content[0].frames: Input should be greater than 0", {"frames": 0}),
            ("messages[0].content[0].frames: 769 frames, the limit is 768", {"frames": 769}),
            ("media: 1 entries were given for 3 media parts", {"frames": 3}),
            ("messages[0].content[0].video", {"video": "/etc/hostname"}),
            ("media[0]: the media take", {"resized_height": 3000, "resized_width": 4000}),
        ],
    )  # fmt: skip
    def test_options(
        self, words: str, part: dict[str, Any], send: Callable[..., Any], clip: str
    ) -> None:
        self.refused(send, words, part, Path(clip).read_bytes())

    def test_frames(self, send: Callable[..., Any], clip: str) -> None:
        small, large = (encode(picture(w, 48, 0)) for w in (64, 500))
        self.refused(send, "media[1]: the frame's size is", {"frames": 2}, small, large)
        self.refused(send, "media[1]: 5 bytes", {"frames": 2}, small, b"hello")
        self.refused(send, "media[0]", {"frames": 1}, Path(clip).read_bytes())

    def test_neighbours_score(self, client: RewardClient, films: dict[str, Messages]) -> None:
        good = films["fps/default"]
        bad = [user(video(b"hello")), says("It moves.")]
        results = client.score_many([good, bad, good, bad], concurrency=4, on_error="return")
        assert [isinstance(result, float) for result in results] == [True, False, True, False]
        assert results[0] == pytest.approx(results[2], rel=1e-5)


def test_a_frame_larger_than_the_header_says(
    loader_of: Callable[..., VideoLoader], reading: Reading
) -> None:
    """A stream may change its size; what was checked is the header's."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="avi") as container:
        stream = container.add_stream("mjpeg", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for frame in frames(4):
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        for _ in range(4):
            packet = av.Packet(encode(picture(2000, 1500, 0), "JPEG"))
            packet.stream, packet.time_base = stream, stream.time_base
            container.mux(packet)
    part = VideoPart(type="video", nframes=8)
    clip = loader_of(10**6).open(reading, "media[0]", buffer.getvalue(), "p", part)
    with pytest.raises(InvalidRequest, match=r"^media\[0\]: the video cannot be used"):
        clip.read()


def test_pixels_of_a_frame_are_bounded(
    loader_of: Callable[..., VideoLoader], reading: Reading, clip: str
) -> None:
    part = VideoPart(type="video")
    data = Path(clip).read_bytes()
    assert loader_of(64 * 48).open(reading, "media[0]", data, "p", part).frames == 4
    with pytest.raises(InvalidRequest, match="64 x 48 pixels are 3072, the limit is 3071"):
        loader_of(64 * 48 - 1).open(reading, "media[0]", data, "p", part)
