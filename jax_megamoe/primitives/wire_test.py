"""The FFI call that tries expert parallelism's wires without the layer: memory of peers, flags, waits that end."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_megamoe.errors import GroupError
from jax_megamoe.primitives import _groups, _library

VERIFY, ROUND_TRIP, PUSH = 0, 1, 2
TRANSPORTS = {"any": 0, "peer": 1, "window": 2}
PHASES = ("none", "inbox free", "flag", "round trip", "arrival", "acknowledgement")
# Fields of a row, `WireTestRow` in cuda/diagnostics/wire_test.h.
PHASE, EPOCH, WANTED, SEEN, NANOSECONDS, MISMATCHES, AXIS_INDEX, BYTES = range(8)


class WireTest(NamedTuple):
    """What a launch does; the numbers are the attributes of the FFI call."""

    mode: int = VERIFY
    bytes: int = 1 << 20
    iterations: int = 1
    shift: int = 0  # PUSH: to the rank that is so much higher, around the end; 0 means to all others at once
    mute: int = -1  # a rank that keeps silent
    timeout_microseconds: int = 30_000_000
    transport: int = TRANSPORTS["any"]


def run(mesh: Mesh, expert_axes: tuple[str, ...], test: WireTest, launches: int = 1) -> np.ndarray:
    """Rows int64[launches, num_devices, num_ranks, 8] of that many launches in one program, one after the other.

    Devices are in the order of the mesh; row r is what the device found out about rank r of its group. Every process
    gets all rows.
    """
    return gather_rows(program(mesh, expert_axes, test, launches)())


def gather_rows(words: jax.Array) -> np.ndarray:
    """The result of a `program` as `run` returns it."""
    gathered: Any = multihost_utils.process_allgather(words, tiled=True)
    return np.ascontiguousarray(np.asarray(gathered, np.uint32)).view(np.int64)


def program(mesh: Mesh, expert_axes: tuple[str, ...], test: WireTest, launches: int) -> Any:
    """The jitted program behind `run`: no operands -> uint32[launches, num_devices, num_ranks, 16]."""
    _library.check_kernel_available()
    attributes: dict[str, Any] = {name: np.int64(value) for name, value in test._asdict().items()}
    attributes |= _groups.group_attributes(dict(mesh.shape), expert_axes)
    num_ranks = math.prod(mesh.shape[axis] for axis in expert_axes)

    def launch(rank: jax.Array) -> jax.Array:
        # Eight int64 as pairs of words: JAX has none by default.
        result = jax.ShapeDtypeStruct((num_ranks, 16), jnp.uint32)
        return jax.ffi.ffi_call(_library.WIRE_TEST_TARGET, result, has_side_effect=True)(rank, **attributes)

    def per_device() -> jax.Array:
        rank = jax.lax.axis_index(expert_axes).reshape(1) if expert_axes else jnp.zeros(1, jnp.int32)
        rows = []
        for _ in range(launches):
            rows.append(launch(rank))
            # Ordered by data: the next launch waits for this one.
            rank, rows[-1] = jax.lax.optimization_barrier((rank, rows[-1]))
        return jnp.stack(rows)[:, None]

    spec = P(None, tuple(mesh.axis_names))
    return jax.jit(jax.shard_map(per_device, mesh=mesh, in_specs=(), out_specs=spec, check_vma=False))


def check_rows(rows: np.ndarray, mesh: Mesh, expert_axes: tuple[str, ...]) -> None:
    """Raises `GroupError` for the first wait that came to no end, wrong word or wrong rank in the rows."""
    groups = _groups.replica_groups(dict(mesh.shape), expert_axes)
    for launch, of_devices in enumerate(rows):
        for rank in range(groups.shape[1]):
            for device in groups[:, rank]:
                for peer, row in enumerate(of_devices[device]):
                    where = f"launch {launch}: rank {rank} (device {device} of the mesh), epoch {row[EPOCH]}"
                    if row[PHASE]:
                        raise GroupError(
                            f"{where}, phase {PHASES[row[PHASE]]}: rank {peer} did not come, its flag is {row[SEEN]}, "
                            f"wanted {row[WANTED]}: see whether that process is alive and runs the same program."
                        )
                    if row[MISMATCHES]:
                        raise GroupError(
                            f"{where}: {row[MISMATCHES]} of {row[BYTES] // 8} words from rank {peer} are wrong, "
                            "wanted none: the transport does not order pushes before flags."
                        )
                    if row[EPOCH] and row[AXIS_INDEX] != rank:
                        raise GroupError(
                            f"{where}: the communicator's rank is {rank} and jax.lax.axis_index is {row[AXIS_INDEX]}, "
                            "wanted the same: the replica groups are in another order than the mesh."
                        )
