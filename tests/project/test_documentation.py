"""README, pages, site and GitHub's files: links, figures, commands, and what a browser shows."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import tomllib
import yaml

from tests import chromium
from tests.chromium import STICKING_OUT, sideways
from tests.conftest import ROOT
from tests.project.test_architecture import ROOMS

browser, page = chromium.browser, chromium.page

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = ROOT / "docs"
GITHUB = ROOT / ".github"
RESULTS = ROOT / "benchmarks" / "results"
PAGES = sorted(
    p for g in ("*.md", "client/*.md", "tools/*.md", "docs/**/*.md", ".github/**/*.md")
    for p in ROOT.glob(g)
)  # fmt: skip
INSIDE = STICKING_OUT.replace("body *", ".md-content *")  # the theme's menus wait outside
_FENCED = re.compile(r"^ *```.*?^ *```$", re.DOTALL | re.MULTILINE)


def slug(heading: str) -> str:
    """Return the anchor that GitHub and the site give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "")).strip().lower().replace(" ", "-")


def links(text: str) -> list[tuple[str, str]]:
    """Return path and anchor of each link to another file or place of the repository."""
    found = re.findall(r"\]\(([^)\s]+)\)|(?:href|src)=\"([^\"]+)\"", _FENCED.sub("", text))
    inside = [a or b for a, b in found if not re.match(r"[a-z]+:", a or b)]
    return [(path, anchor) for path, _, anchor in (link.partition("#") for link in inside)]


def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


class TestReadme:
    def test_it_is_short(self) -> None:
        assert len(README.splitlines()) <= 120
        assert len(README.split()) <= 900

    def test_the_first_screen_says_how_to_install_the_client(self) -> None:
        assert "pip install ./client" in "\n".join(README.splitlines()[:15])


class TestLinks:
    @pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
    def test_each_leads_somewhere(self, path: Path) -> None:
        for target, anchor in links(path.read_text(encoding="utf-8")):
            file = (path.parent / target).resolve() if target else path
            assert file.exists(), target
            if anchor:
                headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in map(slug, headings), f"{target}#{anchor}"

    def test_named_files_exist(self) -> None:
        for path in PAGES:
            if path.name == "CHANGELOG.md" or path.parent.name == "integrations":
                continue  # of the past; or files of other projects
            named = re.findall(
                r"`((?:tests|benchmarks|docker|export)/[\w./-]+\.(?:py|json|ya?ml))`",
                path.read_text(encoding="utf-8"),
            )
            assert [file for file in named if not (ROOT / file).exists()] == [], path

    def test_evidence_is_tests_that_exist(self) -> None:
        text = (DOCS / "evidence.md").read_text(encoding="utf-8")
        rows = [row for row in text.splitlines() if row.startswith("| ") and "`" in row]
        assert len(rows) >= 45
        assert [row for row in rows if "`tests/" not in row] == []

    def test_a_dead_one_is_found(self) -> None:
        text = "[a](gone.md#x) ![b](b.png) [c](https://example.org)\n```\nx[0](y)\n```\n"
        assert links(text) == [("gone.md", "x"), ("b.png", "")]


# How a row of a speed table begins -> its workload in the file.
WORKLOADS = {
    "16 single conversations, each with an image": "singles",
    "16 single conversations, text only": "text-only",
    "16 single conversations": "text-only",
    "2 responses": "group-2",
    "8 responses, as eight requests": "separate-8",
    "8 responses": "group-8",
    "16 responses": "group-16",
    "64 responses": "group-64",
}


