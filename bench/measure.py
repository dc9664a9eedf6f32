"""What is measured, and how long it takes."""

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jax_megamoe as mm
from bench.inputs import Inputs
from bench.metric import relative_difference
from bench.shape import Shape
from bench.timing import NUM_CALLS, Timing, time_per_call
from jax_megamoe.primitives import _library

METHOD = (
    f"One jitted program makes {NUM_CALLS} calls with different inputs, one after the other on one stream. Programs "
    "are enqueued back to back until 30 ms are filled; host clock from the first enqueue to the end of the last, "
    "divided by the number of calls: median, least and most of 7 such runs after a warm-up. The read ceiling is a "
    "kernel that streams as many bytes of the same weights through a ring of bulk copies, called and timed alike. "
    "The rival, where it was asked for, has a process of its own on the same device and gets the same weights and "
    "inputs; its program is a CUDA graph of as many calls, each with its quantise-and-stage kernel, timed alike."
)


class Measured(NamedTuple):
    """A row of the table, the kernel's results for each of the inputs, and the reference result of the first."""

    row: dict[str, Any]
    results: list[jax.Array]
    reference: jax.Array


def microseconds_per_call(program: Callable[..., Any], *operands: Any, num_calls: int = NUM_CALLS) -> Timing:
    """Times one of the program's calls."""
    return time_per_call(lambda: program(*operands), jax.block_until_ready, num_calls)


def program_of(layer: Callable[..., Any]) -> Callable[..., Any]:
    """A program that calls `layer(x, weights, topk_ids, topk_weights)` with each of the inputs, one after the other."""

    def run(weights: Any, inputs: Inputs) -> list[Any]:
        results: list[Any] = []
        for x, topk_ids, topk_weights in zip(*inputs, strict=True):
            if results:
                # XLA would merge the products of independent calls that share their weights into one.
                x, results[-1] = jax.lax.optimization_barrier((x, results[-1]))
            results.append(layer(x, weights, topk_ids, topk_weights))
        return results

    return jax.jit(run)


def ceiling_program(buffer_bytes: int, num_bytes: int) -> Callable[..., Any]:
    """A program that reads `num_bytes` of a buffer as often, from places as far apart as possible."""
    _library.check_testing_available()

    def run(buffer: jax.Array) -> list[Any]:
        call = jax.ffi.ffi_call("jax_megamoe.read_ceiling.v1", jax.ShapeDtypeStruct((1,), jnp.uint32))
        starts = [n * (buffer_bytes // NUM_CALLS) for n in range(NUM_CALLS)]
        return [call(buffer, start=np.int64(start), bytes=np.int64(num_bytes)) for start in starts]

    return jax.jit(run)


def ragged_layer(x: jax.Array, weights: Any, topk_ids: jax.Array, topk_weights: jax.Array) -> jax.Array:
    """The layer as a JAX user writes it today: sort, `jax.lax.ragged_dot` in bf16, unsort."""
    gate_up, down = weights
    # Unused slots go behind the last group, where rows belong to no expert.
    topk_weights = jnp.where(topk_ids < 0, 0, topk_weights)
    topk_ids = jnp.where(topk_ids < 0, len(gate_up), topk_ids)
    order = jnp.argsort(topk_ids.ravel(), stable=True)
    rows = x[order // topk_ids.shape[1]]
    sizes = jnp.bincount(topk_ids.ravel(), length=len(gate_up)).astype(jnp.int32)
    gate, up = jnp.split(jax.lax.ragged_dot(rows, gate_up, sizes), 2, axis=-1)
    hidden = (jax.nn.silu(gate) * up * topk_weights.ravel()[order, None]).astype(jnp.bfloat16)
    out = jax.lax.ragged_dot(hidden, down, sizes)
    return jnp.zeros_like(out).at[order].set(out).reshape(*topk_ids.shape, -1).sum(axis=1)


def dense_layer(x: jax.Array, weights: Any, topk_ids: jax.Array, topk_weights: jax.Array) -> jax.Array:
    """Every token through every expert in bf16, then a weighted sum."""
    gate_up, down = weights
    gate, up = jnp.split(jnp.einsum("th,ehi->eti", x, gate_up), 2, axis=-1)
    share = (jax.nn.one_hot(topk_ids, gate_up.shape[0]) * topk_weights[..., None]).sum(axis=1)
    hidden = (jax.nn.silu(gate) * up * share.T[..., None]).astype(jnp.bfloat16)
    return jnp.einsum("eti,eih->th", hidden, down)


def difference(a: jax.Array, b: jax.Array) -> float:
    """How far two arrays are apart."""
    return relative_difference(*(np.asarray(array, np.float64).ravel() for array in (a, b)))


def measure_row(
    shape: Shape,
    num_tokens: int,
    routing: str,
    weights: mm.ExpertWeights,
    float_weights: Any,
    inputs: Inputs,
    *,
    on_gpu: bool,
    batch_invariant: bool,
) -> Measured:
    """One line of the table: the layer, the ceiling of its bytes, and the alternatives that were asked for."""
    core = importlib.import_module("jax_megamoe._core")
    moe = program_of(mm.moe)
    jax.block_until_ready(moe(weights, inputs))
    calls = core.moe_execute_count() if on_gpu else 0
    median, least, most = microseconds_per_call(moe, weights, inputs)
    touched = inputs.touched(shape.num_experts)
    num_bytes = round(touched * weights.nbytes / shape.num_experts)
    row: dict[str, Any] = {
        "tokens": num_tokens,
        "routing": routing,
        "format": weights.format,
        "touched": touched,
        "megabytes": num_bytes / 1e6,
        "us": median,
        "us_least": least,
        "us_most": most,
        "gb_per_s": num_bytes / median / 1e3,
        "tflop_per_s": shape.flops(inputs.pairs(shape.num_experts)) / median / 1e6,
        # A replayed graph does not call the handler: three runs may, to compile, trace and capture.
        "captured": on_gpu and core.moe_execute_count() - calls <= 3 * NUM_CALLS,
    }
    results = jax.block_until_ready(moe(weights, inputs))  # as they were timed
    reference = jax.jit(mm.reference.moe)(inputs.x[0], weights, inputs.topk_ids[0], inputs.topk_weights[0])
    row["diff"] = difference(results[0], reference)
    if on_gpu:
        program = ceiling_program(weights.gate_up.size, num_bytes)
        row["ceiling_us"], row["ceiling_us_least"], row["ceiling_us_most"] = microseconds_per_call(
            program, weights.gate_up
        )
        row["ratio"] = median / row["ceiling_us"]
    if batch_invariant:
        program = program_of(functools.partial(mm.moe, batch_invariant=True))
        times = microseconds_per_call(program, weights, inputs)
        row["invariant_us"], row["invariant_us_least"], row["invariant_us_most"] = times
    if float_weights is not None:
        row["ragged_us"] = microseconds_per_call(program_of(ragged_layer), float_weights, inputs)[0]
        row["dense_us"] = microseconds_per_call(program_of(dense_layer), float_weights, inputs)[0]
        row["reference_us"] = microseconds_per_call(program_of(mm.reference.moe), weights, inputs)[0]
    return Measured(row, results, reference)
