"""What both primitives do alike under `jax.vmap` and `jax.grad`."""

from typing import Any, NoReturn

import jax
import jax.numpy as jnp

# Positions among the operands of both primitives: x, four weight leaves, topk_ids, topk_weights, layer.
WEIGHTS = (1, 2, 3, 4)
TOPK_IDS = 5
TOKENS = (0, TOPK_IDS, 6)
LAYER = 7


def refuse_differentiation(*_: Any, **__: Any) -> NoReturn:
    """The JVP and transposition rule."""
    raise NotImplementedError(
        "jax_megamoe.moe is inference only and has no derivative: "
        "wrap its arguments in jax.lax.stop_gradient, or train with a layer in higher precision."
    )


def move_mapped_axis_to_front(operands: tuple[Any, ...], dims: tuple[Any, ...]) -> list[Any]:
    """The operands with the mapped axis in front of all token operands; raises where weights or layer have one."""
    if any(dims[i] is not None for i in WEIGHTS):
        raise NotImplementedError(
            "weights are mapped by jax.vmap, and jax_megamoe.moe maps over tokens only: "
            "pass in_axes=None for them, or stack them and loop with jax.lax.scan and layer=i."
        )
    if dims[LAYER] is not None:
        raise NotImplementedError(
            "layer is mapped by jax.vmap, and jax_megamoe.moe takes one layer a call: loop with jax.lax.scan."
        )
    size = next(operands[i].shape[dims[i]] for i in TOKENS if dims[i] is not None)
    moved = list(operands)
    for i in TOKENS:
        if dims[i] is None:
            moved[i] = jnp.broadcast_to(operands[i], (size, *operands[i].shape))
        else:
            moved[i] = jnp.moveaxis(operands[i], dims[i], 0)
    return moved


def load_per_element(topk_ids: jax.Array, num_experts: int) -> jax.Array:
    """Ids int32[B, ..., k] -> load int32[B, E]: folding gives the sum over B, but vmap's result is each element's."""
    one_hot = topk_ids[..., None] == jnp.arange(num_experts, dtype=jnp.int32)
    return jnp.sum(one_hot, axis=tuple(range(1, topk_ids.ndim)), dtype=jnp.int32)