class TestFigures:
    """The speed tables repeat the files under benchmarks/results/."""

    def measured(self, text: str, file: str) -> dict[str, tuple[list[str], Any]]:
        """Map each row of a table to its cells and its workload in the file."""
        workloads = json.loads((RESULTS / file).read_text())["workloads"]
        table = [line.strip("|").split("|") for line in text.splitlines() if line[:2] == "| "]
        rows = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in table}
        names = {
            title: next((n for begin, n in WORKLOADS.items() if title.startswith(begin)), "")
            for title in rows
        }
        return {title: (rows[title], workloads[name]) for title, name in names.items() if name}

    def test_the_readmes(self) -> None:
        text = README.split("\n## Speed\n")[1].split("\n## ")[0]
        rows = self.measured(text, "2026-11-27-cpu-small.json")
        assert len(rows) == 4
        for title, (cells, workload) in rows.items():
            speedup = workload["paths"]["served, over gRPC"]["speedup"]
            assert cells == ["1", f"**{speedup:.2f}×**"], title

    @pytest.mark.parametrize(
        ("section", "file", "count"),
        [
            ("Multimodal, on a CPU", "2026-11-27-cpu-small.json", 7),
            ("Text, on a CPU", "2026-11-27-cpu-small-qwen3.json", 4),
        ],
    )
    def test_the_pages(self, section: str, file: str, count: int) -> None:
        text = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
        rows = self.measured(text.split(f"\n## {section}\n")[1].split("\n## ")[0], file)
        assert len(rows) == count
        for title, (cells, workload) in rows.items():
            [first, *others] = workload["paths"].values()
            found = re.findall(r"([\d.]+)×", " ".join(cells[1:-1]))
            assert cells[0] == f"1 ({first['conversations_per_s']:.2f}/s)", title
            assert found == [f"{path['speedup']:.2f}" for path in others], title

    def test_vllm_beside_triward(self) -> None:
        text = (DOCS / "benchmarks.md").read_text(encoding="utf-8").split("\n## Beside vLLM")[1]
        lines = text.split("\n## ")[0].replace("**", "").splitlines()
        table = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in lines if "–" in line
        ]
        expected: dict[str, list[str]] = {}
        for dtype in ("float32", "bfloat16"):
            found = json.loads((RESULTS / f"2026-11-27-peers-{dtype}.json").read_text())["rows"]
            for step, values in found.items():
                for column in ("offline", "served"):
                    ratios = values["columns"][column]["peer_time_over_ours"]
                    cell = f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
                    expected.setdefault(step, []).append(cell)
        assert {step: cells for step, *cells in table} == expected


