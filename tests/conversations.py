"""Conversations in the model card's form that together cover what callers send."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Messages = list[dict[str, Any]]

PROSE = "The chart compares five colours; purple is the tallest bar, at eighty-six. "
RESPONSES = {
    "plain": "The answer is: B",
    "empty": "",
    "space": " ",
    "newlines-first": "\n\n\nThe answer is (A).",
    "carriage-returns": "\r\n\r\nNo.\r\n",
    "emoji": "Yes 👍🏽 — 👩‍👩‍👧‍👦 agree 🎉🎉",
    "cjk": "图中最高的柱子是紫色,答案是 B。日本語も少し。한국어도 조금.",
    "right-to-left": "الجواب هو B، والعمود الأرجواني هو الأعلى. תשובה: ב",
    "combining": "e\u0301 vs \u00e9, a\u030a vs \u00e5, \ufb01ne, \u1e9b\u0323",
    "code": 'def f(x):\n    """Doc."""\n    return {"a": [x << 2, x != 3]}  # <tag attr="1">\n',
    "math": r"$$\int_0^1 x^2\,dx = \tfrac{1}{3}$$ so **B**",
    "numbers": "1234567890 3.14159 1e-9 0x1F 12,345",
    "tool-call": '<tool_call>\n{"name": "f"}\n</tool_call> then <|fim_prefix|> text',
    "control-characters": "a\x00b\x07c\u200bd\ufeffe\ufdd0f",
    "one-long-word": "a" * 700,
    "trailing-newlines": "B\n\n\n\n",
    "looks-like-template": "system\nYou are helpful.\nuser\nassistant\n",
    "4000-tokens": PROSE * 125,
}


def picture(width: int, height: int, seed: int) -> Image.Image:
    """A smooth gradient with blocks and noise: neither flat nor pure noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)], axis=-1)
    for _ in range(6):
        top, left = rng.integers(0, height), rng.integers(0, width)
        block = base[top : top + height // 3 + 1, left : left + width // 3 + 1]
        block[:] = rng.integers(0, 256, 3)
    noisy = base + rng.normal(0, 12, base.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def user(*parts: Any) -> dict[str, Any]:
    """A user message of strings (text) and dicts (images)."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]
    return {"role": "user", "content": content}


def image(source: Any, **limits: int) -> dict[str, Any]:
    return {"type": "image", "image": source, **limits}


def says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def image_files(folder: Path) -> dict[str, Path]:
    """The same kind of picture in every encoding that the issue names."""
    rgb = picture(200, 150, 1)
    rgba = rgb.convert("RGBA")
    rgba.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 200, dtype=np.uint8), (150, 1))))
    sixteen = Image.fromarray(np.linspace(0, 65535, 150 * 200).reshape(150, 200).astype(np.uint16))
    rotated = Image.Exif()
    rotated[0x0112] = 6  # orientation: rotate by 90 degrees to show
    frames = [picture(120, 90, seed).convert("P") for seed in (2, 3)]
    savers: dict[str, Callable[[Path], None]] = {
        "photo.jpg": lambda p: rgb.save(p, quality=85),
        "gray.jpg": lambda p: rgb.convert("L").save(p),
        "cmyk.jpg": lambda p: rgb.convert("CMYK").save(p),
        "progressive.jpg": lambda p: rgb.save(p, progressive=True),
        "rotated.jpg": lambda p: rgb.save(p, exif=rotated),
        "rgb.png": lambda p: rgb.save(p),
        "gray.png": lambda p: rgb.convert("L").save(p),
        "gray-alpha.png": lambda p: rgba.convert("LA").save(p),
        "palette.png": lambda p: rgb.convert("P", palette=Image.Palette.ADAPTIVE).save(p),
        "palette-transparent.png": lambda p: rgb.quantize(64).save(p, transparency=3),
        "rgba.png": lambda p: rgba.save(p),
        "bilevel.png": lambda p: rgb.convert("1").save(p),
        "16-bit.png": lambda p: sixteen.save(p),
        "lossy.webp": lambda p: rgb.save(p, quality=70),
        "lossless-alpha.webp": lambda p: rgba.save(p, lossless=True),
        "picture.bmp": lambda p: rgb.save(p),
        "animated.gif": lambda p: frames[0].save(p, save_all=True, append_images=frames[1:]),
        "picture.tiff": lambda p: rgb.save(p),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, save in savers.items():
        save(folder / name)
    return {name: folder / name for name in savers}


def conversations(folder: Path) -> dict[str, Messages]:
    """At least 60 conversations, by name; each ends with the response that is scored."""
    cases: dict[str, Messages] = {}
    for name, response in RESPONSES.items():
        cases[f"text/{name}"] = [user("Is purple the highest value?"), says(response)]
    question = "What is shown?"
    for name, path in image_files(folder).items():
        cases[f"format/{name}"] = [user(image(str(path)), question), says("A chart.")]

    def saved(width: int, height: int, seed: int) -> str:
        path = folder / f"{width}x{height}-{seed}.png"
        picture(width, height, seed).save(path)
        return str(path)

    for width, height in (
        (28, 28), (29, 27), (10, 10), (56, 28), (28, 2000), (2000, 28), (2000, 1400), (333, 777),
    ):  # fmt: skip
        cases[f"size/{width}x{height}"] = [
            user(image(saved(width, height, 5)), question), says("A gradient."),
        ]  # fmt: skip
    photo = saved(640, 480, 6)
    limits: dict[str, dict[str, int]] = {
        "min": {"min_pixels": 640 * 28 * 28},
        "max": {"max_pixels": 64 * 28 * 28},
        "both": {"min_pixels": 100 * 28 * 28, "max_pixels": 128 * 28 * 28},
        "resized": {"resized_height": 280, "resized_width": 420},
    }
    for name, limit in limits.items():
        cases[f"limits/{name}"] = [user(image(photo, **limit), question), says("Five bars.")]
    cases["limits/per-image"] = [
        user(image(photo, max_pixels=50176), image(photo, max_pixels=100352), image(photo), "?"),
        says("The same three times."),
    ]
    several = [saved(84 * n, 300 - 40 * n, n) for n in range(1, 5)]
    for count in (2, 3, 4):
        cases[f"images/{count}"] = [
            user(*map(image, several[:count]), "Compare them."), says("They differ."),
        ]  # fmt: skip
    cases["images/text-between"] = [
        user("First:", image(several[0]), "second:", image(several[1]), "which is larger?"),
        says("The second."),
    ]
    cases["images/adjacent-last"] = [user("Look.", image(several[2])), says("Done.")]
    cases["images/without-text"] = [user(image(several[2])), says("A picture.")]
    cases["images/twice-the-same"] = [user(image(photo), image(photo), "Same?"), says("Yes.")]
    cases["turns/images-in-several"] = [
        user(image(several[0]), "What is it?"), says("A gradient."),
        user("And this?", image(several[3])), says("Another one."),
        user("Which do you prefer?"), says("The first."),
    ]  # fmt: skip
    cases["turns/image-in-assistant-turn"] = [
        user("Draw."), {"role": "assistant", "content": [image(several[1])]},
        user("Thanks. Again?"), says("Sure."),
    ]  # fmt: skip
    cases["turns/many"] = [
        message
        for turn in range(12)
        for message in (user(f"Question {turn}?"), says(f"Answer {turn}."))
    ]
    system = {"role": "system", "content": "You are a strict judge.\nBe brief."}
    cases["system/text"] = [system, user("Is 2 + 2 = 5?"), says("No.")]
    cases["system/image"] = [system, user(image(photo), "Judge."), says("Good.")]
    cases["system/empty"] = [{"role": "system", "content": ""}, user("Hi"), says("Hello")]
    cases["system/image-inside"] = [
        {"role": "system", "content": [image(several[0]), {"type": "text", "text": "Context."}]},
        user("Use it."), says("I did."),
    ]  # fmt: skip
    cases["prompt/string-content"] = [{"role": "user", "content": "Plain string"}, says("Fine")]
    cases["prompt/empty"] = [user(""), says("I see nothing.")]
    cases["prompt/several-texts"] = [user("One. ", "Two.", "\nThree"), says("Three parts.")]
    cases["prompt/long"] = [user(PROSE * 60), says("Purple.")]
    cases["prompt/none"] = [says("Nobody asked.")]
    return cases
