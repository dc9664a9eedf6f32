"""`python -m jax_megamoe doctor`: what this machine is, how `moe` will run here and why, and what is wrong.

`facts` asks the machine, `check` runs a tiny layer, `verdict` judges what they found, and `text` prints it.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence

from jax_megamoe.doctor import text
from jax_megamoe.doctor.check import run_check
from jax_megamoe.doctor.facts import gather, start_jax
from jax_megamoe.doctor.verdict import Report, judge


def examine() -> Report:
    """Everything that the command says. Starts JAX, and runs a tiny layer on all devices of this process."""
    jax_here = start_jax()
    check = run_check(jax_here.devices) if jax_here.devices else None
    # After it: memory is then what XLA has left.
    return judge(gather(jax_here), check)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status is 1 where something is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_megamoe doctor",
        description="Says what this machine is and how moe will run on it, and tries a tiny layer. "
        "Exit status 1 where something is wrong.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    report = examine()
    print(json.dumps(dataclasses.asdict(report), indent=1) if options.json else "\n".join(text.lines_of(report)))
    return 0 if report.is_well else 1
