"""Command line: `python -m bench` measures; `python -m bench compare A B` and `python -m bench plot A` show results."""

import argparse
import datetime
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp

from bench.inputs import make_inputs, make_weights
from bench.measure import METHOD, measure_row
from bench.presets import SHAPES

COLUMNS = ("tokens", "touched", "us", "ceiling_us", "ratio", "gb_per_s", "tflop_per_s", "diff", "captured")
ALTERNATIVES = ("reference_us", "ragged_us", "dense_us")


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["compare"]:
        parser = argparse.ArgumentParser(prog="python -m bench compare")
        parser.add_argument("before", type=pathlib.Path)
        parser.add_argument("after", type=pathlib.Path)
        options = parser.parse_args(arguments[1:])
        for line in compare(json.loads(options.before.read_text()), json.loads(options.after.read_text())):
            print(line)
        return 0
    if arguments[:1] == ["plot"]:
        parser = argparse.ArgumentParser(prog="python -m bench plot")
        parser.add_argument("results", type=pathlib.Path, nargs="+")
        parser.add_argument("-o", "--output", type=pathlib.Path, required=True)
        options = parser.parse_args(arguments[1:])
        plot([json.loads(path.read_text()) for path in options.results], options.output)
        return 0
    return measure(arguments)


def measure(arguments: list[str]) -> int:
    """Measures and prints a table for each shape; with --output also writes JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=METHOD)
    parser.add_argument("--shapes", default="flash,pro", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--tokens", default="1,2,4,8,16,32,64,128,256,512")
    parser.add_argument("--routing", default="uniform", choices=("uniform", "zipf", "hot", "masked30"))
    parser.add_argument("--alternatives", action="store_true", help="also jnp reference, ragged_dot and dense bf16")
    parser.add_argument("--commit", default=None, help="where there is no git checkout")
    parser.add_argument("--output", type=pathlib.Path, default=None, help="a JSON file")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.shapes.split(",") if name not in SHAPES]
    if unknown:
        parser.error(f"--shapes has {', '.join(unknown)}, wanted some of {', '.join(SHAPES)}")

    on_gpu = jax.default_backend() == "gpu"
    result: dict[str, Any] = {**describe(options.commit), "routing": options.routing, "shapes": {}}
    if not on_gpu:
        print("No GPU: a dry run of the program. These are no figures of the kernel.")
    for name in options.shapes.split(","):
        shape = SHAPES[name]
        weights = make_weights(shape)
        float_weights = None
        if options.alternatives:
            h, i, e = shape.hidden_size, shape.intermediate_size, shape.num_experts
            keys = jax.random.split(jax.random.key(1), 2)
            float_weights = (
                jax.random.normal(keys[0], (e, h, 2 * i), jnp.bfloat16),
                jax.random.normal(keys[1], (e, i, h), jnp.bfloat16),
            )
        columns = (*COLUMNS, *(ALTERNATIVES if options.alternatives else ()))
        print(f"\n{name} {shape} on {result['device']}\n" + " ".join(f"{c:>12}" for c in columns))
        rows = result["shapes"][name] = []
        for num_tokens in map(int, options.tokens.split(",")):
            print(f"{name}: {num_tokens} tokens", file=sys.stderr)
            inputs = make_inputs(shape, num_tokens, options.routing, seed=num_tokens)
            row = measure_row(shape, num_tokens, weights, float_weights, inputs, on_gpu)
            rows.append(row)
            print(" ".join(f"{text(row.get(c)):>12}" for c in columns), flush=True)
            if options.output is not None:
                options.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def text(value: Any) -> str:
    """A cell of the table."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def describe(commit: str | None) -> dict[str, Any]:
    """What the figures were measured on and with."""
    import jaxlib

    if commit is None:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        commit = git.stdout.strip() or "unknown"
    driver = ""
    if jax.default_backend() == "gpu":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": jax.devices()[0].device_kind,
        "driver": driver,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "method": METHOD,
    }


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The rows that both results have, the later time over the earlier one, and whether their runs overlap."""
    lines = [f"{before['device']} {before['commit']} -> {after['device']} {after['commit']}"]
    for name, rows in after["shapes"].items():
        earlier = {row["tokens"]: row for row in before["shapes"].get(name, [])}
        for row in rows:
            old = earlier.get(row["tokens"])
            if old is None:
                continue
            overlap = old["us_least"] <= row["us_most"] and row["us_least"] <= old["us_most"]
            lines.append(
                f"{name} {row['tokens']:>5} tokens: {old['us']:.1f} -> {row['us']:.1f} us, x{row['us'] / old['us']:.3f}"
                + (" (within the spread)" if overlap else "")
            )
    return lines


def plot(results: list[dict[str, Any]], output: pathlib.Path) -> None:
    """Time over ceiling against tokens, a line for each shape and device."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for result in results:
        for name, rows in result["shapes"].items():
            kept = [row for row in rows if "ratio" in row]
            tokens, ratios = [row["tokens"] for row in kept], [row["ratio"] for row in kept]
            axes.plot(tokens, ratios, marker="o", label=f"{name}, {result['device']}")
    axes.set(xscale="log", xlabel="tokens", ylabel="time / read ceiling")
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    sys.exit(main())
