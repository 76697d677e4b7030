"""Draws `examples/chart.png`, the picture that the demo asks the model card's question about."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

BARS = {"Purple": 86, "Orange": 64, "Teal": 41, "Crimson": 73, "Olive": 22}
WIDTH, HEIGHT, LEFT, BASE, TOP = 560, 392, 60, 340, 40


def draw() -> Image.Image:
    """Draw a bar chart of five colours, each bar in the colour that its label names."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(16)
    for tick in range(0, 101, 20):
        y = BASE - tick * (BASE - TOP) // 100
        pen.line([(LEFT, y), (WIDTH - 20, y)], fill="#dddddd")
        pen.text((LEFT - 10, y), str(tick), fill="#444444", font=font, anchor="rm")
    pen.line([(LEFT, TOP), (LEFT, BASE), (WIDTH - 20, BASE)], fill="#444444", width=2)
    step = (WIDTH - 20 - LEFT) // len(BARS)
    for index, (name, value) in enumerate(BARS.items()):
        x = LEFT + index * step + step // 5
        top = BASE - value * (BASE - TOP) // 100
        pen.rectangle([x, top, x + 3 * step // 5, BASE - 1], fill=name.lower())
        pen.text((x + 3 * step // 10, BASE + 8), name, fill="#222222", font=font, anchor="ma")
    return image


if __name__ == "__main__":
    draw().save(Path(__file__).with_name("chart.png"), optimize=True)
