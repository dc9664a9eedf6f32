"""Sizes that are no multiples of a tile: zeros behind the weights and the hidden states, and the way back.

Zeros are exact: a padded column of a hidden state meets zeros of the weights, a padded row of gate and up makes an
activation of zero, and a padded row of the result is cut.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_megamoe.operands import Operands
from jax_megamoe.weight_layout import BLOCK, PLANE_ROWS, reshape_trailing

Call = Callable[..., tuple[jax.Array, jax.Array]]


def pad_rows(array: jax.Array, axis: int, size: int, value: int = 0) -> jax.Array:
    """Zeros, or another value, behind an axis, up to `size`."""
    missing = size - array.shape[axis]
    if missing == 0:
        return array
    axis %= array.ndim
    widths = [(0, missing if other == axis else 0) for other in range(array.ndim)]
    return jnp.pad(array, widths, constant_values=value)


def slice_padded(array: jax.Array, begin: jax.Array, size: int, axis: int) -> jax.Array:
    """`size` rows from `begin` on along an axis, with zeros behind its end up to a multiple of 128."""
    if array.shape[axis] % BLOCK == 0:
        return jax.lax.dynamic_slice_in_dim(array, begin, size, axis)
    array = pad_rows(array, axis, max(size, array.shape[axis]))
    first = jnp.minimum(begin, array.shape[axis] - size)
    part = jax.lax.dynamic_slice_in_dim(array, first, size, axis)
    # Where all of it would be behind the end, the index is beyond `size`, and is clamped to it.
    return jax.lax.dynamic_slice_in_dim(pad_rows(part, axis, 2 * size), begin - first, size, axis)


def pad_halves(array: jax.Array, axis: int, size: int) -> jax.Array:
    """Zeros behind the gate half and behind the up half of an axis, up to `size` for both together."""
    axis %= array.ndim
    return _map_halves(functools.partial(pad_rows, axis=axis + 1, size=size // 2), array, axis)


def pad_biases(
    gate_up: jax.Array | None, down: jax.Array | None, hidden_size: int, intermediate_size: int
) -> tuple[jax.Array | None, jax.Array | None]:
    """Biases [E, 2I] and [E, H] in f32, for sizes that are padded; None stays None."""
    return (
        None if gate_up is None else pad_halves(gate_up.astype(jnp.float32), 1, 2 * intermediate_size),
        None if down is None else pad_rows(down.astype(jnp.float32), 1, hidden_size),
    )


def cut_rows(array: jax.Array, axis: int, size: int) -> jax.Array:
    """The inverse of `pad_rows`."""
    return array if array.shape[axis] == size else jax.lax.slice_in_dim(array, 0, size, axis=axis)


def cut_halves(array: jax.Array, axis: int, size: int) -> jax.Array:
    """The inverse of `pad_halves`."""
    axis %= array.ndim
    return _map_halves(functools.partial(cut_rows, axis=axis + 1, size=size // 2), array, axis)


def _map_halves(function: Callable[[jax.Array], jax.Array], array: jax.Array, axis: int) -> jax.Array:
    behind = array.shape[axis + 1 :]
    halves = function(reshape_trailing(array, axis, 2, array.shape[axis] // 2, *behind))
    return reshape_trailing(halves, axis, 2 * halves.shape[axis + 1], *behind)


def with_padded_hidden(call: Call) -> Call:
    """`call(operands, ...)` for an x that is narrower than the tiles of the weights; its y is as wide as x."""

    def padded(operands: Operands, **params: Any) -> tuple[jax.Array, jax.Array]:
        hidden_size, size = operands.x.shape[-1], operands.leaves.down.shape[-3] * PLANE_ROWS
        if hidden_size == size:
            return call(operands, **params)
        y, load = call(operands._replace(x=_pad(operands.x, size=size)), **params)
        return _cut(y, size=hidden_size), load

    return padded


# Compiled, also where the caller's program is not: its constants would be transfers to the device.
@jax.jit(static_argnames="size")
def _pad(x: jax.Array, *, size: int) -> jax.Array:
    return pad_rows(x, -1, size)


@jax.jit(static_argnames="size")
def _cut(y: jax.Array, *, size: int) -> jax.Array:
    return cut_rows(y, -1, size)
