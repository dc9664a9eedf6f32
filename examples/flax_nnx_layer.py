"""The expert layer as a Flax NNX module: router and packed experts are variables, also after `nnx.split`.

    pip install flax
    python -m examples.flax_nnx_layer

Shapes: H hidden_size, I intermediate_size, E experts.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jax_megamoe as mm


class PackedWeight(nnx.Variable):
    """An array of `ExpertWeights`; no `nnx.Param`, so that no optimizer takes it for one."""


class ExpertLayer(nnx.Module):
    """x bf16[..., H] to bf16[..., H]: chooses experts, and sums up what they make of each token."""

    def __init__(
        self,
        router: jax.Array,
        experts: mm.ExpertWeights,
        *,
        bias: jax.Array | None = None,
        logit_bias: jax.Array | None = None,
        route_options: dict[str, Any],
        moe_options: dict[str, Any] | None = None,
    ) -> None:
        """Of a router f32[E, H], its biases f32[E], experts, and keywords of `mm.route` and `mm.moe`."""
        self.router = nnx.Param(router)
        self.bias = None if bias is None else nnx.Param(bias)
        self.logit_bias = None if logit_bias is None else nnx.Param(logit_bias)  # of gpt-oss, added to the logits
        # A pytree whose leaves are variables; `moe` reads through them. `nnx.data` says that it holds some.
        self.experts = nnx.data(jax.tree.map(PackedWeight, experts))
        # Fixed while tracing: tuples, as they are compared when a compiled program is looked for.
        self.route_options = nnx.static(tuple(route_options.items()))
        self.moe_options = nnx.static(tuple((moe_options or {}).items()))

    @classmethod
    def from_checkpoint(cls, folder: str | os.PathLike[str], layer: int) -> "ExpertLayer":
        """A layer of a checkpoint, without its shared experts.

        Raises `ValueError` for a layer that chooses experts by a hash: this one is not told the tokens' ids.
        """
        checkpoint = mm.read_checkpoint(folder)
        router = checkpoint.router(layer)
        if router.hash_table is not None:
            raise ValueError(f"layer {layer} chooses experts by a hash, wanted one that chooses by scores: use route.")
        experts = checkpoint.experts(layer)
        options = {"route_options": router.options, "moe_options": checkpoint.moe_options(layer)}
        return cls(router.weight, experts, bias=router.bias, logit_bias=router.logit_bias, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The layer's result for x."""
        logits = jnp.matmul(x.astype(jnp.float32), self.router[...].T, precision="highest")
        if self.logit_bias is not None:
            logits += self.logit_bias[...]
        bias = None if self.bias is None else self.bias[...]
        ids, weights = mm.route(logits, bias=bias, **dict(self.route_options))
        return mm.moe(x, self.experts, ids, weights, **dict(self.moe_options))


def main() -> None:
    """Runs a random layer, both as `nnx.jit` does it and as serving programs do: split, passed on, merged."""
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = [(8, 128, 256), (8, 128, 256), (8, 256, 128)]
    matrices = [jax.random.normal(k, shape) / shape[-1] ** 0.5 for k, shape in zip(keys[:3], shapes, strict=True)]
    router = jax.random.normal(keys[3], (8, 256)) / 16
    layer = ExpertLayer(router, mm.quantize_experts(*matrices), route_options={"top_k": 2})
    x = jax.random.normal(keys[4], (4, 256), jnp.bfloat16)
    y = nnx.jit(lambda layer, x: layer(x))(layer, x)

    definition, state = nnx.split(layer)
    step = jax.jit(lambda state, x: nnx.merge(definition, state)(x))
    print("y", y.shape, y.dtype, "; the same after nnx.split:", bool((step(state, x) == y).all()))


if __name__ == "__main__":
    main()
