"""Experts of some layers onto devices: read, packed and put into their places one after the other.

Each device gets its own experts, and only these are read. Beside the result there is never more than one expert of a
device, as read and as packed (of a cache, which needs no packing, its part of a layer), so that whatever fits on the
devices can be loaded there.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_megamoe import weight_layout
from jax_megamoe.checkpoints.layers import Layer, Recipe, choose_format, sizes_of
from jax_megamoe.checkpoints.progress import Progress, Report
from jax_megamoe.checkpoints.safetensors import Array
from jax_megamoe.errors import ArgumentError, ShapeError, ShardingError
from jax_megamoe.operands import Leaves
from jax_megamoe.quantized_packing import as_bytes
from jax_megamoe.weight_layout import Format
from jax_megamoe.weights import ExpertWeights


def load_layers(
    layers: Sequence[Layer],
    *,
    stacked: bool,
    format: Format | None = None,
    mesh: Mesh | None = None,
    axes: tuple[str, ...] = (),
    progress: Progress = None,
) -> ExpertWeights:
    """The experts of these layers, [L, E, ...] if stacked, split over `axes` of the mesh along E.

    Raises `ShapeError` for layers of different shapes, `ShardingError` where `axes` do not divide the experts, and
    `CheckpointError`.
    """
    with on_purpose(mesh):
        return _load_layers(layers, stacked, format, mesh, axes, progress)


@contextlib.contextmanager
def on_purpose(mesh: Mesh | None) -> Iterator[None]:
    """Goes to the mesh, or to the default device, whatever mesh, guards and modes of `jit` the caller has set."""
    try:
        goes_there = jax.set_mesh(mesh or Mesh(np.empty((), object), ()))
    except ValueError as error:
        raise ArgumentError(
            "a checkpoint is read inside a function that JAX traces, wanted outside of it: read it before, and pass "
            "what comes of it as an argument."
        ) from error
    # Compiled, also for a caller who has turned that off: an eager shard_map wants other arguments.
    with jax.transfer_guard("allow"), jax.disable_jit(False), goes_there:
        yield


def _load_layers(
    layers: Sequence[Layer],
    stacked: bool,
    format: Format | None,
    mesh: Mesh | None,
    axes: tuple[str, ...],
    progress: Progress,
) -> ExpertWeights:
    first = layers[0]
    for layer in layers:
        if (found := sizes_of(layer)) != sizes_of(first):
            raise ShapeError(
                f"layers have (E, H, I) {sizes_of(first)} and {found}, wanted one to stack: load them apart."
            )
    format = choose_format(layers, format)
    recipes = [layer.recipe(format) for layer in layers]
    devices = _Devices(mesh, axes, first.num_experts)
    result = devices.allocate(format, len(layers) if stacked else None, *sizes_of(first))
    report = Report(progress, sum(layer.nbytes for layer in layers) * devices.num_local * len(devices.shards))
    for index, (layer, recipe) in enumerate(zip(layers, recipes, strict=True)):
        chunk = devices.num_local if layer.is_packed else 1
        is_wrong = []
        for position in range(0, devices.num_local, chunk):
            devices.prefetch(layer, position + chunk, chunk)
            arrays = devices.read(layer, position, chunk)
            # Else reading would run ahead, and fill the devices with what waits.
            jax.block_until_ready(result)
            place = np.int32(index), np.int32(position)
            result, flags = _put(result, arrays, *place, recipe=recipe, mesh=mesh, axes=axes)
            is_wrong.append((position, flags))
            report.add(layer.nbytes * chunk * len(devices.shards))
        devices.check(layer, is_wrong, format)
        layer.release_pages()
    return ExpertWeights(*result, *sizes_of(first), layout=weight_layout.LAYOUT_TAGS[format])


class _Devices:
    """Which experts this process's devices hold: `shards` numbers the parts of `num_local` experts that are here."""

    def __init__(self, mesh: Mesh | None, axes: tuple[str, ...], num_experts: int) -> None:
        self.num_shards = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in axes)
        if num_experts % self.num_shards:
            raise ShardingError(
                f"mesh splits experts into {self.num_shards}, over {', '.join(axes)}, wanted a divisor of their "
                f"number, {num_experts}: choose another mesh."
            )
        self.num_local = num_experts // self.num_shards
        self._mesh, self._spec = mesh, axes or None
        self.shards = [0]
        if mesh is not None:
            self._sharding = NamedSharding(mesh, P(self._spec))
            places = self._sharding.addressable_devices_indices_map((self.num_shards,)).values()
            self.shards = sorted({_start(place) for place in places})

    def allocate(self, format: Format, num_layers: int | None, *sizes: int) -> Leaves:
        """Zeros for all experts, of `num_layers` layers if that is a number."""
        lead = () if num_layers is None else (num_layers,)
        sharding = None
        if self._mesh is not None:
            sharding = NamedSharding(self._mesh, P(*(None for _ in lead), self._spec))
        shapes = tuple((*lead, *shape) for shape in weight_layout.leaf_shapes(format, *sizes))
        allocated: Leaves = _zeros(shapes, format, sharding)()
        return allocated

    def prefetch(self, layer: Layer, position: int, count: int) -> None:
        """Has what `read` is going to be asked for next read from the disk meanwhile."""
        if position < self.num_local:
            for shard in self.shards:
                layer.prefetch(shard * self.num_local + position, count)

    def read(self, layer: Layer, position: int, count: int) -> Any:
        """Of each device's experts those from `position` on, on the devices: a dimension for all of them in front."""
        if self._mesh is None:
            return jax.device_put(layer.read(position, count))
        host = {shard: layer.read(shard * self.num_local + position, count) for shard in self.shards}

        def place(*parts: Array) -> jax.Array:
            shape, of_shard = (self.num_shards * count, *parts[0].shape[1:]), dict(zip(host, parts, strict=True))
            return jax.make_array_from_callback(
                shape, self._sharding, lambda index: of_shard[_start(index) // count], dtype=parts[0].dtype
            )

        return jax.tree.map(place, *host.values())

    def check(self, layer: Layer, is_wrong: Sequence[tuple[int, jax.Array]], format: Format) -> None:
        """Raises the error about an expert of this process that is wrong."""
        for position, flags in is_wrong:
            for shard in flags.addressable_shards:
                if np.asarray(shard.data).any():
                    layer.explain(_start(shard.index) * self.num_local + position, format)


@functools.lru_cache(maxsize=64)
def _zeros(shapes: tuple[tuple[int, ...], ...], format: Format, sharding: NamedSharding | None) -> Callable[[], Leaves]:
    """The program that allocates such leaves: one for all layers, as compiling it takes time and memory."""

    def zeros() -> Leaves:
        dtypes = weight_layout.LEAF_DTYPES[format]
        return Leaves(*(jnp.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)))

    return jax.jit(zeros, out_shardings=sharding)


