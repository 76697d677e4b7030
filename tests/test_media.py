"""Pixels are exactly what the card's code hands to the processor's normalisation."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from qwen_vl_utils import process_vision_info
from transformers import AutoImageProcessor

from tests.conftest import encode
from tests.conversations import image_files, picture
from triward_server.config import ForwardConfig, PreprocessConfig
from triward_server.conversation import ImagePart
from triward_server.errors import InvalidRequest
from triward_server.media import ImageLoader
from triward_server.preprocess import Preprocessor
from triward_server.scoring import Scorer
from triward_server.testing import Oracle, fp32_budget

SIZES = [(28, 28), (31, 997), (1999, 2001), (56, 55), (13, 7)]


@pytest.fixture(scope="module")
def loader(checkpoint: Path) -> ImageLoader:
    return ImageLoader(AutoImageProcessor.from_pretrained(checkpoint), 64_000_000)


def load(loader: ImageLoader, data: bytes, **limits: int) -> np.ndarray:
    return loader.load("media[0]", data, "part", ImagePart(type="image", **limits))


def test_every_format(loader: ImageLoader, tmp_path: Path) -> None:
    for name, path in image_files(tmp_path).items():
        message = [{"role": "user", "content": [{"type": "image", "image": str(path)}]}]
        (expected,), _ = process_vision_info(message)
        np.testing.assert_array_equal(
            load(loader, path.read_bytes()), np.array(expected), err_msg=name
        )


@pytest.mark.parametrize("size", SIZES)
def test_patches_equal_the_processors(
    size: tuple[int, int], loader: ImageLoader, checkpoint: Path
) -> None:
    """uint8 pixels, normalised and cut by the tower, are the processor's `pixel_values`."""
    source = picture(*size, 3)
    message = [{"role": "user", "content": [{"type": "image", "image": source}]}]
    images, _ = process_vision_info(message)
    expected = AutoImageProcessor.from_pretrained(checkpoint)(images, return_tensors="pt")
    tower = Scorer(checkpoint, ForwardConfig(dtype="float32", device="cpu"))._model.visual
    pixels = torch.from_numpy(load(loader, encode(source)))
    torch.testing.assert_close(tower._patchify(pixels), expected["pixel_values"], rtol=0, atol=1e-6)


def test_processor_limits_tighter_than_the_default(checkpoint: Path, tmp_path: Path) -> None:
    """A checkpoint's own pixel limits cause a second resize, and the same score as the card's."""
    other = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, other)
    config = json.loads((other / "preprocessor_config.json").read_text())
    config |= {"min_pixels": 16 * 28 * 28, "max_pixels": 30 * 28 * 28}
    (other / "preprocessor_config.json").write_text(json.dumps(config))
    preprocessor = Preprocessor(other, PreprocessConfig())
    scorer = Scorer(other, ForwardConfig(dtype="float32", device="cpu"))
    oracle = Oracle(other)
    for size in ((500, 400), (40, 40)):
        source = picture(*size, 8)
        content = [{"type": "image"}, {"type": "text", "text": "?"}]
        wire = json.dumps([{"role": "user", "content": content}]).encode()
        features = preprocessor.features(wire, [b"yes"], [encode(source)])
        tokens = features.images[0].size // 3 // 784
        assert 16 <= tokens <= 30
        (result,) = scorer.score([features])
        expected = oracle.score(
            [
                {"role": "user", "content": [{"type": "image", "image": source}, content[1]]},
                {"role": "assistant", "content": "yes"},
            ]
        )
        assert abs(result.scores[0] - expected) <= fp32_budget(expected)  # type: ignore[union-attr]


def test_orientation_is_not_applied(loader: ImageLoader) -> None:
    """The card opens with Pillow and does not look at EXIF; neither may we."""
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = encode(picture(112, 56, 2), "JPEG")
    buffer = io.BytesIO()
    picture(112, 56, 2).save(buffer, "JPEG", exif=exif)
    np.testing.assert_array_equal(load(loader, buffer.getvalue()), load(loader, upright))


@pytest.mark.parametrize("format_", ["PDF", "ICO", "PCX"])
def test_other_formats_are_refused(format_: str, loader: ImageLoader) -> None:
    """Pillow could open them; what is not listed is not decoded."""
    with pytest.raises(InvalidRequest, match=r"media\[0\].*known format"):
        load(loader, encode(picture(64, 64, 1), format_))


def test_pixel_limit_is_checked_on_the_header(
    loader: ImageLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode(picture(64, 64, 1))
    small = ImageLoader(loader._processor, max_image_pixels=64 * 64 - 1)
    monkeypatch.setattr(Image.Image, "load", _never)
    with pytest.raises(InvalidRequest, match="64 x 64 pixels are 4096, the limit is 4095"):
        load(small, data)


def _never(*_: Any) -> None:
    raise AssertionError("pixels were decoded")
