"""Pixels are exactly what the card's code hands to the processor's normalisation."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from qwen_vl_utils import process_vision_info
from transformers import AutoImageProcessor

from benchmarks.workloads import photo
from tests.conftest import Served, encode
from tests.conversations import image_files, picture
from triward import RewardClient
from triward_server.config import ForwardConfig, PreprocessConfig
from triward_server.engine.scoring import Scorer
from triward_server.errors import InvalidRequest, Unavailable
from triward_server.intake import resizing
from triward_server.intake.conversation import ImagePart
from triward_server.intake.decoding import Decoder
from triward_server.intake.media import ImageLoader
from triward_server.intake.preprocess import Preprocessor
from triward_server.intake.resizing import TorchResizer, is_steep, limited
from triward_server.schema import Grid
from triward_server.testing.oracle import Oracle, fp32_budget

SIZES = [(28, 28), (31, 997), (1999, 2001), (56, 55), (13, 7)]


@pytest.fixture(scope="module")
def loader(checkpoint: Path) -> ImageLoader:
    return ImageLoader(AutoImageProcessor.from_pretrained(checkpoint), 64_000_000)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(PreprocessConfig())


def load(loader: ImageLoader, decoder: Decoder, data: bytes, **limits: int) -> np.ndarray:
    with decoder.reading() as reading:
        part = ImagePart(type="image", **limits)
        picture = loader.open(reading, "media[0]", data, "part", part)
        first = reading.image("media[0]", picture.header, picture.first_size)
    pixels = limited(loader._processor, first)
    assert pixels.shape == (*picture.final_size, 3)
    return pixels


def test_every_format(loader: ImageLoader, decoder: Decoder, tmp_path: Path) -> None:
    for name, path in image_files(tmp_path).items():
        message = [{"role": "user", "content": [{"type": "image", "image": str(path)}]}]
        (expected,), _ = process_vision_info(message)
        np.testing.assert_array_equal(
            load(loader, decoder, path.read_bytes()), np.array(expected), err_msg=name
        )


@pytest.mark.parametrize("size", SIZES)
def test_patches_equal_the_processors(
    size: tuple[int, int], loader: ImageLoader, decoder: Decoder, checkpoint: Path
) -> None:
    """uint8 pixels, normalised and cut by the tower, are the processor's `pixel_values`."""
    source = picture(*size, 3)
    message = [{"role": "user", "content": [{"type": "image", "image": source}]}]
    images, _ = process_vision_info(message)
    expected = AutoImageProcessor.from_pretrained(checkpoint)(images, return_tensors="pt")
    tower = Scorer(
        checkpoint, ForwardConfig(dtype="float32", device="cpu", prefix_cache_bytes=0)
    )._model.visual
    pixels = torch.from_numpy(load(loader, decoder, encode(source)))
    patches = tower._patchify(pixels, Grid(*expected["image_grid_thw"][0].tolist()))
    torch.testing.assert_close(patches, expected["pixel_values"], rtol=0, atol=1e-6)


def test_processor_limits_tighter_than_the_default(checkpoint: Path, tmp_path: Path) -> None:
    """A checkpoint's own pixel limits cause a second resize, and the same score as the card's."""
    other = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, other)
    config = json.loads((other / "preprocessor_config.json").read_text())
    config |= {"min_pixels": 16 * 28 * 28, "max_pixels": 30 * 28 * 28}
    (other / "preprocessor_config.json").write_text(json.dumps(config))
    preprocessor = Preprocessor(other, PreprocessConfig())
    scorer = Scorer(other, ForwardConfig(dtype="float32", device="cpu", prefix_cache_bytes=0))
    oracle = Oracle(other)
    for size in ((500, 400), (40, 40)):
        source = picture(*size, 8)
        content = [{"type": "image"}, {"type": "text", "text": "?"}]
        wire = json.dumps([{"role": "user", "content": content}]).encode()
        features = preprocessor.features(wire, [b"yes"], [encode(source)])
        tokens = features.media[0].size // 3 // 784
        assert 16 <= tokens <= 30
        (result,) = scorer.score([features])
        expected = oracle.score(
            [
                {"role": "user", "content": [{"type": "image", "image": source}, content[1]]},
                {"role": "assistant", "content": "yes"},
            ]
        )
        assert abs(result.scores[0] - expected) <= fp32_budget(expected)  # type: ignore[union-attr]


