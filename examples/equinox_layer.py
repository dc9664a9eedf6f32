"""The expert layer as an Equinox module: packed experts are a field like any other, as they are a pytree.

    pip install equinox
    python -m examples.equinox_layer

Shapes: H hidden_size, I intermediate_size, E experts.
"""

import os
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

import jax_megamoe as mm


class ExpertLayer(eqx.Module):
    """x bf16[..., H] to bf16[..., H]: chooses experts, and sums up what they make of each token.

    `jax.vmap` over sequences, as is usual with Equinox, folds them into the tokens of one call.
    """

    router: jax.Array  # f32[E, H]
    bias: jax.Array | None  # f32[E]
    experts: mm.ExpertWeights
    route_options: tuple[tuple[str, Any], ...] = eqx.field(static=True)  # keywords of `mm.route`
    moe_options: tuple[tuple[str, Any], ...] = eqx.field(static=True)  # keywords of `mm.moe`
    logit_bias: jax.Array | None = None  # f32[E], of gpt-oss: added to the logits

    @classmethod
    def from_checkpoint(cls, folder: str | os.PathLike[str], layer: int) -> "ExpertLayer":
        """A layer of a checkpoint, without its shared experts.

        Raises `ValueError` for a layer that chooses experts by a hash: this one is not told the tokens' ids.
        """
        checkpoint = mm.read_checkpoint(folder)
        router, options = checkpoint.router(layer), checkpoint.moe_options(layer)
        if router.hash_table is not None:
            raise ValueError(f"layer {layer} chooses experts by a hash, wanted one that chooses by scores: use route.")
        arrays = (router.weight, router.bias, checkpoint.experts(layer))
        fixed = tuple(router.options.items()), tuple(options.items())
        return cls(*arrays, *fixed, logit_bias=router.logit_bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The layer's result for x."""
        logits = jnp.matmul(x.astype(jnp.float32), self.router.T, precision="highest")
        if self.logit_bias is not None:
            logits += self.logit_bias
        ids, weights = mm.route(logits, bias=self.bias, **dict(self.route_options))
        return mm.moe(x, self.experts, ids, weights, **dict(self.moe_options))


def main() -> None:
    """Runs a random layer on tokens, and mapped over sequences."""
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = [(8, 128, 256), (8, 128, 256), (8, 256, 128)]
    matrices = [jax.random.normal(k, shape) / shape[-1] ** 0.5 for k, shape in zip(keys[:3], shapes, strict=True)]
    router = jax.random.normal(keys[3], (8, 256)) / 16
    layer = ExpertLayer(router, None, mm.quantize_experts(*matrices), (("top_k", 2),), ())
    x = jax.random.normal(keys[4], (3, 4, 256), jnp.bfloat16)
    y = eqx.filter_jit(layer)(x)
    mapped = eqx.filter_jit(lambda layer, x: jax.vmap(layer)(x))(layer, x)
    print("y", y.shape, y.dtype, "; the same mapped over sequences:", bool((mapped == y).all()))


if __name__ == "__main__":
    main()
