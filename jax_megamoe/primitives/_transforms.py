"""What all primitives of the layer do alike under `jax.vmap` and `jax.grad`."""

import math
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax import export

from jax_megamoe.errors import ArgumentError
from jax_megamoe.operands import Operands


def refuse_differentiation(*_: Any, **__: Any) -> NoReturn:
    """The JVP and transposition rule."""
    raise NotImplementedError(
        "jax_megamoe.moe is inference only and has no derivative: "
        "wrap its arguments in jax.lax.stop_gradient, or train with a layer in higher precision."
    )


@jax.custom_jvp
def without_derivative(value: jax.Array) -> jax.Array:
    """The value itself, for array code whose derivative would be zero or wrong."""
    return value


@without_derivative.defjvp
def _(primals: Any, tangents: Any) -> NoReturn:
    refuse_differentiation()


_COND = "and call moe outside of a jax.lax.cond whose predicate is mapped, which maps all that it uses"


def move_mapped_axis_to_front(operands: Operands, dims: Operands) -> Operands:
    """The operands with the mapped axis in front of all that have tokens; raises where weights or layer have one."""
    if any(dim is not None for dim in dims.shared):
        raise NotImplementedError(
            "shared is mapped by jax.vmap, and jax_megamoe.moe maps over tokens only: pass in_axes=None for it, "
            f"{_COND}."
        )
    if any(dim is not None for dim in dims.leaves):
        raise NotImplementedError(
            "weights are mapped by jax.vmap, and jax_megamoe.moe maps over tokens only: "
            f"pass in_axes=None for them, or stack them and loop with jax.lax.scan and layer=i, {_COND}."
        )
    if dims.layer is not None:
        raise NotImplementedError(
            "layer is mapped by jax.vmap, and jax_megamoe.moe takes one layer a call: loop with jax.lax.scan."
        )
    mapped = [(operands.x, dims.x), (operands.topk_ids, dims.topk_ids), (operands.topk_weights, dims.topk_weights)]
    size = next(value.shape[dim] for value, dim in mapped if dim is not None)
    if export.is_symbolic_dim(size):
        raise ArgumentError(
            f"x is mapped by jax.vmap over {size} elements, wanted a number, also under jax.export: "
            "export one program for each number of tokens, and pad to the next."
        )
    x, ids, weights = (
        jnp.broadcast_to(value, (size, *value.shape)) if dim is None else jnp.moveaxis(value, dim, 0)
        for value, dim in mapped
    )
    return operands._replace(x=x, topk_ids=ids, topk_weights=weights)


def join_leading_dimensions(value: jax.Array) -> jax.Array:
    """[..., n] -> [T, n]."""
    return value.reshape(math.prod(value.shape[:-1]), value.shape[-1])


def load_per_element(topk_ids: jax.Array, num_experts: int) -> jax.Array:
    """Ids int32[B, ..., k] -> load int32[B, E]: folding gives the sum over B, but vmap's result is each element's."""
    one_hot = topk_ids[..., None] == jnp.arange(num_experts, dtype=jnp.int32)
    return jnp.sum(one_hot, axis=tuple(range(1, topk_ids.ndim)), dtype=jnp.int32)