class TestGitHub:
    def check(self, schema: str, *files: Path) -> None:
        command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *files]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    def test_workflows_and_forms_fit_their_schemas(self) -> None:
        self.check("vendor.github-workflows", *(GITHUB / "workflows").glob("*.yml"))
        self.check("vendor.github-issue-config", GITHUB / "ISSUE_TEMPLATE" / "config.yml")
        forms = [p for p in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if p.name != "config.yml"]
        assert forms
        self.check("vendor.github-issue-forms", *forms)

    def test_a_wrong_workflow_is_found(self, tmp_path: Path) -> None:
        (tmp_path / "bad.yml").write_text("on: push\njobs: {test: {runs-on: x, step: []}}\n")
        with pytest.raises(AssertionError):
            self.check("vendor.github-workflows", tmp_path / "bad.yml")

    def test_it_runs_what_ci_runs(self) -> None:
        workflow = (GITHUB / "workflows" / "ci.yml").read_text()
        run = set(re.findall(r"^make ([\w-]+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE))
        called = set(re.findall(r"\bmake ([\w-]+)", workflow))
        assert run <= called <= make_targets()

    def test_pre_commit_has_linters_as_make_lint_runs_them(self) -> None:
        config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
        entries = {hook["entry"] for repo in config["repos"] for hook in repo["hooks"]}
        makefile = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
        assert entries == {line.replace("$(BIN)", ".venv/bin") for line in commands(makefile)}


def commands(rule: str) -> list[str]:
    return [line.strip() for line in rule.splitlines() if line.startswith("\t")]


def test_named_targets_exist() -> None:
    for path in PAGES:
        if path.name != "CHANGELOG.md":
            named = re.findall(r"(?:^|`)make ([a-z][\w-]*)", path.read_text("utf-8"), re.MULTILINE)
            assert set(named) <= make_targets(), path


def test_the_picture_draws_the_rooms_in_their_order() -> None:
    picture = (DOCS / "images" / "rooms.svg").read_text(encoding="utf-8")
    rooms = [room for room in ROOMS if room not in ("", "commands")]
    drawn = re.findall(r">(\w+)/<", picture)
    assert [name for name in drawn if name != "model_repository"] == rooms


def test_packages_name_their_pythons_and_home() -> None:
    for path in ROOT.glob("**/pyproject.toml"):
        if ".venv" in path.parts:
            continue
        project = tomllib.loads(path.read_text())["project"]
        assert {"Source", "Issues", "Documentation", "Changelog"} <= set(project["urls"]), path
        assert any(c.endswith("Python :: 3.10") for c in project["classifiers"]), path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built documentation."""
    folder = tmp_path_factory.mktemp("site")
    build(ROOT / "mkdocs.yml", folder)
    return folder


def build(config: Path, folder: Path) -> None:
    """Build with every warning an error: dead links and anchors, pages in no navigation."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", config, "-d", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        raise RuntimeError(done.stdout + done.stderr)


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """A web server for the site on this machine."""
    handler = partial(Quiet, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


class TestSite:
    def test_it_has_every_page_and_the_api(self, site: Path) -> None:
        for path in DOCS.glob("**/*.md"):
            assert (site / path.relative_to(DOCS).with_suffix("") / "index.html").is_file(), path
        reference = (site / "reference" / "client" / "index.html").read_text(encoding="utf-8")
        for name in ("RewardClient.score_responses", "AsyncRewardClient.score_many"):
            assert f'id="triward.{name}"' in reference

    def test_it_names_no_other_host_to_load_from(self, site: Path) -> None:
        pattern = re.compile(r"<(?:script|img|iframe)[^>]+src=\"(?:https?:)?//|<link[^>]+//fonts")
        assert [p for p in site.glob("**/*.html") if pattern.search(p.read_text("utf-8"))] == []

    @pytest.mark.parametrize("link", ["gone.md", "client.md#gone", "../tests/gone.py"])
    def test_a_dead_link_fails_the_build(self, link: str, tmp_path: Path) -> None:
        (tmp_path / "docs").mkdir()
        shutil.copy(ROOT / "mkdocs.yml", tmp_path)
        for path in (*ROOT.iterdir(), *DOCS.iterdir()):
            if path not in (DOCS, ROOT / "mkdocs.yml", DOCS / "evidence.md"):
                (tmp_path / path.relative_to(ROOT)).symlink_to(path)
        text = (DOCS / "evidence.md").read_text(encoding="utf-8")
        (tmp_path / "docs" / "evidence.md").write_text(f"{text}\n[dead]({link})\n", "utf-8")
        with pytest.raises(RuntimeError, match=re.escape(link)):
            build(tmp_path / "mkdocs.yml", tmp_path / "site")


@pytest.mark.slow
class TestBrowser:
    @pytest.mark.parametrize("path", ["", "operations/", "reference/client/"])
    def test_it_fits_and_loads_from_nowhere_else(self, path: str, page: Any, address: str) -> None:
        page.goto(address + path, wait_until="networkidle")
        assert sideways(page) <= 0
        assert page.evaluate(INSIDE) == []
        assert page.complaints == []
        assert [url for url in page.addresses if not url.startswith((address, "data:"))] == []
        shown = page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 0)")
        assert all(shown)
        page.add_style_tag(content=".md-content p { width: 1400px }")  # a control
        assert page.evaluate(INSIDE) != []

    def test_search_finds_a_page(self, page: Any, address: str) -> None:
        page.goto(address, wait_until="networkidle")
        page.keyboard.press("/")
        page.keyboard.type("embedding cache")
        page.wait_for_selector(".md-search-result__item a")
        assert page.complaints == []
        assert [url for url in page.addresses if not url.startswith((address, "data:"))] == []
