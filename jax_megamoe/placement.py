"""On which mesh a call runs, and over which of its axes experts and tokens are split."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from jax_megamoe import _compat
from jax_megamoe.arrays import require_device_memory, require_same_devices, text_of
from jax_megamoe.errors import ShapeError, ShardingError
from jax_megamoe.primitives import _specs
from jax_megamoe.primitives._specs import Axes, axes_text
from jax_megamoe.weights import ExpertWeights

AxisNames = str | tuple[str, ...] | None


class DefaultAxes(tuple[str, ...]):
    """Names of axes that stand in a signature: a mesh need not have them, other than those that a caller passes."""


EXPERT_AXIS = DefaultAxes(("expert",))
TOKEN_AXES = DefaultAxes(("data", "expert"))

_REMEDIES = {
    "expert_axis": "pass the axis that splits the experts, or None where each device has all of them",
    "token_axes": "pass the axes that split the tokens, or None where each device has all of them",
}


def find_placement(
    x: jax.Array,
    weights: ExpertWeights,
    topk_ids: jax.Array,
    topk_weights: jax.Array,
    shared: Mapping[str, Any],
    *,
    expert_axis: AxisNames,
    token_axes: AxisNames,
) -> tuple[AbstractMesh, Axes]:
    """The mesh that a call of `moe` is on, empty on one device, and its axes that split experts and tokens.

    `shared` are the arrays of shared experts, by name. Raises `ShardingError` for arrays in host memory, on meshes that
    don't go together or on other devices, for axes that the mesh lacks, for shared experts that are split, and where
    nothing says how the tokens are split; `ShapeError` for another number of experts.
    """
    tokens = {"x": x, "topk_ids": topk_ids, "topk_weights": topk_weights}
    arrays = {**tokens, **weights_by_name(weights), **shared}
    for name, array in arrays.items():
        require_device_memory(name, array, name.partition(".")[0])
    require_same_devices(arrays)
    mesh = _find_mesh(arrays, _names(expert_axis))
    axes = Axes(
        axes_in_mesh("expert_axis", expert_axis, mesh),
        axes_in_mesh("token_axes", token_axes, mesh),
    )
    _check_replicated(shared, mesh, axes.experts)
    if mesh.manual_axes:
        _check_tokens_in_shard_map(mesh, axes, token_axes)
    else:
        _check_number_of_experts(weights)
    return mesh, axes


def find_placement_of_weights(
    weights: ExpertWeights, *, expert_axis: AxisNames
) -> tuple[AbstractMesh, tuple[str, ...]]:
    """The mesh of a call that takes weights alone, empty on one device, and its axes that split the experts.

    Raises `ShardingError` and `ShapeError` as `find_placement`.
    """
    arrays = weights_by_name(weights)
    for name, array in arrays.items():
        require_device_memory(name, array, "weights")
    require_same_devices(arrays)
    mesh = _find_mesh(arrays, _names(expert_axis))
    if not mesh.manual_axes:
        _check_number_of_experts(weights)
    return mesh, axes_in_mesh("expert_axis", expert_axis, mesh)


def _check_replicated(shared: Mapping[str, Any], mesh: AbstractMesh, expert_axes: tuple[str, ...]) -> None:
    """Raises `ShardingError` where types, or arrays that are not traced, say that devices have other shared experts."""
    for name, leaf in shared.items():
        if name == "shared_weights":
            continue
        is_known = not isinstance(leaf, jax.core.Tracer) and isinstance(getattr(leaf, "sharding", None), NamedSharding)
        spec = leaf.sharding.spec if is_known else jax.typeof(leaf).sharding.spec
        axes = [axis for dim in _specs.axes_of_dims(spec, leaf.ndim) for axis in dim]
        if mesh.manual_axes and _compat.tracks_varying():
            varying = _compat.varying_axes(leaf)
            axes += [axis for axis in expert_axes if axis in varying and mesh.shape[axis] > 1]
        if axes:
            raise ShardingError(
                f"{name} is split over {axes_text(axes)}, wanted all shared experts on each device: "
                "replicate them once, when they are loaded."
            )


def _names(axes: AxisNames) -> Sequence[str]:
    """The names, as far as it is names that were passed."""
    wanted = (axes,) if isinstance(axes, str) else axes
    return wanted if isinstance(wanted, tuple | list) else ()


def weights_by_name(weights: ExpertWeights) -> dict[str, Any]:
    """The leaves of the weights, by the names that messages have for them."""
    return {f"weights.{name}": leaf for name, leaf in weights.leaves._asdict().items()}


def axes_in_mesh(name: str, axes: AxisNames, mesh: AbstractMesh) -> tuple[str, ...]:
    """Those of the axes that the mesh has, in the given order.

    Raises `ShardingError` for what is no name, for a repetition, and for a name that a mesh of devices lacks, unless it
    is a default.
    """
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    if not isinstance(names, tuple | list) or not all(isinstance(axis, str) for axis in names):
        raise ShardingError(
            f"{name} is {text_of(axes)}, wanted the name of a mesh axis, a tuple of names, or None: {_REMEDIES[name]}."
        )
    if len(set(names)) != len(names):
        raise ShardingError(f"{name} is {text_of(axes)}, wanted each mesh axis once: drop the repetition.")
    absent = [axis for axis in names if axis not in mesh.shape]
    if absent and not mesh.empty and not isinstance(axes, DefaultAxes):
        raise ShardingError(
            f"{name} is {text_of(axes)} and the mesh has no axis {axes_text(absent)}, wanted some of its axes "
            f"{axes_text(mesh.axis_names)}: {_REMEDIES[name]}."
        )
    return tuple(axis for axis in names if axis in mesh.shape)


def _find_mesh(arrays: Mapping[str, Any], expert_axes: Sequence[str]) -> AbstractMesh:
    """The mesh of the context, else one of the arguments', else an empty one.

    Of the arguments' meshes those with explicit axes come first, then those with the axes of the experts.
    """
    context = jax.sharding.get_abstract_mesh()
    found = {name: jax.typeof(array).sharding.mesh for name, array in arrays.items()}
    found = {name: mesh for name, mesh in found.items() if not mesh.empty}
    if not found or context.manual_axes:
        return context
    if not context.empty:
        chosen, of = context, "the mesh of the context"
    else:
        name = min(found, key=lambda n: (not _is_explicit(found[n]), not set(expert_axes) <= set(found[n].axis_names)))
        chosen, of = found[name], f"that of {name}"
    for name, mesh in found.items():
        dims = _specs.axes_of_dims(jax.typeof(arrays[name]).sharding.spec, arrays[name].ndim)
        explicit_axes = _specs.axes_of_type(chosen, AxisType.Explicit)
        differs = any(
            axis not in explicit_axes or chosen.shape[axis] != mesh.shape[axis] for dim in dims for axis in dim
        )
        if mesh != chosen and (differs or (context.empty and _is_explicit(mesh))):
            raise ShardingError(
                f"{name} is on the mesh ({mesh_text(mesh)}), wanted {of} ({mesh_text(chosen)}), since its axes are "
                "explicit: put all arguments on one mesh with jax.device_put or jax.sharding.reshard."
            )
    return chosen


def _is_explicit(mesh: AbstractMesh) -> bool:
    return AxisType.Explicit in mesh.axis_types


def tell_devices(arrays: Sequence[Any]) -> list[Any]:
    """The same arrays, one of them marked where only arrays in a closure are on the mesh of a traced program.

    JAX finds the devices of the program in the mark; in the constants that a primitive reads it doesn't look for them.
    """
    arrays = list(arrays)
    if not jax.sharding.get_abstract_mesh().empty:
        return arrays
    traced = (array for array in arrays if isinstance(array, jax.core.Tracer))
    if all(jax.typeof(array).sharding.mesh.empty for array in traced):
        places = [i for i, array in enumerate(arrays) if isinstance(getattr(array, "sharding", None), NamedSharding)]
        if places:
            first = places[0]
            arrays[first] = jax.device_put(arrays[first], arrays[first].sharding)
    return arrays


def _check_tokens_in_shard_map(mesh: AbstractMesh, axes: Axes, token_axes: AxisNames) -> None:
    """Default names that match no axis are no word of the caller's that ranks have the same tokens."""
    if _compat.tracks_varying() or not isinstance(token_axes, DefaultAxes):
        return
    unknown = [a for a in axes.experts if a in mesh.manual_axes and a not in axes.tokens and mesh.shape[a] > 1]
    if unknown:
        raise ShardingError(
            f"token_axes is left out, and inside jax.shard_map with check_vma=False nothing else says whether tokens "
            f"are split over {axes_text(unknown)}, wanted the names of the axes that split them, of "
            f"{axes_text(mesh.axis_names)}: pass token_axes, or token_axes=() where all devices have the same tokens."
        )


def _check_number_of_experts(weights: ExpertWeights) -> None:
    held, said = weights.gate_up.shape[-4], weights.num_experts
    if held == said:
        return
    remedy = (
        f"say so with num_experts={held} where they are made, or with dataclasses.replace(weights, num_experts={held})"
        if held > said
        else "slices of the arrays are weights inside jax.shard_map only; to leave experts out for good say so with "
        f"dataclasses.replace(weights, num_experts={held})"
    )
    raise ShapeError(f"weights hold {held} of {said} experts, wanted all of them and no more: {remedy}.")


def mesh_text(mesh: AbstractMesh) -> str:
    """A mesh as messages show it: the names and sizes of its axes."""
    return ", ".join(f"{axis}: {size}" for axis, size in mesh.shape.items())
