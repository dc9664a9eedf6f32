"""Tokens that are only there to fill a shape: their slots are made unused."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jax_megamoe.arrays import require_device_memory
from jax_megamoe.primitives import _specs


def ids_of_valid_tokens(topk_ids: jax.Array, num_valid_tokens: jax.Array | None) -> jax.Array:
    """Ids int32[..., k], those of the tokens from number int32[] on, of all leading dimensions together, being -1.

    One elementwise operation, which XLA fuses into what makes the ids; None changes nothing. Explicit axes split the
    result as they do the ids.
    """
    if num_valid_tokens is None:
        return topk_ids
    require_device_memory("num_valid_tokens", num_valid_tokens)
    spec = P(*jax.typeof(topk_ids).sharding.spec)
    arrays = {"topk_ids": topk_ids, "num_valid_tokens": num_valid_tokens}
    return _specs.call_with_types(lambda *operands: (_mask(*operands),), arrays, (spec,))[0]


# Compiled, also where the caller's program is not: its constants would be transfers to the device.
@jax.jit
def _mask(topk_ids: jax.Array, num_valid_tokens: jax.Array) -> jax.Array:
    lead = topk_ids.shape[:-1]
    number_of_token = jnp.arange(math.prod(lead), dtype=jnp.int32).reshape(lead)
    return jnp.where(number_of_token[..., None] < num_valid_tokens, topk_ids, -1)
