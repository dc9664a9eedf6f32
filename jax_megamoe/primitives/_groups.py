"""The replica groups of the expert axis: which devices of a program talk to each other, as XLA numbers them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Apart from XLA's own (0 and 1), so that no collective of the program is ever in flight on the communicator of the
# fused kernel; the same for all calls, so that they share one. `kCommunicationId` in cuda/ffi/communicator.h.
COMMUNICATION_ID = 0x6D6F65


def replica_groups(axis_sizes: Mapping[str, int], expert_axes: Sequence[str]) -> np.ndarray:
    """Groups of devices that differ in nothing but their place along the expert axes: int64[num_groups, num_ranks].

    `axis_sizes` are those of the whole mesh, in its order. A device is named by its position in the device assignment
    of the program, which is the mesh read in row-major order, whatever devices it holds and in whatever order: XLA
    calls this the flattened id. Column r is rank r, the one that holds the r-th share of the experts: ranks count
    along `expert_axes` in their given order, the last one fastest, as `jax.lax.axis_index` does. No expert axes make
    groups of one.
    """
    names = tuple(axis_sizes)
    positions = np.arange(math.prod(axis_sizes.values()), dtype=np.int64).reshape(tuple(axis_sizes.values()))
    moved = np.moveaxis(positions, [names.index(axis) for axis in expert_axes], range(-len(expert_axes), 0))
    return moved.reshape(-1, math.prod(axis_sizes[axis] for axis in expert_axes))


def group_attributes(axis_sizes: Mapping[str, int], expert_axes: Sequence[str]) -> dict[str, Any]:
    """The groups as attributes of an FFI call, for `ReplicaGroups` in cuda/ffi/communicator.h."""
    groups = replica_groups(axis_sizes, expert_axes)
    return {"replica_groups": groups.ravel(), "group_size": np.int64(groups.shape[1])}
