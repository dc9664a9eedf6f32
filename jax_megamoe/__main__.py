"""The command line: `python -m jax_megamoe COMMAND`."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, get_args

from jax_megamoe.checkpoints import convert, read_checkpoint
from jax_megamoe.errors import MegaMoEError
from jax_megamoe.weight_layout import Format


class Command(NamedTuple):
    """A command: what it does, its arguments, and the function that does it."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def _add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="a model's folder, with config.json and safetensors files")
    parser.add_argument("out", help="a new folder, or that of a run that was killed, which is gone on with")
    parser.add_argument(
        "--format", choices=get_args(Format), help="of the experts (default: what they are held in; of floats FP8)"
    )
    parser.add_argument("--quiet", action="store_true", help="print no progress")


def _convert(arguments: argparse.Namespace) -> None:
    out = convert(arguments.folder, arguments.out, format=arguments.format, progress=not arguments.quiet)
    print(f"{read_checkpoint(out)!r} is complete: pass {str(out)!r} to jax_megamoe.read_checkpoint.")


COMMANDS = {
    "convert": Command(
        "pack the experts of a checkpoint once, so that later starts only map and copy them",
        _add_convert_arguments,
        _convert,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; the exit status is 2 for what the package refuses and for wrong arguments, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m jax_megamoe", description="Tools of jax_megamoe.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=command.help, description=f"{command.help}."))
    arguments = parser.parse_args(argv)
    try:
        COMMANDS[arguments.command].run(arguments)
    except (MegaMoEError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where it was.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
