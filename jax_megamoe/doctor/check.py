"""A tiny layer on the devices of this process, compared with the same layer in plain float32."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm

Array = np.ndarray

# What docs/numerics.md allows beside unquantised arithmetic on the same weights.
LIMIT = 2e-3

_H, _I, _K = 512, 256, 2
_EXPERTS_PER_DEVICE, _TOKENS_PER_DEVICE = 8, 4


@dataclass(frozen=True)
class Check:
    """How the layer went."""

    num_devices: int
    difference: float | None  # 1 - 2<a, b> / (<a, a> + <b, b>); None where there is no result
    seconds: float  # with compiling
    error: str | None  # why there is no result


def run_check(devices: Sequence[Any]) -> Check:
    """Runs `moe` once on these devices of JAX's, expert-parallel where there are several."""
    start = time.monotonic()
    difference = error = None
    try:
        difference = _difference(*_run(devices))
    # Whatever it is: to say what is wrong is what this is for.
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    return Check(len(devices), difference, time.monotonic() - start, error)


def _run(devices: Sequence[Any]) -> tuple[Array, Array]:
    """The result of `moe`, and what it should be."""
    rng = np.random.default_rng(0)
    num_experts, num_tokens = _EXPERTS_PER_DEVICE * len(devices), _TOKENS_PER_DEVICE * len(devices)
    gate, up = (_exact(rng, num_experts, _I, _H) for _ in range(2))
    down = _exact(rng, num_experts, _H, _I)
    x = rng.normal(size=(num_tokens, _H)).astype(ml_dtypes.bfloat16)
    ids = np.stack([rng.permutation(num_experts)[:_K] for _ in range(num_tokens)]).astype(np.int32)
    topk_weights = rng.random((num_tokens, _K)).astype(np.float32)

    if len(devices) == 1:
        with jax.default_device(devices[0]):
            found = jax.jit(mm.moe)(x, mm.quantize_experts(gate, up, down), ids, topk_weights)
    else:
        mesh = Mesh(np.array(devices), ("expert",))
        weights = jax.device_put(mm.quantize_experts(gate, up, down), NamedSharding(mesh, P("expert")))
        with jax.set_mesh(mesh):
            found = jax.jit(mm.moe)(x, weights, ids, topk_weights)
    return np.asarray(found, np.float32), _in_float32(x.astype(np.float32), gate, up, down, ids, topk_weights)


def _exact(rng: np.random.Generator, *shape: int) -> Array:
    """Values that FP8 holds without rounding: powers of two below the largest magnitude of their block."""
    signs, exponents = rng.choice([-1.0, 1.0], shape), -rng.integers(0, 4, shape)
    exact: Array = (signs * np.exp2(exponents) / shape[-1] ** 0.5).astype(np.float32)
    return exact


def _in_float32(x: Array, gate: Array, up: Array, down: Array, ids: Array, topk_weights: Array) -> Array:
    y = np.zeros_like(x)
    for token, (row, experts) in enumerate(zip(x, ids, strict=True)):
        for slot, expert in enumerate(experts):
            of_gate = gate[expert] @ row
            y[token] += topk_weights[token, slot] * (
                down[expert] @ (of_gate / (1 + np.exp(-of_gate)) * (up[expert] @ row))
            )
    return y


def _difference(found: Array, wanted: Array) -> float:
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    return float(1 - 2 * np.sum(found * wanted) / np.sum(found * found + wanted * wanted))
