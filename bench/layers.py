"""`python -m bench layers`: what JAX adds to the kernel, per layer of a program like a decode step."""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
from typing import Any

from bench.presets import ROUTINGS, SHAPES
from bench.progress import Progress
from bench.table import text
from jax_megamoe.xla_flags import recommended_xla_flags

# The flags that a variant adds to XLA_FLAGS. XLA reads them when it starts, so each has a process of its own.
VARIANTS = {
    "default": "",
    "size-1": "--xla_gpu_graph_min_graph_size=1",
    "while": recommended_xla_flags(),
    # What "while" was until November 2026: a list that replaces XLA's own.
    "listed": "--xla_gpu_enable_command_buffer=FUSION,CUSTOM_CALL,WHILE,DYNAMIC_SLICE_FUSION"
    " --xla_gpu_graph_min_graph_size=1",
    "off": "--xla_gpu_enable_command_buffer=",
}
METHOD = (
    "One jitted program runs the layers one after the other, each a call of moe and an addition on which the next call "
    "depends; same tokens and routing in all, weights stacked and taken in turn. Time per layer as in `python -m "
    "bench`. Added is the difference to the time per call of a captured program of 12 calls, without the additions, "
    "on the same inputs. Handler calls are those of one run: none where a CUDA graph was replayed. Diff is the "
    "distance of the result to that of the unrolled program."
)
COLUMNS = ("flags", "program", "us", "us_least", "us_most", "added", "captured", "handler_calls", "diff")
# Less is not worth a flag.
WORTH_US = 0.5


def main(arguments: list[str]) -> int:
    """Measures each variant in a process of its own, prints a table and one recommendation."""
    parser = argparse.ArgumentParser(prog="python -m bench layers", description=METHOD)
    parser.add_argument("--shape", default="flash", choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=8, help="few, so that what is added shows")
    parser.add_argument("--routing", default="uniform", choices=ROUTINGS)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--stack", type=int, default=2, help="layers that have weights of their own")
    parser.add_argument("--variants", default=",".join(VARIANTS), help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--commit", default=None, help="where there is no git checkout")
    parser.add_argument("--output", type=pathlib.Path, default=None, help="a JSON file")
    options = parser.parse_args(arguments)
    variants = options.variants.split(",")
    unknown = [name for name in variants if name not in VARIANTS]
    if unknown:
        parser.error(f"--variants has {', '.join(unknown)}, wanted some of {', '.join(VARIANTS)}")
    if not 1 <= options.stack <= options.layers or options.tokens < 1:
        parser.error(f"--stack is {options.stack}, wanted 1 to --layers ({options.layers}), and --tokens at least 1")

    request = {name: getattr(options, name) for name in ("shape", "tokens", "routing", "layers", "stack", "commit")}
    progress = Progress(len(variants))
    result: dict[str, Any] = {**request, "method": METHOD, "variants": {}}
    for name in variants:
        report = run_variant(VARIANTS[name], {**request, "method": METHOD})
        result["variants"][name] = {"flags": VARIANTS[name], **report}
        progress.step(f"layers: {name}")
        if options.output is not None:
            options.output.write_text(json.dumps(summarize(result), indent=1) + "\n")
    for line in lines_of(summarize(result)):
        print(line)
    return 0


def run_variant(flags: str, request: dict[str, Any], timeout: float = 300) -> dict[str, Any]:
    """One process under the flags: its programs, or under "error" why there are none."""
    environment = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
    command = [sys.executable, "-m", "bench.layer_programs", json.dumps(request)]
    root = pathlib.Path(__file__).parent.parent
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no result after {timeout:.0f} s"}
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return {"error": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def summarize(result: dict[str, Any]) -> dict[str, Any]:
    """The result with the time per call of the kernel alone, and with what each program adds to it."""
    reports = [report for report in result["variants"].values() if "programs" in report]
    alone = [report["programs"]["calls"] for report in reports]
    # Without a graph, the calls alone may wait for the host as well.
    captured = [record["us"] for record in alone if record.get("captured")] or [record["us"] for record in alone]
    if not captured:
        return result
    about = {name: value for name, value in reports[0]["about"].items() if name != "xla_flags"}
    result = {**result, **about, "alone_us": statistics.median(captured)}
    for report in reports:
        for name, record in report["programs"].items():
            if name != "calls":
                record["added"] = record["us"] - result["alone_us"]
    return result


def lines_of(result: dict[str, Any]) -> list[str]:
    """The table, and below it the recommendation."""
    lines = [
        f"{result['layers']} layers of {result['shape']}, {result['tokens']} tokens, on {result.get('device', '?')}",
        f"kernel alone: {text(result.get('alone_us'))} us per call",
        " ".join(f"{column:>14}" for column in COLUMNS),
    ]
    for name, report in result["variants"].items():
        if "error" in report:
            lines.append(f"{name:>14} failed: {report['error']}")
        for program, record in report.get("programs", {}).items():
            cells = {"flags": name, "program": program, **record}
            lines.append(" ".join(f"{text(cells.get(column)):>14}" for column in COLUMNS))
    lines += [f"{name}: {VARIANTS[name] or 'no flags'}" for name in result["variants"]]
    return [*lines, recommendation(result)]


def recommendation(result: dict[str, Any]) -> str:
    """Which flags to set: those whose slowest program adds least, unless no flags are about as good."""
    added = {
        name: {program: record["added"] for program, record in report["programs"].items() if program != "calls"}
        for name, report in result["variants"].items()
        if "programs" in report and "captured" in report["programs"]["calls"]
    }
    if not added:
        return "Recommendation: none, nothing was measured on a GPU."
    worst = {name: max(times, key=lambda program: times[program]) for name, times in added.items()}
    best = min(added, key=lambda name: added[name][worst[name]])
    if "default" in added and added["default"][worst["default"]] <= added[best][worst[best]] + WORTH_US:
        best = "default"
    flags = f"XLA_FLAGS='{VARIANTS[best]}'" if VARIANTS[best] else "no flags"
    others = ", ".join(
        f"{name} up to {times[worst[name]]:.1f} ({worst[name]})" for name, times in added.items() if name != best
    )
    at_most = f"{added[best][worst[best]]:.1f} us a layer at most ({worst[best]})"
    return f"Recommendation: set {flags}: it adds {at_most}" + (f"; {others}." if others else ".")
