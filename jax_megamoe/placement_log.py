"""What the placement of a call costs that could be had for less: said once in the log, with what to pass instead."""

import functools
import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from jax_megamoe import _compat
from jax_megamoe.operands import Leaves
from jax_megamoe.placement import AxisNames, DefaultAxes, mesh_text, weights_by_name
from jax_megamoe.primitives import _specs
from jax_megamoe.primitives._specs import Axes, axes_text
from jax_megamoe.weights import ExpertWeights

_log = logging.getLogger("jax_megamoe")
_NOT_CALLERS = tuple(os.path.dirname(file) + os.sep for file in (__file__, jax.__file__))


def log_costs(
    x: jax.Array,
    weights: ExpertWeights,
    mesh: AbstractMesh,
    axes: Axes,
    *,
    expert_axis: AxisNames,
    token_axes: AxisNames,
    with_load: bool,
) -> None:
    """Logs where experts or tokens are gathered, or work is repeated, over mesh axes of more than one device.

    The types of automatic axes say nothing about how arrays are split. Known are the axes, and the shardings of arrays
    that are not traced.
    """
    if mesh.size == 1 or x.size == 0:
        return
    leaves = weights_by_name(weights)
    sentences = (
        _about_experts(leaves, mesh, axes, expert_axis),
        _about_tokens(x, leaves, mesh, axes, token_axes),
        _about_load(mesh, axes, token_axes) if with_load else "",
    )
    if any(sentences):
        _log_once(
            f"On the mesh ({mesh_text(mesh)}): {'; '.join(text for text in sentences if text)}.", _line_of_caller()
        )


@functools.cache
def _log_once(text: str, _: tuple[str, int]) -> None:
    """Once for each line that calls: what is said of one layer is not said of another part of a program."""
    _log.warning(text)


def _line_of_caller() -> tuple[str, int]:
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_CALLERS):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def _about_experts(leaves: Mapping[str, Any], mesh: AbstractMesh, axes: Axes, expert_axis: AxisNames) -> str:
    wanted = tuple(axis for axis in axes.experts if mesh.shape[axis] > 1)
    for name, leaf in leaves.items():
        dims = _dims_of_concrete(leaf)
        # Types of explicit axes are right, or will be errors.
        if mesh.manual_axes or AxisType.Explicit in mesh.axis_types or dims is None or not any(dims):
            continue
        dim_of_experts = leaf.ndim - 4
        found, others = dims[dim_of_experts], any(axes for dim, axes in enumerate(dims) if dim != dim_of_experts)
        if found != wanted or others:
            remedy = "place them once, "
            remedy += f"dimension {dim_of_experts} split over {axes_text(wanted)}" if wanted else "whole on each device"
            if not others and set(found) <= set(mesh.shape):
                remedy = f"pass expert_axis={(found[0] if len(found) == 1 else found)!r}, or {remedy}"
            split = axes_text(axis for dim in dims for axis in dim)
            return f"{name} is split over {split}, so that the weights are moved at every call: {remedy}"
    if axes.experts or not isinstance(expert_axis, DefaultAxes) or not _may_be_split(leaves, mesh):
        return ""
    result = "a device's experts count as all" if mesh.manual_axes else "split experts are gathered at every call"
    return (
        f"expert_axis is left out and no axis has its default name, so that {result}: pass the axis that splits the "
        "experts, or expert_axis=None where each device has all of them"
    )


