"""How a call is split over a mesh: read off the types of explicit axes, chosen for automatic ones."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_megamoe.arrays import require_same_devices
from jax_megamoe.errors import ShapeError, ShardingError
from jax_megamoe.operands import Leaves, Operands


class Axes(NamedTuple):
    """The mesh axes that a call was given, those that its mesh has."""

    experts: tuple[str, ...]
    tokens: tuple[str, ...]


class Specs(NamedTuple):
    """Along what axes, of those that are not manual yet, a call is split."""

    tokens: tuple[tuple[str, ...], ...]  # of each leading dimension of the tokens
    experts: tuple[str, ...]  # of dimension E of the weights

    def token_spec(self) -> P:
        """The spec of x, topk_ids, topk_weights and y."""
        return P(*(axes or None for axes in self.tokens), None)

    def leaf_spec(self, ndim: int) -> P:
        """The spec of a weight leaf, with or without layers in front."""
        return P(*(None,) * (ndim - 4), self.experts or None)

    def operand_specs(self, operands: Operands) -> Operands:
        """The spec of each operand."""
        tokens = self.token_spec()
        leaves = Leaves(*(self.leaf_spec(leaf.ndim) for leaf in operands.leaves))
        shared = Leaves(*(P() for _ in operands.shared)) if operands.shared else ()
        return Operands(tokens, leaves, tokens, tokens, P(), shared)

    def load_spec(self) -> P:
        """The spec of the expert load."""
        return P(self.experts or None)


def axes_size(mesh: AbstractMesh, axes: Iterable[str]) -> int:
    """The number of devices along the axes together."""
    return math.prod(mesh.shape[axis] for axis in axes)


def axes_text(axes: Iterable[str]) -> str:
    """Axes as messages name them."""
    return ", ".join(repr(axis) for axis in axes) or "no axis"


def axes_of_type(mesh: AbstractMesh, axis_type: AxisType) -> frozenset[str]:
    """The axes of the mesh that have this type."""
    return frozenset(a for a, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == axis_type)


def choose_specs(x: Any, leaves: Leaves, mesh: AbstractMesh, axes: Axes) -> Specs:
    """The specs of a call whose tokens keep their leading dimensions, from the arguments' abstract values.

    Explicit axes split what the types say. Automatic axes split the first dimension of the tokens where they divide it,
    and the experts. Raises `ShardingError` for types that cannot be served, `ShapeError` where E does not divide.
    """
    dims = _axes_of_dims("x", x)
    if dims[-1]:
        raise ShardingError(
            f"x is {x}, wanted its last dimension, the hidden size, whole on each device: "
            "reshard it to split leading dimensions only."
        )
    tokens = list(dims[:-1])
    auto_axes = axes_of_type(mesh, AxisType.Auto)
    if tokens:
        first = (*tokens[0], *(axis for axis in axes.tokens if axis in auto_axes))
        if x.shape[0] % axes_size(mesh, first) == 0:
            tokens[0] = first
    return Specs(tuple(tokens), split_of_experts(leaves, mesh, axes.experts))


def split_of_experts(leaves: Leaves, mesh: AbstractMesh, expert_axes: tuple[str, ...]) -> tuple[str, ...]:
    """Along what axes, of those that are not manual yet, the experts are split, from the abstract values of the leaves.

    Raises `ShardingError` for types that cannot be served, `ShapeError` where E does not divide.
    """
    explicit_axes = axes_of_type(mesh, AxisType.Explicit)
    wanted = tuple(axis for axis in expert_axes if axis not in mesh.manual_axes)
    # Types may leave out axes of size one.
    typed = tuple(axis for axis in wanted if axis in explicit_axes and mesh.shape[axis] > 1)
    dims_of = {name: _axes_of_dims(f"weights.{name}", leaf) for name, leaf in leaves._asdict().items()}
    found = {
        name: tuple(axis for axis in dims[len(dims) - 4] if mesh.shape[axis] > 1) for name, dims in dims_of.items()
    }
    first = Leaves._fields[0]
    for name in Leaves._fields[1:]:
        if found[name] != found[first]:
            raise ShardingError(
                f"weights.{first} has its experts over {axes_text(found[first])} and weights.{name} over "
                f"{axes_text(found[name])}, wanted the same: reshard the weights with one spec."
            )
    for name, leaf in leaves._asdict().items():
        dims = dims_of[name]
        dim_of_experts = len(dims) - 4
        others = [axes for dim, axes in enumerate(dims) if dim != dim_of_experts and axes]
        if others or found[name] not in (typed, ()):
            wanted_split = f"dimension {dim_of_experts}, the experts, split over {axes_text(typed)} or nothing split"
            remedy = "reshard the weights once, when they are loaded"
            if not others:
                split = found[name][0] if len(found[name]) == 1 else found[name]
                remedy += f", or pass expert_axis={split!r}, which splits them"
            raise ShardingError(
                f"weights.{name} is {leaf}, wanted "
                f"{wanted_split if typed else 'nothing split without an axis of the experts'}: {remedy}."
            )
        num_experts, num_ranks = leaf.shape[dim_of_experts], axes_size(mesh, wanted)
        if num_experts % num_ranks:
            raise ShapeError(
                f"weights have {num_experts} experts, wanted a multiple of the {num_ranks} ranks along "
                f"{axes_text(wanted)}: choose another mesh, or pad the weights with experts that no id names."
            )
    return wanted if found[first] == typed else ()


def _axes_of_dims(name: str, value: Any) -> list[tuple[str, ...]]:
    spec = value.sharding.spec
    if getattr(spec, "unreduced", None):
        raise ShardingError(f"{name} is {value}, wanted no partial sums: reshard it first.")
    return axes_of_dims(spec, value.ndim)


def axes_of_dims(spec: P, ndim: int) -> list[tuple[str, ...]]:
    """The axes that a spec names for each of the dimensions of an array."""
    entries = [*spec, *(None,) * (ndim - len(spec))]
    return [() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry) for entry in entries]


def reshard(value: jax.Array, mesh: AbstractMesh, spec: P) -> jax.Array:
    """The value with the type that `shard_map` wants on explicit axes; XLA sees to the automatic ones."""
    explicit_axes = axes_of_type(mesh, AxisType.Explicit)
    if not explicit_axes:
        return value
    wanted = NamedSharding(mesh, restrict(spec, explicit_axes, value.ndim))
    return value if jax.typeof(value).sharding == wanted else jax.sharding.reshard(value, wanted)


def with_automatic_axes(function: Callable[..., Any], mesh: AbstractMesh, out_specs: Any) -> Callable[..., Any]:
    """The function with explicit axes as automatic ones inside, for array code that says nothing of shardings.

    `out_specs`: a spec for each result, with an entry for each dimension, of which the explicit axes count.
    """
    explicit_axes = axes_of_type(mesh, AxisType.Explicit)
    if not explicit_axes:
        return function
    shardings = tuple(NamedSharding(mesh, restrict(spec, explicit_axes, len(spec))) for spec in out_specs)
    automatic = jax.sharding.auto_axes(function, axes=tuple(explicit_axes), out_sharding=shardings)

    def run(*operands: Any) -> Any:
        # The mesh of the arguments' types may not be that of the context.
        with jax.sharding.use_abstract_mesh(mesh):
            return automatic(*operands)

    return run


def call_with_types(
    function: Callable[..., Any], arrays: Mapping[str, Any], out_specs: tuple[P, ...]
) -> tuple[jax.Array, ...]:
    """Array code that says nothing of shardings, called with arrays whose types may have explicit axes of one mesh.

    `out_specs` as for `with_automatic_axes`. Raises `ShardingError` for arrays on other devices, or on several meshes
    with explicit axes.
    """
    require_same_devices(arrays)
    meshes = {name: jax.typeof(array).sharding.mesh for name, array in arrays.items() if array is not None}
    explicit = {name: mesh for name, mesh in meshes.items() if axes_of_type(mesh, AxisType.Explicit)}
    for name, mesh in explicit.items():
        first = next(iter(explicit))
        if mesh != explicit[first]:
            raise ShardingError(
                f"{name} is on the mesh {mesh} and {first} on {explicit[first]}, wanted one mesh: "
                "put all arguments there with jax.device_put."
            )
    if explicit:
        function = with_automatic_axes(function, next(iter(explicit.values())), out_specs)
    return tuple(function(*arrays.values()))


def is_on_one_device() -> bool:
    """Whether what is traced here runs on one device, as far as its mesh tells: all axes are manual, or there are none.

    What runs on several without a mesh in the context is found out where it is lowered.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return all(axis in mesh.manual_axes or mesh.shape[axis] == 1 for axis in mesh.axis_names)


def restrict(spec: P, axes: frozenset[str], ndim: int) -> P:
    """The spec with only these axes in it, and an entry for every dimension."""
    kept = (tuple(axis for axis in dim if axis in axes) for dim in axes_of_dims(spec, ndim))
    return P(*(dim or None for dim in kept))
