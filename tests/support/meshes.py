"""Meshes over the devices that a test is to use, eight of a CPU or two, four or eight GPUs, and the layer on them."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from tests.support.expert_layer import Layer, check

# As they are on eight devices.
MESHES = {
    "expert": {"expert": 8},
    "data x expert": {"data": 2, "expert": 4},
    "expert x model": {"expert": 4, "model": 2},
    "data alone": {"data": 8},
    "one device": {"data": 1, "expert": 1},
}
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit

# What devices `make_mesh` takes; tests that run on GPUs set it.
platform = "cpu"


def find_devices() -> list[Any]:
    """All that one mesh is made of: a power of two of them, at most eight."""
    try:
        found = jax.devices(platform)
    except RuntimeError:
        return []
    return found[: 1 << min(3, len(found).bit_length() - 1)]


def make_mesh(sizes: dict[str, int], kind: AxisType | tuple[AxisType, ...], reverse: bool = False) -> Mesh:
    """A mesh of these sizes, or of smaller ones where there are fewer devices."""
    devices, sizes = find_devices(), dict(sizes)
    while (count := int(np.prod(list(sizes.values())))) > len(devices):
        # Of axes of one size the experts' is the last one to be halved.
        largest = max(sizes, key=lambda axis: (sizes[axis], axis != "expert"))
        if sizes[largest] % 2:
            pytest.skip(f"needs {count} devices, and there are {len(devices)}")
        sizes[largest] //= 2
    kinds = kind if isinstance(kind, tuple) else (kind,) * len(sizes)
    devices = devices[:count]
    array = np.array(devices[::-1] if reverse else devices).reshape(tuple(sizes.values()))
    return Mesh(array, tuple(sizes), axis_types=kinds)


def place(mesh: Mesh, value: Any, *entries: Any) -> Any:
    """The value on the mesh; of the axes in `entries`, those that the mesh has."""
    kept = [tuple(a for a in ((e,) if isinstance(e, str) else e or ()) if a in mesh.shape) or None for e in entries]
    return jax.device_put(value, NamedSharding(mesh, P(*kept)))


def place_all(mesh: Mesh, layer: Layer, tokens: Any = ("data", "expert"), experts: Any = "expert") -> tuple[Any, ...]:
    x, ids, probs = (place(mesh, value, tokens) for value in (layer.x, layer.ids, layer.probs))
    return x, place(mesh, layer.weights, experts), ids, probs


def moe_and_load(*arguments: Any) -> tuple[jax.Array, jax.Array]:
    return mm.moe(*arguments, return_expert_load=True)


def check_both(result: tuple[jax.Array, jax.Array], layer: Layer) -> None:
    check(result[0], layer)
    np.testing.assert_array_equal(result[1], layer.load)


def scan_over_layers(x: jax.Array, stacked: mm.ExpertWeights, ids: jax.Array, probs: jax.Array) -> jax.Array:
    def step(carry: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        return mm.moe(carry, stacked, ids, probs, layer=index), None

    return jax.lax.scan(step, x, jnp.arange(len(stacked.gate_up), dtype=jnp.int32))[0]


def opcodes_of_large_results(text: str, num_elements: int) -> set[str]:
    """The opcodes of the instructions in compiled HLO that give an array of at least so many elements."""
    found = set()
    for line in text.splitlines():
        match = re.match(r"\s*(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][\w-]*)\(", line)
        if match is None:
            continue
        shapes = re.findall(r"[a-z]\w*\[([\d,]+)\]", match[1])
        if any(np.prod([int(n) for n in shape.split(",")]) >= num_elements for shape in shapes):
            found.add(match[2])
    return found
