"""A chain of small expert layers over the ranks of a group, compiled alike in one process and in several."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import jax_megamoe as mm

# Options of XLA: nothing is captured in a CUDA graph, or whatever can be, single calls too. Default flags are between them.
NOT_CAPTURED: dict[str, Any] = {"xla_gpu_enable_command_buffer": ""}
CAPTURED: dict[str, Any] = {"xla_gpu_graph_min_graph_size": 1}


def chain(layers: int, layer: Callable[..., Any] = mm.moe) -> Callable[..., jax.Array]:
    """A function of a `problems.Problem`'s fields: the results of so many layers, each of which needs the one before."""

    def run(x: Any, weights: Any, ids: Any, topk_weights: Any) -> jax.Array:
        ys = []
        for _ in range(layers):
            ys.append(layer(x, weights, ids, topk_weights))
            x = jnp.where(ys[-1] > 0, x, -x)  # exact, however XLA fuses it, and never large
        return jnp.stack(ys)

    return run


def per_rank(function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def compile_all(lowered: Mapping[Any, Any]) -> dict[Any, Any]:
    """Lowered programs, compiled side by side: one takes seconds, on one core."""
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(lowered, pool.map(lambda program: program.compile(), lowered.values()), strict=True))
