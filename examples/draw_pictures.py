"""Draw the pictures of the best-of-N notebook: two to ask about, and a card of ranked answers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

SHAPES = ("crimson", "teal", "crimson", "crimson", "teal")
INK, MUTED, TRACK, BEST, OTHER = "#222222", "#666666", "#eeeeee", "#0f766e", "#9ca3af"
CARD, MARGIN, PICTURE, ROW = 760, 20, 260, 36  # widths and heights in pixels


def draw_shapes() -> Image.Image:
    """Draw three red circles and two green squares in a row."""
    image = Image.new("RGB", (560, 392), "white")
    pen = ImageDraw.Draw(image)
    for index, colour in enumerate(SHAPES):
        x, y = 40 + index * 102, 160 + 50 * (index % 2)
        draw = pen.ellipse if colour == "crimson" else pen.rectangle
        draw([x, y, x + 70, y + 70], fill=colour)
    return image


def draw_clock(hour: int = 10, minute: int = 10) -> Image.Image:
    """Draw a clock's face with two hands."""
    image = Image.new("RGB", (392, 392), "white")
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(24)
    pen.ellipse([26, 26, 366, 366], outline=INK, width=5)
    for number in range(1, 13):
        pen.text(_around(number / 12, 142), str(number), fill=INK, font=font, anchor="mm")
    for turn, length, width in ((hour / 12 + minute / 720, 80, 9), (minute / 60, 116, 5)):
        pen.line([(196, 196), _around(turn, length)], fill=INK, width=width)
    return image


def _around(turn: float, distance: float) -> tuple[float, float]:
    """Return the point at so many turns, clockwise from the top, around the clock's centre."""
    angle = 2 * math.pi * turn
    return 196 + distance * math.sin(angle), 196 - distance * math.cos(angle)


def draw_ranking(
    picture: Image.Image, question: str, answers: Sequence[str], scores: Sequence[float]
) -> Image.Image:
    """Draw a picture beside its answers, best first, each with its score and a bar.

    A bar's length is the score's distance from the lowest one: the best has a whole bar, the worst
    none.

    Args:
        picture: what was asked about.
        question: one line.
        answers: one line each.
        scores: of the answers.
    """
    small = picture.resize((PICTURE, PICTURE * picture.height // picture.width))
    height = max(small.height, 16 + ROW * len(answers)) + 3 * MARGIN + 20
    card = Image.new("RGB", (CARD, height), "white")
    pen = ImageDraw.Draw(card)
    pen.text((MARGIN, MARGIN), question, fill=INK, font=ImageFont.load_default(18))
    top = 2 * MARGIN + 20
    card.paste(small, (MARGIN, top))
    font = ImageFont.load_default(15)
    left, right = 2 * MARGIN + PICTURE, CARD - MARGIN
    low, high = min(scores), max(scores)
    order = sorted(range(len(answers)), key=lambda index: -scores[index])
    for place, index in enumerate(order):
        y = top + place * ROW
        share = (scores[index] - low) / (high - low) if high > low else 1.0
        colour = BEST if place == 0 else OTHER
        pen.text((left, y), answers[index], fill=INK if place == 0 else MUTED, font=font)
        pen.text((right, y), f"{scores[index]:.3f}", fill=INK, font=font, anchor="ra")
        pen.rectangle([left, y + 21, right, y + 26], fill=TRACK)
        if share:
            pen.rectangle([left, y + 21, left + share * (right - left), y + 26], fill=colour)
    return card
