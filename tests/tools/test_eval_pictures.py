"""What a report shows besides text: small pictures, and charts."""

from __future__ import annotations

import base64
import io
import re

import pytest
from PIL import Image

from tests.evaluations import bars, results_of
from triward_tools.evaluation.charts import calibration_chart, margin_chart
from triward_tools.evaluation.pictures import thumbnail, turns
from triward_tools.evaluation.results import Result
from triward_tools.evaluation.statistics import calibration
from triward_tools.evaluation.wording import PAIRS


class TestPictures:
    def opened(self, part):
        assert part.source.startswith("data:image/jpeg;base64,")
        return Image.open(io.BytesIO(base64.b64decode(part.source.partition(",")[2])))

    def test_is_made_small(self):
        part = thumbnail(bars(0, (1200, 900)))
        assert self.opened(part).size == (480, 360)
        assert part.text == "image of 1200 x 900 pixels"

    def test_small_one_stays(self):
        assert self.opened(thumbnail(bars(0, (50, 40)))).size == (50, 40)

    def test_path_and_data_url(self, tmp_path):
        path = tmp_path / "a.png"
        path.write_bytes(bars(3))
        url = "data:image/png;base64," + base64.b64encode(bars(3)).decode()
        assert thumbnail(str(path)) == thumbnail(path) == thumbnail(url) == thumbnail(bars(3))

    def test_clear_parts_are_white(self):
        packed = io.BytesIO()
        Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(packed, "PNG")
        assert self.opened(thumbnail(packed.getvalue())).getpixel((10, 10)) == (255, 255, 255)

    def test_image_url_part(self):
        url = "data:image/png;base64," + base64.b64encode(bars(1)).decode()
        [turn] = turns([{"role": "user", "content": [{"image_url": {"url": url}}]}])
        assert turn.parts[0] == thumbnail(bars(1))

    @pytest.mark.parametrize(
        ("value", "words"),
        [
            (b"", "image, not shown: MediaError"),
            (b"no image", "image, not shown: UnidentifiedImageError"),
            (bars(0)[:200], "image, not shown: OSError"),
            ("/nowhere/gone.png", "image gone.png, not shown: MediaError"),
            ("data:image/png;base64,!", "image, not shown: MediaError"),
            ("https://example.org/a.png", "image at https://example.org/a.png, not fetched"),
            (17, "image, not shown: MediaError"),
        ],
    )
    def test_words_for_what_cannot_be_shown(self, value, words):
        part = thumbnail(value)
        assert (part.text, part.source, part.is_text) == (words, "", False)

    def test_other_parts_in_words(self):
        content = [{"type": "video", "video": "a.mp4"}, {"type": "audio"}, "?", {"text": "hello"}]
        [first, second] = turns(
            [{"role": "user", "content": content}, {"role": "user", "content": 3}]
        )
        assert [p.text for p in first.parts] == [
            "video, not shown",
            "audio, not shown",
            "part of type str, not shown",
            "hello",
        ]
        assert second.parts[0].text == "content of type int, not shown"


class TestCharts:
    def test_take_their_colours_from_the_page(self):
        results = results_of("vl-rewardbench", 100)
        for chart in (margin_chart(results, PAIRS), calibration_chart(calibration(results))):
            assert chart.startswith("<svg")
            assert "var(--good)" in chart
            assert not re.search(r"#0[1-6]{5}\b", chart)
            assert "DejaVu" not in chart
            assert "<metadata" not in chart

    def test_names_differ_between_charts(self):
        results = results_of("vl-rewardbench", 100)
        both = margin_chart(results, PAIRS) + calibration_chart(calibration(results))
        names = re.findall(r'\bid="([^"]+)"', both)
        assert len(names) == len(set(names))

    @pytest.mark.parametrize("margin", [0.0, 1e-12, 1e30, -1e30])
    def test_equal_margins(self, margin):
        results = [Result(i, str(i), "povid", margin, 0.0) for i in range(5)]
        assert margin_chart(results, PAIRS).startswith("<svg")
        assert calibration_chart(calibration(results)).startswith("<svg")
