"""`python -m bench ranks`: the expert layer over the GPUs of a host, fused, with XLA's collectives, and the rival's."""

import argparse
import functools
import itertools
import pathlib
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from bench import presets, records, table
from bench.inputs import Inputs, make_inputs, make_weights
from bench.measure import ceiling_program, difference, microseconds_per_call, program_of
from bench.presets import SHAPES
from bench.progress import Progress
from bench.rival import client
from bench.shape import Shape
from bench.table import text
from bench.timing import NUM_CALLS, Timing
from jax_megamoe.weight_layout import Format

METHOD = (
    "One jitted program over a mesh of R GPUs makes 12 calls with different inputs, one after the other, or 48 of less "
    "than 8 tokens on each rank: host threads of several GPUs do not start a program together, and it has to be long "
    "against that. Every rank has so many tokens and as many experts as one of eight ranks would. Timed as in "
    "`python -m bench`, until all ranks are done. The ceiling is the time to read, on one of the GPUs, the weights of "
    "the experts that are hit on the rank where most of them are, on average over the calls; beyond is what the fused "
    "call takes more than that. Collective is implementation='collective' on the same inputs, and diff the distance "
    "between both results. The rival, where it was asked for, has a process for each of the same GPUs, after ours, and "
    "gets the same weights and inputs; each process replays a CUDA graph of as many calls, each with its "
    "quantise-and-stage kernel. A run starts when all processes have come to it; it is timed alike, and counts with "
    "what the slowest of them took."
)
COLUMNS = (
    "ranks",
    "tokens",
    "routing",
    "format",
    "touched",
    "us",
    "us_least",
    "us_most",
    "ceiling_us",
    "beyond_us",
    "collective_us",
    "diff",
)


def main(arguments: list[str]) -> int:
    """Measures and prints a table for each shape and number of ranks; with --output also writes JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench ranks", description=METHOD)
    parser.add_argument("--shapes", default="flash,pro", help=f"of {', '.join(SHAPES)}: of each rank")
    parser.add_argument("--ranks", default="all", help="numbers of GPUs, or all: 2, 4, 8 as far as there are so many")
    parser.add_argument("--tokens", default="1,8,32,64,128,256,512", help="on each rank")
    weights_help = f"formats of the weights, of {', '.join(presets.FORMATS)}, or all"
    parser.add_argument("--weights", default="fp8_block", help=weights_help)
    parser.add_argument("--routing", default="uniform", help=f"of {', '.join(presets.ROUTINGS)}, or all")
    invariant_help = "all of it with batch_invariant=True, where diff has to be 0"
    parser.add_argument("--batch-invariant", action="store_true", help=invariant_help)
    client.add_options(parser)
    parser.add_argument("--commit", default=None, help="where there is no git checkout")
    parser.add_argument("--output", type=pathlib.Path, default=None, help="a JSON file, written after each row")
    options = parser.parse_args(arguments)
    rivals = client.ask_versions(options)
    num_devices = len(jax.devices())
    try:
        shapes, routings = presets.select_shapes(options.shapes), presets.select_routings(options.routing)
        formats = presets.select_formats(options.weights)
        tokens = [int(number) for number in options.tokens.split(",")]
        wanted = "2,4,8" if options.ranks == "all" else options.ranks
        ranks = [int(number) for number in wanted.split(",") if options.ranks != "all" or int(number) <= num_devices]
    except ValueError as error:
        parser.error(str(error))
    if not ranks or not all(0 < number <= num_devices for number in ranks):
        parser.error(
            f"--ranks is {options.ranks}, wanted numbers up to the {num_devices} devices that this process sees"
        )
    result: dict[str, Any] = {
        **records.describe(options.commit, METHOD),
        "batch_invariant": options.batch_invariant,
        **({} if rivals is None else {"rivals": rivals}),
        "rows": {},
    }
    asks_rival = rivals is not None and client.FORMAT in formats
    runs_rival = asks_rival and "error" not in result["rivals"]
    num_rows = len(shapes) * len(ranks) * len(routings) * len(tokens)
    progress = Progress(num_rows * (len(formats) + runs_rival))

    def write() -> None:
        if options.output is not None:
            records.write(options.output, result)

    for name in shapes:
        rows: list[dict[str, Any]] = []
        result["rows"][name] = rows
        print(f"{name} {SHAPES[name]} on each of the ranks, {result['device']}")
        print(" ".join(f"{column:>13}" for column in COLUMNS))
        for num_ranks, format in itertools.product(ranks, formats):
            plan = Plan(name, num_ranks, format, routings, tokens, options.batch_invariant)
            first = len(rows)
            with_rival = runs_rival and format == client.FORMAT
            for row in measure_with_rival(plan, options.rival_python, progress) if with_rival else measure(plan):
                rows.append(row)
                print(" ".join(f"{text(row.get(column)):>13}" for column in COLUMNS), flush=True)
                title = records.label(name, row["routing"], format)
                progress.step(f"{title}: {num_ranks} ranks, {row['tokens']} tokens")
                write()
            if asks_rival and not runs_rival and format == client.FORMAT:
                client.merge(rows[first:], {}, why=result["rivals"]["error"])
        if asks_rival:
            beside = [row for row in rows if "rival" in row]
            for row in beside:
                row["winner"] = table.winner(row)
            table.print_rivals(f"{name}: ours and {records.rival_name(result)}", beside, table.RIVALS_OF_RANKS)
        write()
    return 0


class Plan(NamedTuple):
    """What is measured with one set of weights: the shape is that of each rank."""

    name: str
    num_ranks: int
    format: Format
    routings: list[str]
    tokens: list[int]
    batch_invariant: bool

    @property
    def share(self) -> Shape:
        """The sizes of each rank's layer."""
        return SHAPES[self.name]


