"""`python -m bench ranks`: the expert layer over the GPUs of a host, fused and with XLA's collectives."""

import argparse
import functools
import itertools
import pathlib
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from bench import presets, records
from bench.inputs import Inputs, make_inputs, make_weights
from bench.measure import ceiling_program, difference, microseconds_per_call, program_of
from bench.presets import SHAPES
from bench.progress import Progress
from bench.shape import Shape
from bench.table import text
from bench.timing import NUM_CALLS
from jax_megamoe.weight_layout import Format

METHOD = (
    "One jitted program over a mesh of R GPUs makes 12 calls with different inputs, one after the other, or 48 of less "
    "than 8 tokens on each rank: host threads of several GPUs do not start a program together, and it has to be long "
    "against that. Every rank has so many tokens and as many experts as one of eight ranks would. Timed as in "
    "`python -m bench`, until all ranks are done. The ceiling is the time to read, on one of the GPUs, the weights of "
    "the experts that are hit on the rank where most of them are, on average over the calls; beyond is what the fused "
    "call takes more than that. Collective is implementation='collective' on the same inputs, and diff the distance "
    "between both results."
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
    parser.add_argument("--commit", default=None, help="where there is no git checkout")
    parser.add_argument("--output", type=pathlib.Path, default=None, help="a JSON file, written after each row")
    options = parser.parse_args(arguments)
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
        "rows": {},
    }
    progress = Progress(len(shapes) * len(ranks) * len(formats) * len(routings) * len(tokens))
    for name in shapes:
        result["rows"][name] = []
        print(f"{name} {SHAPES[name]} on each of the ranks, {result['device']}")
        print(" ".join(f"{column:>13}" for column in COLUMNS))
        for num_ranks, format in itertools.product(ranks, formats):
            for row in measure(SHAPES[name], num_ranks, format, routings, tokens, options.batch_invariant):
                result["rows"][name].append(row)
                print(" ".join(f"{text(row.get(column)):>13}" for column in COLUMNS), flush=True)
                progress.step(
                    f"{records.label(name, row['routing'], format)}: {num_ranks} ranks, {row['tokens']} tokens"
                )
                if options.output is not None:
                    records.write(options.output, result)
    return 0


def measure(
    share: Shape, num_ranks: int, format: Format, routings: list[str], token_counts: list[int], batch_invariant: bool
) -> Any:
    """Yields the rows of one shape, that of each rank, number of ranks and format of the weights."""
    mesh = jax.make_mesh((num_ranks,), ("expert",), devices=jax.devices()[:num_ranks])
    whole = share._replace(num_experts=share.num_experts * num_ranks)
    split = NamedSharding(mesh, P("expert"))
    weights = jax.jit(functools.partial(make_weights, whole, format), out_shardings=split)()
    for routing in routings:
        for tokens in token_counts:
            inputs = make_inputs(whole, tokens * num_ranks, routing, seed=tokens, num_calls=_calls_of(tokens))
            row = _row(share, num_ranks, tokens, mesh, weights, inputs, batch_invariant)
            yield {"ranks": num_ranks, "routing": routing, "format": format, **row}


def _calls_of(tokens: int) -> int:
    return 48 if tokens < 8 else NUM_CALLS


def _row(
    share: Shape,
    num_ranks: int,
    tokens: int,
    mesh: Any,
    weights: mm.ExpertWeights,
    inputs: Inputs,
    batch_invariant: bool,
) -> Any:
    touched = float(np.mean([_most_touched(np.asarray(ids), share.num_experts, num_ranks) for ids in inputs.topk_ids]))
    placed = jax.device_put(inputs, NamedSharding(mesh, P("expert")))
    on_gpu = mesh.devices.flat[0].platform == "gpu"
    times, results = {}, {}
    with jax.set_mesh(mesh):
        # "cuda" is an error, not collectives, where GPUs don't reach each other's memory.
        implementations: dict[str, Any] = {"fused": "cuda" if on_gpu else None, "collective": "collective"}
        for name, implementation in implementations.items():
            layer = functools.partial(mm.moe, implementation=implementation, batch_invariant=batch_invariant)
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
    return row


def _most_touched(ids: np.ndarray, num_local_experts: int, num_ranks: int) -> int:
    """Distinct experts on the rank that has most of them, for one call."""
    hit = np.unique(ids[(ids >= 0) & (ids < num_local_experts * num_ranks)])
    return int(np.bincount(hit // num_local_experts, minlength=num_ranks).max())
