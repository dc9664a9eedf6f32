"""The rival's process.

    python -m bench.rival --check             imports, compiler, and one small case against a quantisation model
    python -m bench.rival --versions          what is installed
    python -m bench.rival FOLDER              times the cases that `bench.rival.client` wrote there
    python -m bench.rival FOLDER --compile 8  only compiles the kernels for 8 tokens, so that many can do so at a time

With --place RANK,RANKS,PORT it is one of RANKS processes that run the layer together, on the GPU number RANK; the
first of them reports.

The kernels are compiled at the first call: nvcc has to be on PATH or in CUDA_HOME, and DG_JIT_CACHE_DIR may name where
they are kept. Prints one JSON object a line on the standard output, and everything else, that of libraries too, on the
standard error.
"""

import argparse
import json
import os
import pathlib
import sys
import traceback
from typing import TextIO

from bench.rival.check import check_against_model
from bench.rival.place import Place
from bench.rival.process import Rival, compile_kernels, run_cases, versions
from bench.shape import Shape


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.rival", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=pathlib.Path, nargs="?")
    parser.add_argument("--compile", type=int, metavar="TOKENS", help="only compile")
    place_help = "which of several processes this is, and where they meet"
    parser.add_argument("--place", type=Place.parse, metavar="RANK,RANKS,PORT", help=place_help)
    parser.add_argument("--check", action="store_true", help="one small case against a quantisation model")
    parser.add_argument("--versions", action="store_true", help="what is installed")
    options = parser.parse_args(argv)
    if options.folder is None and not (options.check or options.versions):
        parser.error("wants a FOLDER, --check or --versions")
    output = claim_stdout()
    try:
        if options.versions:
            report = versions()
        elif options.check:
            report = check_against_model()
        else:
            request = json.loads((options.folder / "request.json").read_text())
            rival = Rival(options.place or Place.alone())
            if options.compile is None:
                run_cases(rival, options.folder, request, output)
            else:
                compile_kernels(rival, Shape(**request["shape"]), options.compile)
            report = {"done": True}
    except Exception:
        traceback.print_exc()
        report = {"error": traceback.format_exc()}
    print(json.dumps(report), file=output, flush=True)
    output.flush()
    return 1 if "error" in report else 0


def claim_stdout() -> TextIO:
    """The standard output for JSON alone: what others write to it goes to the standard error from now on."""
    sys.stdout.flush()
    mine = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return mine


if __name__ == "__main__":
    # A process group that is not taken apart can keep the interpreter waiting; everything is written by now.
    status = main()
    sys.stderr.flush()
    os._exit(status)