def measure_with_rival(plan: Plan, python: str, progress: Progress) -> Iterator[dict[str, Any]]:
    """Yields the rows of `measure`; after the last one they have the rival's records, too."""
    with tempfile.TemporaryDirectory(prefix="jax-megamoe-bench-") as name:
        folder = pathlib.Path(name)
        client.write_request(folder, plan.share, list(itertools.product(plan.routings, plan.tokens)))
        title = f"{plan.name}: the rival, {plan.num_ranks} ranks"
        print(f"{title}, compiles its kernels", file=sys.stderr, flush=True)
        # Before anything is timed: it loads the processors and the devices.
        client.compile_ahead(python, folder, plan.share, plan.tokens, plan.num_ranks)
        rows = []
        for row in measure(plan, folder):
            rows.append(row)
            yield row
        found = client.run_rival(python, folder, lambda case: progress.step(f"{title}, {case} tokens"), plan.num_ranks)
        client.merge(rows, found)


def measure(plan: Plan, folder: pathlib.Path | None = None) -> Iterator[dict[str, Any]]:
    """Yields a row for each routing and number of tokens; into `folder` goes what the rival needs to do the same."""
    mesh = jax.make_mesh((plan.num_ranks,), ("expert",), devices=jax.devices()[: plan.num_ranks])
    whole = plan.share._replace(num_experts=plan.share.num_experts * plan.num_ranks)
    split = NamedSharding(mesh, P("expert"))
    weights = jax.jit(functools.partial(make_weights, whole, plan.format), out_shardings=split)()
    if folder is not None:
        client.write_weights(folder, weights)
    for routing, tokens in itertools.product(plan.routings, plan.tokens):
        inputs = make_inputs(whole, tokens * plan.num_ranks, routing, seed=tokens, num_calls=_calls_of(tokens))
        row, results = _row(plan, tokens, mesh, weights, inputs)
        if folder is not None:
            client.write_case(folder, client.case_name(routing, tokens), inputs, results)
        yield {"ranks": plan.num_ranks, "routing": routing, "format": plan.format, **row}


def _calls_of(tokens: int) -> int:
    return 48 if tokens < 8 else NUM_CALLS


def _row(
    plan: Plan, tokens: int, mesh: Any, weights: mm.ExpertWeights, inputs: Inputs
) -> tuple[dict[str, Any], list[jax.Array]]:
    """A row, and the results of its fused calls."""
    touched = float(
        np.mean([_most_touched(np.asarray(ids), plan.share.num_experts, plan.num_ranks) for ids in inputs.topk_ids])
    )
    placed = jax.device_put(inputs, NamedSharding(mesh, P("expert")))
    on_gpu = mesh.devices.flat[0].platform == "gpu"
    times: dict[str, Timing] = {}
    results: dict[str, list[jax.Array]] = {}
    with jax.set_mesh(mesh):
        # "cuda" is an error, not collectives, where GPUs don't reach each other's memory.
        implementations: dict[str, Any] = {"fused": "cuda" if on_gpu else None, "collective": "collective"}
        for name, implementation in implementations.items():
            layer = functools.partial(mm.moe, implementation=implementation, batch_invariant=plan.batch_invariant)
            program = program_of(layer)
            times[name] = microseconds_per_call(program, weights, placed, num_calls=_calls_of(tokens))
            results[name] = program(weights, placed)
    row: dict[str, Any] = {"tokens": tokens, "touched": touched}
    row["us"], row["us_least"], row["us_most"] = times["fused"]
    row["collective_us"] = times["collective"].us
    row["diff"] = max(difference(a, b) for a, b in zip(results["fused"], results["collective"], strict=True))
    if on_gpu:
        own = weights.gate_up.addressable_shards[0].data
        row["ceiling_us"] = microseconds_per_call(
            ceiling_program(own.size, round(touched * weights.nbytes / weights.num_experts)), own
        ).us
        row["beyond_us"] = row["us"] - row["ceiling_us"]
    return row, results["fused"]


def _most_touched(ids: np.ndarray, num_local_experts: int, num_ranks: int) -> int:
    """Distinct experts on the rank that has most of them, for one call."""
    hit = np.unique(ids[(ids >= 0) & (ids < num_local_experts * num_ranks)])
    return int(np.bincount(hit // num_local_experts, minlength=num_ranks).max())
