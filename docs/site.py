"""Hooks of the documentation site: pages from the repository's root, and links that leave `docs/`.

The pages are written for GitHub, where links are paths in the repository. A link to a file that is
no page becomes a link to the repository; an image is copied into the site. A link to nothing is
left as it is, so that mkdocs reports it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
_SOURCES = {page: source for source, page in PAGES.items()}
_FENCED = re.compile(r"(^ *```.*?^ *```$)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that stand outside `docs/`."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the page's links, except inside code blocks."""
    here = page.file.src_uri
    folder = posixpath.dirname(_SOURCES.get(here, f"docs/{here}"))

    def rewrite(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[1]))
        return _address(target, here, config, files) or link[1]

    parts = _FENCED.split(markdown)
    parts[::2] = [_LINK.sub(rewrite, text) for text in parts[::2]]
    return "".join(parts)


def _address(target: str, here: str, config: MkDocsConfig, files: Files) -> str | None:
    """Return where a path of the repository is found from a page, or None if it does not exist."""
    if not (ROOT / target).exists():
        return None
    if target in PAGES:
        inside = PAGES[target]
    elif target.startswith("docs/"):
        inside = target.removeprefix("docs/")
    elif target.endswith((".png", ".svg")):
        inside = f"images/{posixpath.basename(target)}"
        if files.get_file_from_path(inside) is None:
            files.append(File.generated(config, inside, abs_src_path=str(ROOT / target)))
    else:
        return f"{config.extra['repository']}/blob/main/{target}"
    return posixpath.relpath(inside, posixpath.dirname(here) or ".")
