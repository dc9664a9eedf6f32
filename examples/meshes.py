"""The mesh of the decoders: tensor-parallel attention and expert-parallel experts on the same devices.

Axes ("data", "tensor"). Attention splits sequences over "data" and heads over "tensor". Experts are split over all
devices, both axes together, because a model has many more experts than key/value heads: on eight devices, Qwen3's four
key/value heads want a mesh of 2 x 4, and each device has an eighth of the experts.
"""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA, TENSOR = "data", "tensor"
EXPERT_AXIS = TOKEN_AXES = (DATA, TENSOR)


def make_mesh(data: int, tensor: int) -> Mesh:
    """A mesh of the first `data * tensor` devices."""
    devices = jax.devices()[: data * tensor]
    if not 0 < data * tensor <= len(devices):
        raise ValueError(
            f"the mesh is {data} x {tensor}, wanted one of at most {jax.device_count()} devices: choose another, or on "
            "a CPU set XLA_FLAGS=--xla_force_host_platform_device_count=8."
        )
    return jax.make_mesh((data, tensor), (DATA, TENSOR), axis_types=(AxisType.Auto,) * 2, devices=devices)


def split[Tree](tree: Tree, *spec: str | tuple[str, ...] | None) -> Tree:
    """Says how a traced array's leading dimensions are split; does nothing in a program without a mesh.

    Without it the split of tokens that `moe` wants would spread through the program, and XLA would go back and forth.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, PartitionSpec(*spec))


def place(array: jax.typing.ArrayLike, mesh: Mesh | None, *spec: str | tuple[str, ...] | None) -> jax.Array:
    """An array on the devices of the mesh, split so; on the default device without a mesh."""
    return jax.device_put(array, None if mesh is None else NamedSharding(mesh, PartitionSpec(*spec)))


def place_cache(leaf: Any, mesh: Mesh | None, *spec: str | None) -> Any:
    """An array of a cache with all layers stacked, or one for each layer; the spec is that of one layer."""
    if isinstance(leaf, tuple):
        return tuple(place(array, mesh, *spec) for array in leaf)
    return place(leaf, mesh, None, *spec)