def test_orientation_is_not_applied(loader: ImageLoader, decoder: Decoder) -> None:
    """The card opens with Pillow and does not look at EXIF; neither may we."""
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = encode(picture(112, 56, 2), "JPEG")
    buffer = io.BytesIO()
    picture(112, 56, 2).save(buffer, "JPEG", exif=exif)
    np.testing.assert_array_equal(
        load(loader, decoder, buffer.getvalue()), load(loader, decoder, upright)
    )


@pytest.mark.parametrize("format_", ["PDF", "ICO", "PCX"])
def test_other_formats_are_refused(format_: str, loader: ImageLoader, decoder: Decoder) -> None:
    """Pillow could open them; what is not listed is not decoded."""
    with pytest.raises(InvalidRequest, match=r"media\[0\].*known format"):
        load(loader, decoder, encode(picture(64, 64, 1), format_))


def test_pixel_limit_is_checked_on_the_header(loader: ImageLoader, decoder: Decoder) -> None:
    data = encode(picture(64, 64, 1))[:50]  # no pixels follow
    small = ImageLoader(loader._processor, max_image_pixels=64 * 64 - 1)
    with pytest.raises(InvalidRequest, match="64 x 64 pixels are 4096, the limit is 4095"):
        load(small, decoder, data)


def submit(
    resizer: TorchResizer, loader: ImageLoader, decoder: Decoder, data: bytes, **limits: int
) -> Future[np.ndarray]:
    """What the preprocessor does with an image that is not steep."""
    with decoder.reading() as reading:
        part = ImagePart(type="image", **limits)
        picture = loader.open(reading, "media[0]", data, "part", part)
        pixels = reading.image("media[0]", picture.header, None)
    return resizer.submit(pixels, picture.first_size)


