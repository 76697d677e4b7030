"""An uploaded file names images; no other file of the machine may be read for it."""

from __future__ import annotations

import base64
import os
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.evaluations import bars
from triward_tools.playground import gallery
from triward_tools.playground.gallery import Gallery

SHOWN = "image of 640 x 400 pixels"


@pytest.fixture
def folder(tmp_path):
    """A folder of images beside a secret, which is an image so that it could be shown."""
    (tmp_path / "images" / "deep").mkdir(parents=True)
    (tmp_path / "images" / "a.png").write_bytes(bars(1))
    (tmp_path / "images" / "deep" / "b.png").write_bytes(bars(2))
    (tmp_path / "secret.png").write_bytes(bars(3))
    return tmp_path / "images"


def words(value, folder=None):
    part = Gallery(folder).show(value)
    assert part.source == ""
    return part.text


class TestShown:
    @pytest.mark.parametrize(
        "value",
        [
            bars(1),
            {"bytes": bars(1), "path": None},
            {"bytes": bars(1), "path": "/etc/passwd"},
            "data:image/png;base64," + base64.b64encode(bars(1)).decode(),
        ],
        ids=["bytes", "struct", "struct with a path", "data URL"],
    )
    def test_what_the_file_holds(self, value):
        part = Gallery().show(value)
        assert part.text == SHOWN and part.source.startswith("data:image/jpeg;base64,")

    def test_what_lies_below_the_folder(self, folder):
        names = ["a.png", "./a.png", "deep/b.png", str(folder / "a.png"), "deep//b.png"]
        shown = [Gallery(folder).show(name).text for name in names]
        assert shown == [SHOWN] * len(names)
        assert Gallery(folder).show({"bytes": None, "path": "a.png"}).text == SHOWN

    def test_a_link_inside_to_the_inside(self, folder):
        (folder / "c.png").symlink_to("deep/b.png")
        assert Gallery(folder).show("c.png").text == SHOWN

    def test_the_folder_may_be_a_link(self, folder, tmp_path):
        (tmp_path / "link").symlink_to(folder)
        assert Gallery(tmp_path / "link").show("a.png").text == SHOWN
        assert Gallery(tmp_path / "link").show(str(folder / "a.png")).text == SHOWN


class TestRefused:
    @pytest.mark.parametrize("name", ["a.png", "/etc/passwd", "../secret.png", "~/a.png"])
    def test_every_path_without_a_folder(self, folder, monkeypatch, name):
        monkeypatch.chdir(folder)
        assert "start the playground with --images FOLDER" in words(name)

    def test_paths_that_lead_out(self, folder, tmp_path):
        for name in ("../secret.png", "deep/../../secret.png", "deep/../a.png"):
            assert "holds '..', which leads out of a folder" in words(name, folder)
        for name in (tmp_path / "secret.png", "/etc/passwd", f"{folder}-not", folder.parent):
            assert "is not below the folder of --images" in words(str(name), folder)

    def test_links_that_lead_out(self, folder, tmp_path):
        (folder / "out.png").symlink_to(tmp_path / "secret.png")
        (folder / "up").symlink_to(tmp_path)
        (folder / "relative.png").symlink_to("../secret.png")
        for name in ("out.png", "up/secret.png", "relative.png"):
            assert "is not below the folder of --images" in words(name, folder)

    def test_files_outside_tell_nothing_about_themselves(self, folder, tmp_path):
        """Whether a file is there is nothing that the page's visitor may learn."""
        there, not_there = (
            re.sub("'.*'", "", words(str(tmp_path / name), folder)) for name in ("secret.png", "no")
        )
        assert there == not_there

    @pytest.mark.parametrize(
        "url", ["http://127.0.0.1:1/a.png", "HTTPS://a.org/a.png", "file:///etc/passwd",
                "file:a.png", "ftp://a.org/a.png"],
    )  # fmt: skip
    def test_urls(self, folder, url):
        assert "is a URL, which the playground does not fetch" in words(url, folder)

    def test_what_is_no_picture(self, folder):
        (folder / "text.png").write_text("root:x:0:0")
        (folder / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
        assert (
            words("text.png", folder)
            == "image, not shown: cannot be decoded (UnidentifiedImageError)"
        )
        assert "cannot be decoded" in words("page.eps", folder)
        assert "'gone.png': No such file" in words("gone.png", folder)
        assert "is no regular file" in words("deep", folder)
        os.mkfifo(folder / "pipe")
        assert "is no regular file" in words("pipe", folder)
        assert "not a path" in words("a\0b", folder)
        (folder / "loop").symlink_to("loop")
        assert words("loop", folder).startswith("image, not shown: 'loop'")
        assert "File name too long" in words("x" * 5000, folder)

    @pytest.mark.parametrize(
        ("value", "sentence"),
        [
            (None, "must be bytes, a data: URL or a path, got no value"),
            (17, "must be bytes, a data: URL or a path, got int"),
            ({"bytes": None, "path": None}, "got no value"),
            ({"path": {"path": "a"}}, "its struct holds another struct"),
            (b"", "holds 0 bytes"),
            ("data:image/png;base64,!", "a data URL holds invalid base64"),
            (bars(0)[:200], "image, not shown: OSError"),
        ],
    )
    def test_what_cannot_be_shown_has_words(self, value, sentence):
        assert sentence in words(value)

    def test_too_many_bytes(self, folder, monkeypatch):
        monkeypatch.setattr(gallery, "IMAGE_BYTES", 100)
        monkeypatch.setattr(Path, "read_bytes", None)  # a large file is not read to be refused
        for value in (bars(1), "a.png"):
            assert re.search(r"has [\d,]+ bytes, at most 100 are read", words(value, folder))

    def test_too_many_pixels(self, tmp_path):
        Image.new("1", (8001, 8001)).save(tmp_path / "large.png")
        assert "has 8001 x 8001 pixels, at most 64,000,000 are decoded" in words(
            "large.png", tmp_path
        )
