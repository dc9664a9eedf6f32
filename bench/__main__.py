"""Command line: `python -m bench` measures; its subcommands are described by --help."""

import argparse
import pathlib
import sys
from typing import Any

from bench import buffer_sizes, compare, floor_figure, layers, plot, presets, ranks, readme, records
from bench.measure import METHOD
from bench.rival import client
from bench.run import Plan, run

COMMANDS = (
    "subcommands: layers (what JAX adds per layer), ranks (over the GPUs of a host), compare A B, "
    "plot [A... -o FILE], buffers (memory of expert parallelism), readme (the tables of pages); each has --help"
)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    commands = {
        "compare": run_compare,
        "plot": run_plot,
        "layers": layers.main,
        "ranks": ranks.main,
        "buffers": buffer_sizes.main,
        "readme": readme.main,
    }
    command = commands.get(arguments[0]) if arguments else None
    return run_measure(arguments) if command is None else command(arguments[1:])


def run_compare(arguments: list[str]) -> int:
    """Prints what changed between two result files."""
    parser = argparse.ArgumentParser(prog="python -m bench compare")
    parser.add_argument("before", type=pathlib.Path)
    parser.add_argument("after", type=pathlib.Path)
    options = parser.parse_args(arguments)
    try:
        before, after = records.read(options.before), records.read(options.after)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for line in compare.compare(before, after):
        print(line)
    return 0


def run_plot(arguments: list[str]) -> int:
    """Plots result files; without any, draws the figure of README from `bench/results/current`."""
    parser = argparse.ArgumentParser(prog="python -m bench plot", description=run_plot.__doc__)
    parser.add_argument("results", type=pathlib.Path, nargs="*")
    help_output = f"an image, its format by its name; README's figure is {floor_figure.FILE.name}"
    parser.add_argument("-o", "--output", type=pathlib.Path, help=help_output)
    options = parser.parse_args(arguments)
    if not options.results:
        (options.output or floor_figure.FILE).write_text(floor_figure.draw())
        return 0
    if options.output is None:
        parser.error("--output is missing: name the image that the result files are plotted into")
    try:
        plot.plot([records.read(path) for path in options.results], options.output)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


def run_measure(arguments: list[str]) -> int:
    """Measures and prints tables for each shape; with --output also writes JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=METHOD, epilog=COMMANDS)
    shapes = f"of {', '.join(presets.SHAPES)}; groups: {', '.join(presets.GROUPS)}"
    parser.add_argument("--shapes", default="flash,pro", help=shapes)
    parser.add_argument("--tokens", default="1,2,4,8,16,32,64,128,256,512")
    weights = f"formats of the weights, of {', '.join(presets.FORMATS)}, or all"
    parser.add_argument("--weights", default="fp8_block", help=weights)
    parser.add_argument("--routing", default="uniform", help=f"of {', '.join(presets.ROUTINGS)}, or all")
    parser.add_argument("--alternatives", action="store_true", help="also jnp reference, ragged_dot and dense bf16")
    invariant_help = "also `moe` with batch_invariant=True, and how many times as long that takes"
    parser.add_argument("--batch-invariant", action="store_true", help=invariant_help)
    client.add_options(parser)
    parser.add_argument("--commit", default=None, help="where there is no git checkout")
    parser.add_argument("--output", type=pathlib.Path, default=None, help="a JSON file, written after each row")
    options = parser.parse_args(arguments)
    plan = Plan(
        checked(parser, "--shapes", presets.select_shapes, options.shapes),
        checked(parser, "--weights", presets.select_formats, options.weights),
        checked(parser, "--routing", presets.select_routings, options.routing),
        checked(parser, "--tokens", numbers, options.tokens),
        options.alternatives,
        options.batch_invariant,
        options.rival_python if options.rivals else None,
        options.output,
    )
    rivals = client.ask_versions(options)
    about_rivals = {} if rivals is None else {"rivals": rivals}
    run(plan, {**records.describe(options.commit, METHOD), "routing": options.routing, **about_rivals, "shapes": {}})
    return 0


def checked(parser: argparse.ArgumentParser, option: str, function: Any, text: str) -> Any:
    """What the function makes of an option's text; its `ValueError` ends the program."""
    try:
        return function(text)
    except ValueError as error:
        parser.error(f"{option} {error}")


def numbers(text: str) -> list[int]:
    """The numbers in a comma-separated list, each once."""
    if not all(number.isdecimal() and int(number) > 0 for number in text.split(",")):
        raise ValueError(f"is {text!r}, wanted positive numbers with commas between them")
    return list(dict.fromkeys(map(int, text.split(","))))


if __name__ == "__main__":
    sys.exit(main())
