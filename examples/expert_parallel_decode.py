"""A jitted decode step over a mesh: tokens and experts split over eight devices, stacked layers in a scan.

Runs anywhere: on a machine without eight GPUs, eight CPU devices stand in.

    python examples/expert_parallel_decode.py
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax  # noqa: E402
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm

LAYERS, EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, TOKENS = 3, 16, 256, 128, 4, 32


def make_layer(key: jax.Array) -> mm.ExpertWeights:
    """Random experts of one layer."""
    shapes = [(EXPERTS, INTERMEDIATE, HIDDEN)] * 2 + [(EXPERTS, HIDDEN, INTERMEDIATE)]
    keys = jax.random.split(key, 3)
    return mm.quantize_experts(
        *(jax.random.normal(k, shape) / shape[-1] ** 0.5 for k, shape in zip(keys, shapes, strict=True))
    )


@jax.jit
def decode_step(x: jax.Array, routers: jax.Array, experts: mm.ExpertWeights) -> tuple[jax.Array, jax.Array]:
    """Takes x bf16[T, H] through all layers; also the load of every layer's experts, int32[L, E]."""

    def layer(x: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        topk_ids, topk_weights = mm.route(x.astype(jnp.float32) @ routers[i], TOP_K)
        y, load = mm.moe(x, experts, topk_ids, topk_weights, layer=i, return_expert_load=True)
        return x + y, load

    return jax.lax.scan(layer, x, jnp.arange(LAYERS))


def main() -> None:
    """Places the weights once, then decodes."""
    devices = jax.devices() if len(jax.devices()) >= 8 else jax.devices("cpu")
    mesh = jax.make_mesh((8,), ("expert",), axis_types=(AxisType.Auto,), devices=devices[:8])
    keys = jax.random.split(jax.random.key(0), LAYERS + 2)
    with jax.default_device(devices[0]):
        experts = mm.stack_experts([make_layer(key) for key in keys[:LAYERS]])
        routers = jax.random.normal(keys[-2], (LAYERS, HIDDEN, EXPERTS)) / HIDDEN**0.5
        x = jax.random.normal(keys[-1], (TOKENS, HIDDEN), jnp.bfloat16)
    experts = jax.device_put(experts, NamedSharding(mesh, P(None, "expert")))
    routers = jax.device_put(routers, NamedSharding(mesh, P()))
    x = jax.device_put(x, NamedSharding(mesh, P("expert")))
    for step in range(3):
        x, load = decode_step(x, routers, experts)
        print(f"step {step}: |x| {jnp.abs(x.astype(jnp.float32)).mean():.3f}, load of layer 0: {load[0]}")


if __name__ == "__main__":
    main()
