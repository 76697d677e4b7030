"""Imports and docstrings of a package, for the tests of its architecture."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path


def modules(package: Path) -> dict[str, Path]:
    """Name without the package's -> file; an `__init__.py` has its folder's name."""
    files = sorted(package.rglob("*.py"))
    parts = {path: path.relative_to(package).with_suffix("").parts for path in files}
    return {".".join(name).removesuffix("__init__").strip("."): p for p, name in parts.items()}


def imported(path: Path) -> set[str]:
    """Full names of what a file imports, anywhere in it but for types alone."""
    names = set[str]()
    for node in _nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}: relative imports hide who is meant"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def below(package: Path, order: list[str]) -> list[str]:
    """Every import of a module that does not stand above, as "a -> b"; an empty list is right."""
    places = {f"{package.name}.{name}": place for place, name in enumerate(order)}
    files = modules(package)
    return [
        f"{name} -> {other}"
        for place, name in enumerate(order)
        for other in sorted(imported(files[name]))
        if places.get(other, -1) >= place
    ]


def vague(package: Path) -> list[str]:
    """Docstrings that open with a pronoun, where an imperative or a noun phrase is asked for."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    openings = {"What", "Whether", "Of", "Those", "Who", "Which", "Why", "How", "Where"}
    found = []
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = ast.get_docstring(node) if isinstance(node, documented) else None
            if text and text.split()[0] in openings:
                found.append(f"{path.name}: {text.splitlines()[0]}")
    return found


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _nodes(child)
