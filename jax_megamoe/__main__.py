"""The command line: `python -m jax_megamoe COMMAND`, and without one a list of the commands."""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax

from jax_megamoe import __version__


class Command(NamedTuple):
    """A command: what it does, and the module whose `main(arguments)` does it and returns the exit status."""

    help: str
    module: str


COMMANDS = {
    "doctor": Command("say how moe will run on this machine, and try it", "jax_megamoe.doctor"),
    "convert": Command(
        "pack the experts of a checkpoint once, so that later starts only map and copy them",
        "jax_megamoe.checkpoints.command",
    ),
    "peers": Command("check and time the wires between the GPUs of an expert axis", "jax_megamoe.peers"),
    "demo": Command("train a small model, quantise its experts and decode with moe", "jax_megamoe.demo.__main__"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status, or 2 for a name that is none."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(__version__)
        return 0
    if name not in COMMANDS:
        print(f"error: the command is {name!r}, wanted one of {', '.join(COMMANDS)}: choose one.", file=sys.stderr)
        return 2
    # Only now: another command's modules may be slow to import.
    command = importlib.import_module(COMMANDS[name].module)
    try:
        status: int = command.main(arguments)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # Who reads has seen enough. What is left goes nowhere, also at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (AssertionError, RuntimeError):
        if (problem := _why_no_devices()) is None:
            raise
        print(
            f"error: JAX has no devices ({problem}), wanted some: see JAX_PLATFORMS, or what `python -m jax_megamoe "
            "doctor` says.",
            file=sys.stderr,
        )
        return 1
    return status


def _why_no_devices() -> str | None:
    try:
        jax.devices()
    except Exception as error:  # of whichever backend
        return (str(error).splitlines() or [type(error).__name__])[0] or type(error).__name__
    return None


def usage() -> str:
    """The commands, a line each."""
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: python -m jax_megamoe COMMAND [arguments]; COMMAND --help tells them",
            "       python -m jax_megamoe --version",
            "",
            *(f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
