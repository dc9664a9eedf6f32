"""The child of `python -m bench layers`: programs of many layers, timed under the XLA flags of this process.

Gets a JSON object as its argument, prints one. A layer is one call of `moe`, on weights that are stacked and taken in
turn, and one addition, which makes the next layer depend on it. Beside these programs stands the one of `python -m
bench`, 12 calls and nothing else, with the same tokens, routing and weights.
"""

import dataclasses
import functools
import importlib
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_megamoe as mm
from bench import records
from bench.inputs import make_inputs, make_weights
from bench.measure import difference, microseconds_per_call
from bench.presets import SHAPES
from bench.shape import Shape
from bench.timing import NUM_CALLS

Layer = Callable[[jax.Array, Any], jax.Array]
Form = Callable[[Layer, jax.Array, np.ndarray, jax.Array], jax.Array]


def stacked_weights(shape: Shape, stack: int) -> mm.ExpertWeights:
    """Random weights of `stack` layers, made as one array rather than copied together."""
    flat = make_weights(shape._replace(num_experts=stack * shape.num_experts))
    split = jax.jit(lambda leaf: leaf.reshape(stack, shape.num_experts, *leaf.shape[1:]))
    return dataclasses.replace(jax.tree.map(split, flat), num_experts=shape.num_experts)


def unrolled(layer: Layer, x: jax.Array, numbers: np.ndarray, count: jax.Array) -> jax.Array:
    """A Python loop: every layer is in the program."""
    for number in numbers:
        x = layer(x, int(number))
    return x


def scan(layer: Layer, x: jax.Array, numbers: np.ndarray, count: jax.Array) -> jax.Array:
    """`jax.lax.scan` over the numbers of the layers."""
    return jax.lax.scan(lambda x, number: (layer(x, number), None), x, jnp.asarray(numbers))[0]


def while_loop(layer: Layer, x: jax.Array, numbers: np.ndarray, count: jax.Array) -> jax.Array:
    """`jax.lax.while_loop`, and XLA does not know how often: as where the last token ends the loop."""
    stack = int(numbers.max()) + 1
    return jax.lax.while_loop(
        lambda state: state[0] < count, lambda state: (state[0] + 1, layer(state[1], state[0] % stack)), (0, x)
    )[1]


FORMS: dict[str, Form] = {"unrolled": unrolled, "lax.scan": scan, "lax.while_loop": while_loop}


def measure(shape: Shape, tokens: int, routing: str, layers: int, stack: int) -> dict[str, Any]:
    """Times per layer of each form, and per call of the program of calls alone."""
    weights = stacked_weights(shape, stack)
    inputs = make_inputs(shape, tokens, routing, seed=tokens)
    operands = (weights, inputs.x[0], inputs.topk_ids[0], inputs.topk_weights[0])

    def calls(weights: mm.ExpertWeights, x: jax.Array, topk_ids: jax.Array, topk_weights: jax.Array) -> list[jax.Array]:
        results: list[jax.Array] = []
        for n in range(NUM_CALLS):
            if results:  # one after the other, as in `measure.program_of`
                x, results[-1] = jax.lax.optimization_barrier((x, results[-1]))
            results.append(mm.moe(x, weights, topk_ids, topk_weights, layer=n % stack))
        return results

    report: dict[str, Any] = {"calls": timed(jax.jit(calls), operands, NUM_CALLS)}
    numbers = np.arange(layers, dtype=np.int32) % stack
    count = jnp.asarray(layers, jnp.int32)
    results = []
    for name, form in FORMS.items():
        program = jax.jit(functools.partial(run_layers, form, numbers))
        report[name] = timed(program, (*operands, count), layers)
        results.append(program(*operands, count))
        # The addition may be rounded differently; a wrong layer shows.
        report[name]["diff"] = difference(results[0], results[-1])
    return report


def run_layers(
    form: Form,
    numbers: np.ndarray,
    weights: mm.ExpertWeights,
    x: jax.Array,
    topk_ids: jax.Array,
    topk_weights: jax.Array,
    count: jax.Array,
) -> jax.Array:
    """All layers, one after the other."""

    def layer(y: jax.Array, number: Any) -> jax.Array:
        # A part of the result, on top of the first input: values stay in range for any number of layers.
        return x + 0.125 * mm.moe(y, weights, topk_ids, topk_weights, layer=number)

    return form(layer, x, numbers, count)


def timed(program: Callable[..., Any], operands: tuple[Any, ...], num_calls: int) -> dict[str, Any]:
    """Microseconds per call, and how often a run called the handler: never, where it replayed a CUDA graph."""
    record: dict[str, Any] = microseconds_per_call(program, *operands, num_calls=num_calls)._asdict()
    if jax.default_backend() == "gpu":
        core = importlib.import_module("jax_megamoe._core")
        before = core.moe_execute_count()
        jax.block_until_ready(program(*operands))
        record["handler_calls"] = core.moe_execute_count() - before
        record["captured"] = record["handler_calls"] == 0
    return record


def main() -> None:
    """Measures what the argument says."""
    request = json.loads(sys.argv[1])
    shape = SHAPES[request["shape"]]
    report = measure(shape, request["tokens"], request["routing"], request["layers"], request["stack"])
    about = records.describe(request["commit"], request["method"])
    print(json.dumps({"programs": report, "about": about}), flush=True)


if __name__ == "__main__":
    main()
