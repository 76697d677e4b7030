"""Examples that the commands' help shows."""

from __future__ import annotations

PROGRAM = "triward-server"

# Command -> arguments of each example.
ARGUMENTS = {
    "serve": (
        "--repository skywork",
        "--repository skywork --tls-certificate server.pem --tls-key server.key",
    ),
    "health": ("--deep --repository skywork",),
    "models": ("--http-port 8000",),
    "load": ("judge",),
    "unload": ("judge",),
    "switch": ("2 --repository skywork",),
    "export": (
        "--checkpoint Skywork/Skywork-VL-Reward-7B --output skywork",
        "--checkpoint tiny --output models --device cpu --dtype float32",
    ),
    "make-checkpoint": ("--size tiny --output tiny",),
    "export-onnx": ("--checkpoint tiny --output graphs",),
    "verify": ("--checkpoint tiny --small",),
    "plan": (
        "--gpus 8xH100 --requests-per-second 20 --prompt-tokens 300 --responses 8 --images 1",
        "--gpus cpu --model small --requests-per-second 0.5 --prompt-tokens 300 --json",
    ),
}
_COLUMNS = 76  # of a terminal's 80: typer indents by 2, and so does this


def epilog(command: str, script: str | None = None) -> str:
    """Return the examples of a command as its help shows them.

    Args:
        command: of `triward-server`.
        script: a file that is this command; None: it is given by its name.
    """
    program = f"python {script}" if script else f"{PROGRAM} {command}"
    return example_lines([f"{program} {arguments}" for arguments in ARGUMENTS[command]])


def example_lines(commands: list[str]) -> str:
    r"""Return lines that typer leaves as they are, behind \b; long ones continue behind \."""
    head = "Example:" if len(commands) == 1 else "Examples:"
    return "\n".join(["\b", head, *map(_continued, commands)])


def _continued(command: str) -> str:
    first, *options = f"  {command}".split(" --")
    lines = [first]
    for option in options:
        if len(lines[-1]) + len(option) + len(" -- \\") <= _COLUMNS:
            lines[-1] += f" --{option}"
        else:
            lines.append(f"      --{option}")
    return " \\\n".join(lines)
