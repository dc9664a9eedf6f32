"""Whether the ranks of an expert axis can reach each other's memory: the fused kernel needs it, collectives do not."""

import functools
import json
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jax_megamoe.primitives import _compat, _groups, _library

# Processes may differ by so much in how long they trace and compile.
_TIMEOUT_SECONDS = 300.0


def reason_for_collectives(axis_sizes: Mapping[str, int], expert_axes: Sequence[str]) -> str | None:
    """Why the expert axis of a program for GPUs has to go through XLA's collectives; None where it needs not.

    `axis_sizes` are those of the whole mesh, in its order. The answer is the same in every process of the program, as
    it has to be. The mesh, whose devices are not known while lowering, is taken to be in JAX's own order: where it is
    not, and the ranks turn out to be on different hosts, the set-up of the fused kernel ends in an error that says so.
    """
    groups = _groups.replica_groups(axis_sizes, expert_axes)
    devices = _devices_of_mesh(groups.size)
    if devices is None or groups.shape[1] == 1:
        return None
    return _reason(tuple(devices), tuple(map(tuple, groups.tolist())))


def _devices_of_mesh(size: int) -> list[Any] | None:
    """The devices of a mesh of that size, or None where the program may be for another machine."""
    try:
        everywhere, here = jax.devices("cuda"), jax.local_devices(backend="cuda")
    except RuntimeError:
        return None
    if size == len(everywhere):
        return list(everywhere)
    return list(here[:size]) if size <= len(here) else None


@functools.lru_cache(maxsize=64)
def _reason(devices: tuple[Any, ...], groups: tuple[tuple[int, ...], ...]) -> str | None:
    processes = sorted({device.process_index for device in devices})
    facts = dict(zip(processes, _facts_of(processes), strict=True))
    for group in groups:
        members = [devices[position] for position in group]
        hosts = {facts[device.process_index]["host"] for device in members}
        if len(hosts) > 1:
            names = sorted({facts[device.process_index]["name"] for device in members})
            return f"the {len(group)} ranks of an expert group are on {len(hosts)} hosts ({', '.join(names)})"
        for process in sorted({device.process_index for device in members}):
            if unreachable := facts[process]["unreachable"]:
                one, other = unreachable
                return f"GPU {one} of process {process} has no access to the memory of GPU {other}"
    return None


def _facts_of(processes: Sequence[int]) -> list[dict[str, Any]]:
    own = json.dumps(_own_facts())
    return [
        json.loads(text)
        for text in _compat.share_between_processes("jax_megamoe/peers", own, processes, _TIMEOUT_SECONDS)
    ]


@functools.cache
def _own_facts() -> dict[str, Any]:
    """This process's host, and two of its GPUs that can't reach each other, if there are such."""
    ids = [device.local_hardware_id for device in jax.local_devices(backend="cuda")]
    pairs = ((one, other) for one in ids for other in ids)
    unreachable = next((pair for pair in pairs if not _library.can_access_peer(*pair)), None)
    # The same for all containers of a host, which the name is not.
    boot = Path("/proc/sys/kernel/random/boot_id")
    name = socket.gethostname()
    return {"host": boot.read_text().strip() if boot.exists() else name, "name": name, "unreachable": unreachable}
