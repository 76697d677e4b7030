"""Run `make demo` and `triward score`, and draw what they print: `make recording`.

The result, docs/images/demo.svg, is a terminal whose lines appear one after the other. Waits are
shortened, and the address of the server is the one that a reader would have. The picture holds no
script, no font and no address of another host, so GitHub shows it as it is.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from local_server import ROOT, local_server
from rich.cells import cell_len
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import TerminalTheme
from rich.text import Text

PICTURE = ROOT / "docs" / "images" / "demo.svg"
ADDRESS = "localhost:8001"
COLUMNS = 76
SCORE = (
    f"triward score --url {ADDRESS} --image examples/chart.png \\\n"
    '    --prompt "Is Purple the highest value?" \\\n'
    '    --response "Yes, at 86." --response "No."'
)
_CHARACTER, _LINE, _EDGE, _SIZE = 8.4, 19, 16, 14  # pixels; a character is 0.6 of its size
_STEP = re.compile(r"\d/\d ")  # what is waited for
_INK, _MUTED, _PAGE = "#e6edf3", "#8b949e", "#0d1117"
_THEME = TerminalTheme(
    (13, 17, 23),
    (230, 237, 243),
    [(72, 79, 88), (255, 123, 114), (63, 185, 80), (210, 153, 34),
     (88, 166, 255), (188, 140, 255), (57, 197, 207), (177, 186, 196)],
)  # fmt: skip
_STYLE = """\
text { font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre; }
.bold { font-weight: 600; }
g { animation: appear 1ms backwards; }
@keyframes appear { from { opacity: 0; } }
@media (prefers-reduced-motion: reduce) { g { animation: none; } }"""


def main() -> None:
    """Run the commands and write the picture."""
    lines = list(_asked("make demo"))
    lines += printed([sys.executable, "examples/demo.py"])
    lines += [Text(), Text(f"# a server runs at {ADDRESS}", style="dim")]
    with local_server() as server:
        lines += _asked(SCORE)
        lines += printed(score_command(server.url))
    PICTURE.write_text(draw(lines), encoding="utf-8")
    print(PICTURE.relative_to(ROOT), f"{PICTURE.stat().st_size / 1000:.0f} kB")


def _asked(command: str) -> Iterator[Text]:
    """Yield the lines of a command behind a shell's prompt."""
    first, *others = command.splitlines()
    yield Text.assemble(("$ ", "green"), (first, "bold"))
    yield from (Text.assemble((line, "bold")) for line in others)


def score_command(url: str) -> list[str]:
    """Return the words of `SCORE`, for a server at another address."""
    program, *arguments = shlex.split(SCORE.replace("\\\n", "").replace(ADDRESS, url))
    return [str(Path(sys.executable).with_name(program)), *arguments]


def printed(command: Sequence[str]) -> list[Text]:
    """Run a command in a terminal of its own, and return the lines that it prints.

    Raises:
        CalledProcessError: it failed; its output is in it.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS)}
    with os.fdopen(ours, "rb", 0) as terminal:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs
        )
        os.close(theirs)
        output = b"".join(_chunks(terminal.fileno())).decode().replace("\r\n", "\n")
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, list(command), output)
    text = Text.from_ansi(re.sub(r"127\.0\.0\.1:\d+", ADDRESS, output))
    return list(text.split("\n"))


def _chunks(descriptor: int) -> Iterator[bytes]:
    """Yield what comes, until the other side of the terminal is closed."""
    while True:
        try:
            chunk = os.read(descriptor, 65536)
        except OSError:  # Linux says EIO in place of an end
            return
        if not chunk:
            return
        yield chunk


def draw(lines: Sequence[Text]) -> str:
    """Return an SVG of the lines, which appear one after the other and then stay."""
    width = COLUMNS * _CHARACTER + 2 * _EDGE
    height = len(lines) * _LINE + 2 * _EDGE
    label = escape(next(line.plain for line in lines), quote=True)
    frame = f'width="{width - 1:g}" height="{height - 1:g}" rx="8" fill="{_PAGE}" stroke="#30363d"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" fill="{_INK}" '
        f'role="img" aria-label="A terminal: {label}">', f"<style>{_STYLE}</style>",
        f'<rect x="0.5" y="0.5" {frame}/>',
    ]  # fmt: skip
    moment = 0.0
    for row, line in enumerate(lines):
        moment += _wait(line.plain)
        if spans := "".join(_spans(line, _EDGE + row * _LINE + _SIZE)):
            parts.append(f'<g style="animation-delay: {moment:.2f}s">{spans}</g>')
    return "\n".join([*parts, "</svg>", ""])


def _wait(line: str) -> float:
    """Seconds before a line appears."""
    return 0.8 if line.startswith("$") or _STEP.match(line) else 0.1


def _spans(line: Text, y: float) -> Iterator[str]:
    """Yield each stretch of one style; its length is told, so that columns stand in any font."""
    column = 0
    for segment in line.render(Console(width=COLUMNS)):
        cells = cell_len(segment.text)
        if segment.text.strip():
            x = _EDGE + column * _CHARACTER
            place = f'x="{x:.1f}" y="{y:g}" textLength="{cells * _CHARACTER:.1f}"'
            yield f"<text {place}{_attributes(segment.style)}>{escape(segment.text)}</text>"
        column += cells


def _attributes(style: Style | None) -> str:
    if style is None:
        return ""
    colour = _INK
    if style.color and not style.color.is_default:
        colour = style.color.get_truecolor(_THEME).hex
    elif style.dim:
        colour = _MUTED
    return (' class="bold"' if style.bold else "") + f' fill="{colour}"' * (colour != _INK)


if __name__ == "__main__":
    main()