def _about_tokens(
    x: jax.Array, leaves: Mapping[str, Any], mesh: AbstractMesh, axes: Axes, token_axes: AxisNames
) -> str:
    automatic = [axis for axis in mesh.axis_names if axis in _specs.axes_of_type(mesh, AxisType.Auto)]
    explicit_axes = _specs.axes_of_type(mesh, AxisType.Explicit)
    found = set(axes.tokens)
    if mesh.manual_axes and _compat.tracks_varying():
        varying = _compat.varying_axes(x, *leaves.values())
        repeated = [axis for axis in mesh.manual_axes if mesh.shape[axis] > 1 and axis not in varying]
        if repeated:
            return (
                f"x and the weights are the same along {axes_text(repeated)}, so that work is repeated: split x over "
                "them too in the in_specs of jax.shard_map"
            )
    if explicit_axes:
        specs = _specs.choose_specs(jax.typeof(x), Leaves(*(jax.typeof(leaf) for leaf in leaves.values())), mesh, axes)
        typed = {axis for dim in specs.tokens for axis in dim}
        # Nothing is padded there: axes that don't divide the first dimension are left out.
        found &= typed if x.ndim > 1 else found
        # Ranks that have other experts have the same tokens for a reason.
        repeated = [a for a in mesh.axis_names if a in explicit_axes - typed - set(specs.experts) and mesh.shape[a] > 1]
        if repeated:
            return f"x is the same along {axes_text(repeated)}, so that work is repeated: split its type over all axes"
    dims = _dims_of_concrete(x) or [()]
    if dims[-1] and not _specs.axes_of_type(mesh, AxisType.Explicit):  # Explicit ones are an error.
        return (
            f"x is split over {axes_text(dims[-1])} along its last dimension, the hidden size, so that it is moved at "
            "every call: split its leading dimensions"
        )
    split = {axis for dim in dims for axis in dim}
    # Ranks of the experts that have the same tokens on purpose repeat nothing.
    spared = () if isinstance(token_axes, DefaultAxes) else set(axes.experts) - split
    unused = [axis for axis in automatic if mesh.shape[axis] > 1 and axis not in found and axis not in spared]
    if not unused:
        return ""
    if set(unused) & set(axes.tokens):
        return f"the tokens are not split over {axes_text(unused)} and work is repeated: pad the first dimension of x"
    wanted = tuple(axis for axis in mesh.axis_names if axis in axes.tokens or axis in unused)
    return (
        f"the tokens are not split over {axes_text(unused)}, so that they are gathered or work is repeated along "
        f"{'it' if len(unused) == 1 else 'them'}: pass token_axes={wanted!r}"
    )


def _about_load(mesh: AbstractMesh, axes: Axes, token_axes: AxisNames) -> str:
    # Inside `shard_map` without marks, tokens along axes without a name count as copies. Results don't depend on it.
    if not mesh.manual_axes or _compat.tracks_varying() or not isinstance(token_axes, DefaultAxes):
        return ""
    unnamed = [a for a in mesh.axis_names if a in mesh.manual_axes and a not in (*axes.tokens, *axes.experts)]
    if not any(mesh.shape[axis] > 1 for axis in unnamed):
        return ""
    return (
        f"the expert load takes tokens along {axes_text(unnamed)} for copies: pass all axes that split the tokens as "
        "token_axes"
    )


def _may_be_split(leaves: Mapping[str, Any], mesh: AbstractMesh) -> bool:
    """Whether devices may hold different experts, as far as arrays and their types tell."""
    for leaf in leaves.values():
        dims = _dims_of_concrete(leaf)
        if dims is not None:
            if any(dims):
                return True
            continue
        if not isinstance(leaf, jax.core.Tracer):
            continue
        if set(mesh.manual_axes) != set(mesh.axis_names) and _specs.axes_of_type(mesh, AxisType.Auto):
            return True
        if mesh.manual_axes and (not _compat.tracks_varying() or _compat.varying_axes(leaf)):
            return True
    return False


def _dims_of_concrete(array: Any) -> list[tuple[str, ...]] | None:
    """The axes of more than one device that split each dimension of an array on a mesh; None for a traced one."""
    sharding = None if isinstance(array, jax.core.Tracer) else getattr(array, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    dims = _specs.axes_of_dims(sharding.spec, array.ndim)
    return [tuple(axis for axis in dim if sharding.mesh.shape[axis] > 1) for dim in dims]
