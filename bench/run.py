"""Measures everything that a command asks for, shape by shape."""

import pathlib
import sys
import tempfile
from typing import Any, NamedTuple

import jax

from bench import records, table
from bench.inputs import make_float_weights, make_inputs, make_weights
from bench.measure import measure_row
from bench.presets import SHAPES
from bench.progress import Progress
from bench.rival import client
from jax_megamoe.weight_layout import Format


class Plan(NamedTuple):
    """What to measure; `rival_python` is None where the rival was not asked for."""

    shapes: list[str]
    formats: list[Format]
    routings: list[str]
    tokens: list[int]
    alternatives: bool
    batch_invariant: bool
    rival_python: str | None
    output: pathlib.Path | None


def run(plan: Plan, result: dict[str, Any]) -> None:
    """Prints each row as soon as it is there, adds it to the result, and writes that where the plan says."""
    if jax.default_backend() != "gpu":
        print("No GPU: a dry run of the program. These are no figures of the kernel.")
    has_rival = plan.rival_python is not None and "error" not in result["rivals"]
    num_rows = len(plan.shapes) * len(plan.routings) * len(plan.tokens)
    progress = Progress(num_rows * (len(plan.formats) + (has_rival and client.FORMAT in plan.formats)))
    for name in plan.shapes:
        rows: list[dict[str, Any]] = []
        result["shapes"][name] = rows
        for format in plan.formats:
            if has_rival and format == client.FORMAT:
                with tempfile.TemporaryDirectory(prefix="jax-megamoe-bench-") as folder:
                    _measure_with_rival(plan, name, result, progress, pathlib.Path(folder))
                continue
            _measure_shape(plan, name, format, result, progress, None)
            if plan.rival_python is not None and format == client.FORMAT:
                client.merge(_rows_with_rival(rows), {}, why=result["rivals"]["error"])
        if plan.alternatives or plan.rival_python is not None:
            for row in rows:
                row["winner"] = table.winner(row)
            columns = (*table.RIVALS, *(table.ALTERNATIVES if plan.alternatives else ()))
            table.print_rivals(f"{name}: ours and {records.rival_name(result)}", rows, columns)
        _write(plan, result)


def _measure_shape(
    plan: Plan, name: str, format: Format, result: dict[str, Any], progress: Progress, folder: pathlib.Path | None
) -> None:
    """Measures a shape's rows with weights of a format; into `folder` goes what the rival needs to measure the same."""
    shape = SHAPES[name]
    weights = make_weights(shape, format)
    if folder is not None:
        client.write_weights(folder, weights)
    float_weights = make_float_weights(shape) if plan.alternatives else None
    table.print_header(f"{name} {shape} of {format} on {result['device']}", plan.alternatives, plan.batch_invariant)
    for routing in plan.routings:
        for num_tokens in plan.tokens:
            inputs = make_inputs(shape, num_tokens, routing, seed=num_tokens)
            row, results, reference = measure_row(
                shape,
                num_tokens,
                routing,
                weights,
                float_weights,
                inputs,
                on_gpu=jax.default_backend() == "gpu",
                batch_invariant=plan.batch_invariant,
            )
            if folder is not None:
                client.write_case(folder, client.case_name(routing, num_tokens), inputs, results, reference)
            result["shapes"][name].append(row)
            table.print_row(row, plan.alternatives, plan.batch_invariant)
            progress.step(f"{records.label(name, routing, format)}: {num_tokens} tokens")
            _write(plan, result)


def _measure_with_rival(
    plan: Plan, name: str, result: dict[str, Any], progress: Progress, folder: pathlib.Path
) -> None:
    """Measures a shape's rows, then has the rival measure the same."""
    assert plan.rival_python is not None
    shape = SHAPES[name]
    client.write_request(folder, shape, [(routing, tokens) for routing in plan.routings for tokens in plan.tokens])
    print(f"{name}: the rival compiles its kernels", file=sys.stderr, flush=True)
    # Before anything is timed: it loads the processor and the device.
    client.compile_ahead(plan.rival_python, folder, shape, plan.tokens)
    _measure_shape(plan, name, client.FORMAT, result, progress, folder)
    found = client.run_rival(plan.rival_python, folder, lambda case: progress.step(f"{name}: the rival, {case} tokens"))
    client.merge(_rows_with_rival(result["shapes"][name]), found)


def _rows_with_rival(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["format"] == client.FORMAT]


def _write(plan: Plan, result: dict[str, Any]) -> None:
    if plan.output is not None:
        records.write(plan.output, result)
