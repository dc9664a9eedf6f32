"""A whole layer of experts as an Equinox module: packed experts are a field like any other, as they are a pytree.

    pip install equinox
    python -m examples.equinox_layer

Shapes: H hidden_size.
"""

import os
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import jax_megamoe as mm
from examples.whole_layer import LayerArrays, Options, apply_layer, random_layer, read_layer
from jax_megamoe.checkpoints import Router


class ExpertLayer(eqx.Module):
    """x [..., H] to [..., H]: chooses experts, and sums up what they and the shared ones make of each token.

    `jax.vmap` over sequences, as is usual with Equinox, folds them into the tokens of one call.
    """

    router: Router
    experts: mm.ExpertWeights
    shared: mm.ExpertWeights | None = None
    options: Options = eqx.field(static=True, default=())  # keywords of `mm.moe`

    @classmethod
    def from_checkpoint(
        cls, folder: str | os.PathLike[str], layer: int, mesh: Mesh | None = None, **options: Any
    ) -> "ExpertLayer":
        """A layer of a checkpoint, as it is published or converted; `options` as of `read_layer`."""
        arrays, found = read_layer(folder, layer, mesh, **options)
        return cls(*arrays, found)

    def __call__(
        self, x: jax.Array, token_ids: jax.Array | None = None, is_image: jax.Array | None = None
    ) -> jax.Array:
        """The layer's result for x, as of `apply_layer`."""
        return apply_layer(LayerArrays(self.router, self.experts, self.shared), self.options, x, token_ids, is_image)


def main() -> None:
    """Runs a random layer on tokens, and mapped over sequences."""
    layer = ExpertLayer(*random_layer(jax.random.key(0)))
    x = jax.random.normal(jax.random.key(1), (3, 4, 256), jnp.bfloat16)
    y = eqx.filter_jit(layer)(x)
    mapped = eqx.filter_jit(lambda layer, x: jax.vmap(layer)(x))(layer, x)
    print("y", y.shape, y.dtype, "; the same mapped over sequences:", bool((mapped == y).all()))


if __name__ == "__main__":
    main()
