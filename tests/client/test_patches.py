"""Patches of transformers' own processors -> the pixels that they were made from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

from triward import InvalidRequest, RewardClient, pixels_of, protocol


@pytest.fixture(scope="module")
def processor():
    return Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 64)


def noise(*shape):
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


def test_patches_are_undone_exactly(processor):
    """Images that are not resized come back bit by bit; every value of every channel is met."""
    ramp = np.arange(256, dtype=np.uint8).repeat(147).reshape(112, 112, 3)
    images = [ramp, ramp[::-1, ::-1].copy(), noise(28, 28, 3), noise(140, 84, 3), noise(28, 196, 3)]
    batch = processor(images, return_tensors="pt")
    for values in (batch["pixel_values"], batch["pixel_values"].numpy()):
        back = pixels_of(values, batch["image_grid_thw"])
        assert [item.dtype for item in back] == [np.dtype(np.uint8)] * len(images)
        for got, image in zip(back, images, strict=True):
            assert np.array_equal(got, image)


def test_resized_pixels_go_through_unchanged(processor):
    """What the processor has resized is what it makes the same patches of again."""
    batch = processor([noise(101, 77, 3)], return_tensors="pt")
    (image,) = pixels_of(batch["pixel_values"], batch["image_grid_thw"])
    again = processor([image], return_tensors="pt")
    assert torch.equal(again["pixel_values"], batch["pixel_values"])


def test_videos_are_undone_too():
    videos = [noise(4, 56, 84, 3), noise(2, 28, 56, 3)]
    batch = Qwen2VLVideoProcessor(do_sample_frames=False, do_resize=False)(
        [torch.from_numpy(v).permute(0, 3, 1, 2) for v in videos], return_tensors="pt"
    )
    back = pixels_of(batch["pixel_values_videos"], batch["video_grid_thw"], video=True)
    for got, video in zip(back, videos, strict=True):
        assert np.array_equal(got, video)
    with pytest.raises(InvalidRequest, match=r"grid_thw\[0\]: must be 1, h, w"):
        pixels_of(batch["pixel_values_videos"], batch["video_grid_thw"])
    with pytest.raises(InvalidRequest, match="item 0 has two different frames"):
        pixels_of(batch["pixel_values_videos"][-8:], batch["video_grid_thw"][1:])


def test_another_layout(processor):
    other = Qwen2VLImageProcessor(
        patch_size=16, min_pixels=1, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    image = noise(64, 96, 3)
    batch = other([image], return_tensors="pt")
    layout = {"patch_size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
    (back,) = pixels_of(batch["pixel_values"], batch["image_grid_thw"], **layout)
    assert np.array_equal(back, image)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"grid_thw": [[1, 2, 4]]}, "pixel_values: must be [8, 1176] by grid_thw, got [4, 1176]"),
        ({"grid_thw": [[1, 1, 4]]}, "grid_thw[0]: must be 1, h, w, h and w multiples of 2, got"),
        ({"grid_thw": [[2, 2, 1]]}, "grid_thw[0]: must be"),
        ({"grid_thw": [[1.0, 2, 2]]}, "grid_thw: must be integers [items, 3], got float64 [1, 3]"),
        ({"grid_thw": []}, "grid_thw: must be integers [items, 3], got float64 [0]"),
        ({"patch_size": 16}, "pixel_values: must be [4, 1536]"),
        ({"mean": [0.5] * 3}, "pixel_values[0]: stands for a pixel of "),
        ({"std": [0.5] * 3}, "pixel_values[0]: stands for a pixel of "),
        ({"bfloat16": True}, "pixel_values[0]: stands for a pixel of "),
        ({"nan": 2}, "pixel_values[2]: stands for a pixel of nan, not a whole number"),
        ({"beyond": 3}, "pixel_values[3]: stands for a pixel of "),
    ],
)
def test_what_no_pixels_became(processor, change, sentence):
    batch = processor([noise(28, 28, 3)], return_tensors="pt")
    values = batch["pixel_values"]
    if change.pop("bfloat16", False):
        values = values.bfloat16().float()
    for key, value in (("nan", float("nan")), ("beyond", 2.7)):
        if key in change:
            values[change.pop(key), 5] = value
    with pytest.raises(InvalidRequest) as caught:
        pixels_of(values, **{"grid_thw": batch["image_grid_thw"], **change})
    assert str(caught.value).startswith(sentence)


def test_tensors_of_torch_are_taken_and_bad_ones_named(transport):
    transport.reply = lambda arguments: transport.result([1.0, 2.0])
    ids, image = torch.tensor([3, 1, 2]), torch.zeros(28, 28, 3, dtype=torch.uint8)
    with RewardClient(_transport=transport) as client:
        assert client.score_tokens(ids, torch.stack([ids, ids]), media=[image]) == [1.0, 2.0]
        names = [tensor.name() for tensor in transport.calls[-1]["inputs"]]
        assert names == [spec.name for spec in protocol.FORWARD_INPUTS]
        trained = torch.ones(28, 28, 3, requires_grad=True)
        with pytest.raises(InvalidRequest, match=r"^media\[0\]: is no array: Can't call numpy"):
            client.score_tokens(ids, [ids, ids], media=[trained])