def _start(index: Any) -> int:
    """Where a part of an array begins along the first dimension."""
    return int(index[0].start or 0)


@functools.partial(jax.jit, static_argnames=("recipe", "mesh", "axes"), donate_argnums=0)
def _put(
    result: Leaves,
    arrays: Any,
    layer: jax.Array,
    position: jax.Array,
    *,
    recipe: Recipe,
    mesh: Mesh | None,
    axes: tuple[str, ...],
) -> tuple[Leaves, jax.Array]:
    """The result with the experts in their places, and bool, for each device whether one of them is wrong."""
    lead = result.down.ndim - 4

    def put(result: Leaves, arrays: Any, layer: jax.Array, position: jax.Array) -> tuple[Leaves, jax.Array]:
        leaves, is_wrong = recipe(arrays)

        def update(whole: jax.Array, part: jax.Array) -> jax.Array:
            octets = jnp.expand_dims(as_bytes(part), tuple(range(lead)))
            zero = np.int32(0)  # A Python number is 64 bits wide where jax_enable_x64 is set.
            start: list[jax.Array | np.int32] = [*[layer][:lead], position, zero, zero, zero]
            return jax.lax.bitcast_convert_type(
                jax.lax.dynamic_update_slice(as_bytes(whole), octets, start), whole.dtype
            )

        return Leaves(*map(update, result, leaves)), is_wrong

    if mesh is None:
        return put(result, arrays, layer, position)
    of_arrays = P(axes or None)
    of_result = P(*(None for _ in range(lead)), axes or None)
    split = jax.shard_map(put, mesh=mesh, in_specs=(of_result, of_arrays, P(), P()), out_specs=(of_result, of_arrays))
    return split(result, arrays, layer, position)
