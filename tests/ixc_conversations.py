"""Conversations about images and videos by the rules of IXC-2.5-Reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.conversations import PROSE, RESPONSES, Messages, image, image_files, picture, says, user
from tests.videos import film, frames

PLACE = "<ImageHere>"
# Of width and height, tiles 56 pixels wide: one, wide, tall, tiny, flat, all nine and more.
SIZES = (
    (56, 56), (57, 56), (10, 10), (1, 1), (400, 60), (60, 400), (504, 1), (1, 504), (168, 168),
    (333, 777), (2000, 1400), (113, 112),
)  # fmt: skip
# Frames of films; those of one in a second are all shown, up to 32.
FILMS = {
    "1": (1, 1, 64, 48), "2": (2, 1, 64, 48), "5-tall": (5, 1, 48, 64), "6-square": (6, 1, 48, 48),
    "20-of-8": (20, 8, 64, 48), "31": (31, 1, 64, 48), "32": (32, 1, 64, 48),
    "33": (33, 1, 64, 48), "40": (40, 1, 64, 48), "40-tall": (40, 1, 36, 64),
}  # fmt: skip


def ixc_conversations(folder: Path) -> dict[str, Messages]:
    """At least 60, by name; each ends with the response that is scored."""
    cases: dict[str, Messages] = {
        f"text/{name}": [user("Is purple the highest value?"), says(text)]
        for name, text in RESPONSES.items()
        if name != "4000-tokens"
    }
    cases["text/long"] = [user(PROSE * 30), says(PROSE * 20)]
    cases["text/none"] = [says("Nobody asked.")]
    cases["text/place-in-response"] = [user("Where?"), says(f"Here: {PLACE}")]
    system = {"role": "system", "content": " You are a strict judge.\n"}
    cases["text/system"] = [system, user("Is 2 + 2 = 5?"), says("No.")]
    cases["text/turns"] = [
        message
        for turn in range(5)
        for message in (user(f"Question {turn}?"), says(f"Answer {turn}."))
    ]

    def saved(width: int, height: int, seed: int) -> str:
        path = folder / f"{width}x{height}-{seed}.png"
        picture(width, height, seed).save(path)
        return str(path)

    for width, height in SIZES:
        part = image(saved(width, height, 5))
        cases[f"size/{width}x{height}"] = [user(part, "What is shown?"), says("A gradient.")]
    photo = saved(640, 480, 6)
    for tiles in (1, 4, 24):
        cases[f"tiles/{tiles}"] = [user(image(photo, hd_num=tiles), "What?"), says("Bars.")]
    for name in ("photo.jpg", "rgba.png", "palette-transparent.png", "16-bit.png", "animated.gif"):
        path = image_files(folder / "formats")[name]
        cases[f"format/{name}"] = [user(image(str(path)), "What?"), says("A chart.")]
    return cases | _places(photo, saved) | _videos(folder, photo)


def _places(photo: str, saved: Any) -> dict[str, Messages]:
    several = [image(saved(84 * n, 300 - 40 * n, n)) for n in range(1, 5)]
    listed = [f"Image{n} {PLACE}; " for n in range(1, 5)]
    cases: dict[str, Messages] = {
        f"images/{n}": [user(*several[:n], *listed[:n], "compare."), says("They differ.")]
        for n in (2, 3, 4)
    }
    one, two = several[:2]
    cases["places/one"] = [user(one, f"Before {PLACE} behind"), says("Yes.")]
    cases["places/last"] = [user("Look.", one, PLACE), says("Seen.")]
    cases["places/adjacent"] = [user(one, two, f"{PLACE}{PLACE}"), says("Both.")]
    cases["places/split"] = [user(one, f"{PLACE[:4]}", PLACE[4:], " what?"), says("This.")]
    cases["places/system"] = [
        {"role": "system", "content": f"As in {PLACE}."}, user(one, "Judge."), says("Good."),
    ]  # fmt: skip
    cases["places/turns"] = [
        user(one, f"What is {PLACE}?"), says("A gradient."), user(two, f"And\n{PLACE}\n?"),
        says("Another one."),
    ]  # fmt: skip
    cases["places/in-an-answer"] = [
        user("Draw."), says(f"Here: {PLACE}"), user(one, two, f"Not {PLACE} but {PLACE}?"),
        says("No."),
    ]  # fmt: skip
    cases["places/in-response-too"] = [user(image(photo), "What?"), says(f"As {PLACE} shows.")]
    cases["places/same-twice"] = [user(one, one, f"{PLACE} and {PLACE}, same?"), says("Yes.")]
    cases["turns/single-image-in-front"] = [
        user("Hello"), says("Hi."), user("And this?", two), says("A gradient."),
    ]  # fmt: skip
    return cases


def _videos(folder: Path, photo: str) -> dict[str, Messages]:
    def clip(name: str) -> dict[str, Any]:
        count, rate, width, height = FILMS[name]
        path = folder / f"film-{name}.mp4"
        return {"type": "video", "video": film(path, count, width, height, rate)}

    cases: dict[str, Messages] = {
        f"video/{name}": [user(clip(name), "What moves?"), says("A block.")] for name in FILMS
    }
    for count, width, height in ((1, 64, 48), (7, 64, 48), (4, 48, 64)):
        listed = {"type": "video", "video": frames(count, width, height)}
        cases[f"video/list-{count}-{width}"] = [user(listed, "What moves?"), says("It does.")]
    cases["video/with-image"] = [
        user(clip("2"), image(photo), f"Is {PLACE} part of {PLACE}?"), says("No."),
    ]  # fmt: skip
    return cases
