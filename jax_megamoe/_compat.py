"""The parts of JAX that have no public name yet; nothing else in the package imports from `jax._src`.

Works with jax 0.11.2 to 0.12. Where a later version moves one of these, this is the file to change.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax._src import config as _config
from jax._src import core as _core
from jax._src import distributed as _distributed


def tracks_varying() -> bool:
    """Whether the enclosing `shard_map` tracks over which axes values vary (check_vma)."""
    return bool(_config._check_vma.value)


def varying_axes(*arrays: Any) -> frozenset[str]:
    """The manual mesh axes over which at least one of the arrays is marked as varying."""
    return frozenset[str]().union(*(jax.typeof(array).mat.varying for array in arrays))


def align_varying(arrays: Sequence[Any]) -> list[Any]:
    """Marks each array as varying over all axes over which any of them varies, as a primitive's operands have to be."""
    return list(_core.auto_insert_reshard(*arrays))


def check_varying(name: str, *avals: Any) -> None:
    """Raises where operands of a primitive vary over different axes."""
    _core.standard_vma_rule(name, *avals)


def output_aval(like: Any, shape: tuple[int, ...], dtype: Any, spec: jax.sharding.PartitionSpec) -> Any:
    """An output's abstract value that varies over the axes over which the operand `like` does.

    A new `ShapedArray` would lose that mark, and `shard_map` would then accept wrong `out_specs`.
    """
    sharding = like.sharding.update(spec=spec)
    return like.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding)


def without_varying(aval: Any, axes: frozenset[str]) -> Any:
    """The abstract value without the mark that it varies over these axes."""
    mat = aval.mat
    return aval.update(manual_axis_type=mat.update(varying=mat.varying - axes))


def devices_of_program(ctx: Any) -> tuple[Any, ...] | None:
    """The devices of the program that is lowered, inside `shard_map`, in the order of its mesh; None if JAX has no say.

    It has one inside `jax.set_mesh`, or where the mesh of the innermost `shard_map` holds devices. In the global view
    without the former, lowering is oblivious of devices by intent: JAX takes the lowering of a program again for all
    meshes of that shape. `prim_requires_devices_during_lowering` would tell them, but refuses abstract meshes, and
    programs with arrays on two meshes.
    """
    mesh = getattr(ctx.module_context.axis_context, "mesh", None)
    return tuple(mesh.devices.flat) if isinstance(mesh, jax.sharding.Mesh) else None


def num_devices_of_program(ctx: Any) -> int | None:
    """How many devices the program that is lowered runs on; None inside `shard_map`, or if JAX does not say."""
    return getattr(ctx.module_context.axis_context, "num_devices", None)


def is_exported(ctx: Any) -> bool:
    """Whether the program is lowered for `jax.export`."""
    return bool(ctx.module_context.lowering_parameters.for_export)


def call_site(ctx: Any) -> str:
    """A name for a call in the module that is lowered, another one each time, and the same in every process.

    JAX counts the channels of a module, for whatever wants a number that nothing else in it has.
    """
    module = ctx.module_context.module.operation.attributes["sym_name"].value
    return f"{module} {ctx.module_context.new_channel()}"


def share_between_processes(key: str, value: str, processes: Sequence[int], timeout_seconds: float) -> list[str]:
    """What each of the processes has put under the key, in order; this one puts `value`.

    Through the key-value store of `jax.distributed`: no collective, so that the processes need not be here at once.
    """
    this, client = jax.process_index(), _distributed.global_state.client
    if client is None:
        return [value for _ in processes]
    client.key_value_set(f"{key}/{this}", value, allow_overwrite=True)
    wait = int(timeout_seconds * 1000)
    return [value if p == this else str(client.blocking_key_value_get(f"{key}/{p}", wait)) for p in processes]