class TestTorch:
    """`--preprocess-device cuda` resizes with torch; here the same code runs on the CPU."""

    def resized(
        self, loader: ImageLoader, decoder: Decoder, sources: list[Image.Image]
    ) -> list[np.ndarray]:
        resizer = TorchResizer(loader._processor, torch.device("cpu"))
        waiting = [submit(resizer, loader, decoder, encode(s)) for s in sources]
        resizer.flush()
        return [pixels.result(timeout=0) for pixels in waiting]

    @pytest.mark.parametrize("kind", ["photos", "harsh"])
    def test_it_is_nearly_pillows_resize(
        self, kind: str, loader: ImageLoader, decoder: Decoder
    ) -> None:
        """Pillow rounds and clips between its two passes, which shows at the sharpest edges."""
        if kind == "photos":
            sizes, bound = [(672, 504), (1024, 768), (700, 500), (120, 90)], 2
            sources = [photo(np.random.default_rng(w), w, h) for w, h in sizes]
        else:
            sources, bound = [picture(w, h, w) for w, h in SIZES], 10
        for source, ours in zip(sources, self.resized(loader, decoder, sources), strict=True):
            exact = load(loader, decoder, encode(source))
            assert ours.shape == exact.shape and ours.dtype == np.uint8
            levels = np.abs(ours.astype(int) - exact)
            assert levels.max() <= bound
            assert (levels > 0).mean() < 0.35

    def test_company_changes_nothing(self, loader: ImageLoader, decoder: Decoder) -> None:
        """Equal sizes are resized in one batch, each into its own place."""
        sources = [picture(100 + 40 * (n % 2), 90, n) for n in range(6)]
        together = self.resized(loader, decoder, sources)
        for source, pixels in zip(sources, together, strict=True):
            np.testing.assert_array_equal(pixels, self.resized(loader, decoder, [source])[0])
        assert len({pixels.tobytes() for pixels in together}) == 6

    def test_what_waits_is_bounded(
        self, loader: ImageLoader, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What would exceed the limit is resized before more is taken up."""
        monkeypatch.setattr(resizing, "_MAX_WAITING", 2 * 84 * 84)
        resizer = TorchResizer(loader._processor, torch.device("cpu"))
        waiting = [
            submit(resizer, loader, decoder, encode(picture(84, 84, seed))) for seed in range(3)
        ]
        assert [pixels.done() for pixels in waiting] == [True, True, False]
        resizer.flush()
        assert waiting[2].done()

    def test_enlarged_pixels_count(
        self, loader: ImageLoader, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(resizing, "_MAX_WAITING", 280 * 280)
        resizer = TorchResizer(loader._processor, torch.device("cpu"))
        first, second = (
            submit(resizer, loader, decoder, encode(picture(9, 9, seed)), min_pixels=200 * 200)
            for seed in range(2)
        )
        assert first.done() and not second.done()

    def test_the_largest_reductions_are_pillows(
        self, loader: ImageLoader, decoder: Decoder, checkpoint: Path
    ) -> None:
        """Beyond what torch's filter can do on a GPU; exact, and at once."""
        assert [is_steep((n, 9), (56, 9)) for n in (56 * 32, 56 * 32 + 1)] == [False, True]
        preprocessor = Preprocessor(checkpoint, PreprocessConfig(resize="torch"))
        file = encode(picture(2000, 1900, 1))
        wire = b'[{"role":"user","content":[{"type":"image","max_pixels":3136}]}]'
        opened = preprocessor.open(wire, [b"a"], [file])
        pixels = opened.pixels[0].result(timeout=0)
        np.testing.assert_array_equal(pixels, load(loader, decoder, file, max_pixels=56 * 56))

    def test_a_failure_stands_alone(
        self, loader: ImageLoader, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A batch that is too much is tried one by one; what still fails is an error."""
        resizer = TorchResizer(loader._processor, torch.device("cpu"))
        resize = resizer._resize
        attempts: list[int] = []

        def little_memory(images: Sequence[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
            attempts.append(len(images))
            if len(images) > 1 or images[0].shape[0] == 200:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return resize(images, size)

        monkeypatch.setattr(resizer, "_resize", little_memory)
        *small, large = (
            submit(resizer, loader, decoder, encode(picture(n, n, n))) for n in (100, 100, 100, 200)
        )
        resizer.flush()
        assert attempts == [3, 1, 1, 1, 1]
        assert {pixels.result(timeout=0).shape[2] for pixels in small} == {3}
        with pytest.raises(Unavailable, match="exceeds the device's free memory"):
            large.result(timeout=0)

    def test_damaged_and_good_requests_share_a_batch(self, checkpoint: Path) -> None:
        """Each image ends up in its own request, in its own place."""
        config = PreprocessConfig(resize="torch")
        preprocessor = Preprocessor(checkpoint, config)
        content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "?"}]
        wire = json.dumps([{"role": "user", "content": content}]).encode()
        files = [encode(picture(90, 60 + 30 * (n % 2), n)) for n in range(6)]
        opened = [preprocessor.open(wire, [b"a"], files[n : n + 2]) for n in (0, 2, 4)]
        with pytest.raises(InvalidRequest, match=r"media\[1\]"):
            preprocessor.open(wire, [b"a"], [files[0], files[1][:-200]])
        preprocessor.flush()
        for n, request in zip((0, 2, 4), opened, strict=True):
            alone = preprocessor.features(wire, [b"a"], files[n : n + 2])
            for a, b in zip(preprocessor.finish(request).media, alone.media, strict=True):
                np.testing.assert_array_equal(a, b)

    def test_served_scores_drift_a_little(
        self, served: Callable[..., Served], client: RewardClient
    ) -> None:
        """On images that are really resized: another score, but hardly."""

        def with_torch(repository: Path) -> None:
            path = repository / "resized_preprocess" / "config.pbtxt"
            text = path.read_text()
            assert '"pillow"' in text
            path.write_text(text.replace('"pillow"', '"torch"'))

        other = served("resized", change=with_torch).client
        sources = [picture(w, h, w) for w, h in [(100, 90), (333, 222), (50, 470), (640, 480)] * 3]
        conversations = [
            [
                {"role": "user", "content": [{"type": "image", "image": source}]},
                {"role": "assistant", "content": f"It shows {n}."},
            ]
            for n, source in enumerate(sources)
        ]
        exact = np.array(client.score_many(conversations))
        drift = np.abs(np.array(other.score_many(conversations)) - exact)
        assert 0 < drift.max() < 0.05
        assert np.std(exact) > 0.5


def test_changed_pixel_limits_miss_the_cache(checkpoint: Path) -> None:
    """The same file under another limit is another image, under the same one it is not."""
    preprocessor = Preprocessor(checkpoint, PreprocessConfig())
    scorer = Scorer(checkpoint, ForwardConfig(dtype="float32", device="cpu", prefix_cache_bytes=0))
    file = encode(picture(200, 200, 0))

    def score(**limits: int) -> tuple[int, int]:
        content = [{"type": "image", **limits}, {"type": "text", "text": "?"}]
        wire = json.dumps([{"role": "user", "content": content}]).encode()
        scorer.score([preprocessor.features(wire, [b"yes"], [file])])
        cache = scorer._model.embeddings
        return cache.hits, cache.misses

    assert score() == (0, 1)
    assert score() == (1, 1)
    assert score(max_pixels=100 * 100) == (1, 2)
    assert score(max_pixels=100 * 100) == (2, 2)
