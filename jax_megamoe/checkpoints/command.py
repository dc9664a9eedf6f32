"""`python -m jax_megamoe convert`: packs the experts of a checkpoint once."""

import argparse
import sys
from collections.abc import Sequence
from typing import get_args

from jax_megamoe.checkpoints import convert, read_checkpoint
from jax_megamoe.errors import MegaMoEError
from jax_megamoe.weight_layout import Format


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status is 2 for what the package refuses and for wrong arguments, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_megamoe convert",
        description="Packs the experts of a checkpoint once, so that later starts only map and copy them.",
    )
    parser.add_argument("folder", help="a model's folder, with config.json and safetensors files")
    parser.add_argument("out", help="a new folder, or that of a run that was killed, which is gone on with")
    parser.add_argument(
        "--format", choices=get_args(Format), help="of the experts (default: what they are held in; of floats FP8)"
    )
    parser.add_argument("--quiet", action="store_true", help="print no progress")
    arguments = parser.parse_args(argv)
    try:
        out = convert(arguments.folder, arguments.out, format=arguments.format, progress=not arguments.quiet)
        print(f"{read_checkpoint(out)!r} is complete: pass {str(out)!r} to jax_megamoe.read_checkpoint.")
    except (MegaMoEError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where it was.", file=sys.stderr)
        return 130
    return 0
