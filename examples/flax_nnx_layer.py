"""A whole layer of experts as a Flax NNX module: its arrays are variables, also after `nnx.split`.

    pip install flax
    python -m examples.flax_nnx_layer

Shapes: H hidden_size.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

import jax_megamoe as mm
from examples.whole_layer import LayerArrays, apply_layer, random_layer, read_layer
from jax_megamoe.checkpoints import Router


class PackedWeight(nnx.Variable):
    """An array of `ExpertWeights`; no `nnx.Param`, so that no optimizer takes it for one."""


class ExpertLayer(nnx.Module):
    """x [..., H] to [..., H]: chooses experts, and sums up what they and the shared ones make of each token."""

    def __init__(
        self, router: Router, experts: mm.ExpertWeights, shared: mm.ExpertWeights | None = None, **options: Any
    ) -> None:
        """Of a router, routed and shared experts, and keywords of `mm.moe`."""
        # Pytrees whose leaves are variables. `nnx.data` says that they hold some.
        self.router = nnx.data(jax.tree.map(_router_variable, router))
        self.experts = nnx.data(jax.tree.map(PackedWeight, experts))
        self.shared = nnx.data(jax.tree.map(PackedWeight, shared))
        # Fixed while tracing: tuples, as they are compared when a compiled program is looked for.
        self.options = nnx.static(tuple(options.items()))

    @classmethod
    def from_checkpoint(
        cls, folder: str | os.PathLike[str], layer: int, mesh: Mesh | None = None, **options: Any
    ) -> "ExpertLayer":
        """A layer of a checkpoint, as it is published or converted; `options` as of `read_layer`."""
        arrays, found = read_layer(folder, layer, mesh, **options)
        return cls(*arrays, **dict(found))

    def __call__(
        self, x: jax.Array, token_ids: jax.Array | None = None, is_image: jax.Array | None = None
    ) -> jax.Array:
        """The layer's result for x, as of `apply_layer`."""
        variables = LayerArrays(self.router, self.experts, self.shared)
        arrays = jax.tree.map(lambda variable: variable[...], variables, is_leaf=_is_variable)
        return apply_layer(arrays, self.options, x, token_ids, is_image)


def _router_variable(array: jax.Array) -> nnx.Variable:
    """A Param of weights and biases; a table of experts is none."""
    return (nnx.Param if jnp.issubdtype(array.dtype, jnp.floating) else nnx.Variable)(array)


def _is_variable(value: object) -> bool:
    return isinstance(value, nnx.Variable)


def main() -> None:
    """Runs a random layer, both as `nnx.jit` does it and as serving programs do: split, passed on, merged."""
    layer = ExpertLayer(*random_layer(jax.random.key(0)))
    x = jax.random.normal(jax.random.key(1), (4, 256), jnp.bfloat16)
    y = nnx.jit(lambda layer, x: layer(x))(layer, x)

    definition, state = nnx.split(layer)
    step = jax.jit(lambda state, x: nnx.merge(definition, state)(x))
    print("y", y.shape, y.dtype, "; the same after nnx.split:", bool((step(state, x) == y).all()))


if __name__ == "__main__":
    main()
