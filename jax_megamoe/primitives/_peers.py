"""Whether the ranks of an expert axis can reach each other's memory: the fused kernel needs it, collectives do not."""

import functools
import json
import logging
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from jax_megamoe.primitives import _compat, _groups, _library

_log = logging.getLogger("jax_megamoe")
# Processes may differ by so much in how long they trace and compile.
_TIMEOUT_SECONDS = 300.0


def reason_for_collectives(mesh: Mesh | AbstractMesh, expert_axes: Sequence[str]) -> str | None:
    """Why the expert axis of a program for GPUs has to go through XLA's collectives; None where it needs not.

    The answer is the same in every process of the program, as it has to be. It is logged once for each reason. A mesh
    without devices is taken to be in JAX's own order of devices: where it is not, and the ranks turn out to be on
    different hosts, the set-up of the fused kernel ends in an error that says so.
    """
    devices = _devices_of(mesh)
    groups = _groups.replica_groups(dict(mesh.shape), expert_axes)
    if devices is None or groups.shape[1] == 1:
        return None
    reason = _reason(tuple(devices), tuple(map(tuple, groups.tolist())))
    if reason is not None:
        _log_once(reason)
    return reason


def _devices_of(mesh: Mesh | AbstractMesh) -> list[Any] | None:
    """The devices in the order of the mesh, or None where the program may be for another machine."""
    if isinstance(mesh, Mesh):
        return list(mesh.devices.flat)
    try:
        everywhere, here = jax.devices("cuda"), jax.local_devices(backend="cuda")
    except RuntimeError:
        return None
    if mesh.size == len(everywhere):
        return list(everywhere)
    return list(here[: mesh.size]) if mesh.size <= len(here) else None


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


@functools.cache
def _log_once(reason: str) -> None:
    _log.warning(
        "implementation='collective' is used: %s, and the fused kernel writes to that memory directly.", reason
    )
