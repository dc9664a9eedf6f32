"""Meshes over the devices that a test is to use, eight of a CPU or two, four or eight GPUs, and the layer on them."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from tests.support.expert_layer import Layer, assert_matches_model
from tests.support.skips import gpus, why_no_gpus

# As they are on eight devices.
MESHES = {
    "expert": {"expert": 8},
    "data x expert": {"data": 2, "expert": 4},
    "expert x model": {"expert": 4, "model": 2},
    "data alone": {"data": 8},
    "one device": {"data": 1, "expert": 1},
}
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
KINDS = {"auto": AUTO, "explicit": EXPLICIT}

# What devices `make_mesh` takes; tests that run on GPUs set it.
platform = "cpu"


def find_devices() -> list[Any]:
    """All that one mesh is made of: a power of two of them, at most eight."""
    try:
        found = jax.devices(platform)
    except RuntimeError:
        return []
    return found[: 1 << min(3, len(found).bit_length() - 1)]


def mesh_of(
    devices: Any, sizes: Mapping[str, int], kind: AxisType | tuple[AxisType, ...] = AUTO, reverse: bool = False
) -> Mesh:
    """The first of the devices, as many as the sizes ask for."""
    shape = tuple(sizes.values())
    first = np.array(devices).ravel()[: math.prod(shape)]
    kinds = kind if isinstance(kind, tuple) else (kind,) * len(shape)
    return Mesh((first[::-1] if reverse else first).reshape(shape), tuple(sizes), axis_types=kinds)


def make_mesh(sizes: dict[str, int], kind: AxisType | tuple[AxisType, ...], reverse: bool = False) -> Mesh:
    """A mesh of these sizes, or of smaller ones where there are fewer devices."""
    devices, sizes = find_devices(), dict(sizes)
    while (count := math.prod(sizes.values())) > len(devices):
        # Of axes of one size the experts' is the last one to be halved.
        largest = max(sizes, key=lambda axis: (sizes[axis], axis != "expert"))
        if sizes[largest] % 2:
            pytest.skip(f"needs {count} devices, and there are {len(devices)}")
        sizes[largest] //= 2
    return mesh_of(devices, sizes, kind, reverse)


def gpu_mesh(kind: AxisType = AUTO, reverse: bool = False, **sizes: int) -> Mesh:
    """A mesh of GPUs; skips the test where there are too few."""
    if reason := why_no_gpus(math.prod(sizes.values())):
        pytest.skip(reason)
    return mesh_of(gpus(), sizes, kind, reverse)


def place(mesh: Mesh, value: Any, *entries: Any) -> Any:
    """The value on the mesh; of the axes in `entries`, those that the mesh has.

    From the host: every process has all of the value, and puts its part on its devices.
    """
    kept = [tuple(a for a in ((e,) if isinstance(e, str) else e or ()) if a in mesh.shape) or None for e in entries]
    sharding = NamedSharding(mesh, P(*kept))

    def place_part(leaf: Any) -> jax.Array:
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])

    return jax.tree.map(place_part, value)


def place_all(
    mesh: Mesh, arguments: tuple[Any, ...], tokens: Any = ("data", "expert"), experts: Any = "expert"
) -> tuple[Any, ...]:
    """Arguments of `moe`, a `Layer` or a `Problem`, with their tokens and experts over these axes."""
    x, weights, ids, topk_weights = arguments[:4]
    x, ids, topk_weights = (place(mesh, value, tokens) for value in (x, ids, topk_weights))
    return x, place(mesh, weights, experts), ids, topk_weights


def moe_and_load(*arguments: Any) -> tuple[jax.Array, jax.Array]:
    return mm.moe(*arguments, return_expert_load=True)


def assert_both_match_model(result: tuple[jax.Array, jax.Array], layer: Layer) -> None:
    assert_matches_model(result[0], layer)
    np.testing.assert_array_equal(result[1], layer.load)


def scan_over_layers(x: jax.Array, stacked: mm.ExpertWeights, ids: jax.Array, topk_weights: jax.Array) -> jax.Array:
    def step(carry: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        return mm.moe(carry, stacked, ids, topk_weights, layer=index), None

    return jax.lax.scan(step, x, jnp.arange(len(stacked.gate_up), dtype=jnp.int32))[0]
