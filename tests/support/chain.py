"""A chain of small expert layers over the ranks of a group, placed alike from one process and from several."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from tests.support.problems import make_inputs, make_weights

# Options of XLA: nothing is captured in a CUDA graph, or whatever can be, single calls too. Default flags are between them.
NOT_CAPTURED: dict[str, Any] = {"xla_gpu_enable_command_buffer": ""}
CAPTURED: dict[str, Any] = {"xla_gpu_graph_min_graph_size": 1}


class Problem(NamedTuple):
    """Arguments of `mm.moe`."""

    x: Any
    weights: mm.ExpertWeights
    ids: Any
    probs: Any


def make_problem(tokens: int, experts: int, hidden: int, inter: int, top_k: int, seed: int = 0) -> Problem:
    x, ids, probs = make_inputs(tokens, hidden, experts, top_k, seed=seed)
    return Problem(x, make_weights(experts, hidden, inter, seed), ids, probs)


def make_mesh(devices: Any, **sizes: int) -> Mesh:
    return Mesh(
        np.array(devices).reshape(tuple(sizes.values())), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )


def spread(mesh: Mesh, tree: Any, *spec: Any) -> Any:
    """The arrays, which all processes have, each process putting its part on its devices."""
    sharding = NamedSharding(mesh, P(*spec))

    def place(leaf: Any) -> Any:
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])

    return jax.tree.map(place, tree)


def chain(layers: int, layer: Callable[..., Any] = mm.moe) -> Callable[..., jax.Array]:
    """A function of a `Problem`'s fields: the results of so many layers, each of which needs the one before."""

    def run(x: Any, weights: Any, ids: Any, probs: Any) -> jax.Array:
        ys = []
        for _ in range(layers):
            ys.append(layer(x, weights, ids, probs))
            x = jnp.where(ys[-1] > 0, x, -x)  # exact, however XLA fuses it, and never large
        return jnp.stack(ys)

    return run


def per_rank(function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def compile_all(lowered: Mapping[Any, Any]) -> dict[Any, Any]:
    """Lowered programs, compiled side by side: one takes seconds, on one core."""
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(lowered, pool.map(lambda program: program.compile(), lowered.values()), strict=True))


def bits(y: Any) -> np.ndarray:
    return np.asarray(y).view(np.uint16)


def is_fused(compiled: Any) -> bool:
    return "jax_megamoe.moe_peers." in str(compiled.as_text())


def judge(y: Any, wanted: Any) -> str:
    """What a part of a result is: right, nan, or wrong in a way that is said."""
    found, wanted = bits(y), bits(wanted)
    if found.shape == wanted.shape and np.array_equal(found, wanted):
        return "right"
    nans = np.isnan(np.asarray(y, np.float32))
    if nans.all():
        return "nan"
    return f"wrong: {int((found != wanted).sum())} of {found.size} numbers, {int(nans.sum())} of them NaN"
