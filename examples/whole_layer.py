"""A whole layer of experts, as a model has it: router, routed experts, and those that all tokens share.

What the layers of frameworks have in common: reading one from a checkpoint, and calling it. Shapes: H hidden_size, E
experts, S shared experts.
"""

import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jax_megamoe as mm
from jax_megamoe.checkpoints import Router


class LayerArrays(NamedTuple):
    """The arrays of a layer, a pytree; the options of the router are no leaves of it, and fixed while tracing."""

    router: Router  # what a family has of: scoring, groups, biases, a table of experts, a gate of the shared ones
    experts: mm.ExpertWeights
    shared: mm.ExpertWeights | None = None  # S, through which every token goes


# Keywords of `mm.moe`. Tuples, as programs are compiled for them.
Options = tuple[tuple[str, Any], ...]


def read_layer(
    folder: str | os.PathLike[str], layer: int, mesh: Mesh | None = None, **options: Any
) -> tuple[LayerArrays, Options]:
    """A layer of a checkpoint, as it is published or converted, on the default device or on those of a mesh.

    `options` are `format`, what all experts become, and keywords of `mm.moe` in addition to those of the model:
    `expert_axis` says which axes of the mesh split the experts; router and shared experts are whole on each device.
    Raises `ValueError` for models whose experts are narrower than they are, as Kimi-K3's.
    """
    checkpoint = mm.read_checkpoint(folder)
    format = options.pop("format", None)
    axes = {name: value for name, value in options.items() if name == "expert_axis"}
    router = jax.device_put(checkpoint.router(layer), None if mesh is None else NamedSharding(mesh, PartitionSpec()))
    size = router.weight.shape[1]
    experts = checkpoint.experts(layer, mesh=mesh, format=format, **axes)
    if experts.hidden_size != size:
        raise ValueError(
            f"{folder} has experts for {experts.hidden_size} of the model's {size} columns, wanted all of them: call "
            "mm.moe between the projections of the model."
        )
    arrays = LayerArrays(router, experts, checkpoint.shared_experts(layer, mesh=mesh, format=format))
    return arrays, tuple({**checkpoint.moe_options(layer), **options}.items())


def apply_layer(
    arrays: LayerArrays,
    options: Options,
    x: jax.Array,
    token_ids: jax.Array | None = None,
    is_image: jax.Array | None = None,
) -> jax.Array:
    """The layer's result [..., H] for x [..., H], in x's type; the experts take it as bfloat16.

    Layers that choose experts by a hash want the tokens' ids, int[...]; `is_image`, bool[...], says for models that see
    which tokens are of images.
    """
    router, wide = arrays.router, x.astype(jnp.float32)
    logits = jnp.matmul(wide, router.weight.T, precision="highest")
    ids, weights = router.route(logits, token_ids=token_ids, is_image=is_image)
    shared_weights = None
    if router.shared_gate is not None:
        shared_weights = jax.nn.sigmoid(jnp.matmul(wide, router.shared_gate.T, precision="highest"))
    y = mm.moe(
        x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x,  # which it refuses
        arrays.experts,
        ids,
        weights,
        shared=arrays.shared,
        shared_weights=shared_weights,
        **dict(options),
    )
    return y.astype(x.dtype)


def random_layer(key: jax.Array) -> LayerArrays:
    """A small layer of 8 experts, 2 of a token, with a shared one and a gate for it, to try things with."""
    keys = jax.random.split(key, 8)
    shapes = [(8, 128, 256), (8, 128, 256), (8, 256, 128)]
    routed = [jax.random.normal(k, shape) / shape[-1] ** 0.5 for k, shape in zip(keys[:3], shapes, strict=True)]
    shared = [jax.random.normal(k, (1, *shape[1:])) / 16 for k, shape in zip(keys[3:6], shapes, strict=True)]
    gate, weight = jax.random.normal(keys[6], (1, 256)) / 16, jax.random.normal(keys[7], (8, 256)) / 16
    router = Router(weight, bias=None, hash_table=None, shared_gate=gate, options={"top_k": 2})
    return LayerArrays(router, mm.quantize_experts(*routed), mm.quantize_experts(*shared))
