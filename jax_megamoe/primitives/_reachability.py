"""Whether the ranks of an expert axis can reach each other's memory: the fused kernel needs it, collectives do not."""

import functools
import json
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jax_megamoe import _compat
from jax_megamoe.errors import GroupError
from jax_megamoe.primitives import _gpus, _groups, _library

# Processes may differ by so much in how long they trace and compile.
_TIMEOUT_SECONDS = 300.0


class Place(NamedTuple):
    """Where a device is: its process, and its number among all devices of the job.

    Not its number in its process, which JAX tells of that process's own devices only.
    """

    process: int
    device: int


def reason_for_collectives(
    devices: Sequence[Any] | None, axis_sizes: Mapping[str, int], expert_axes: Sequence[str]
) -> str | None:
    """Why the expert axis of a program for GPUs has to go through XLA's collectives; None where it needs not.

    `devices` are those of the program in the order of its mesh, None where they are not known; `axis_sizes` are those
    of the whole mesh, in its order. The answer is the same in every process of the program, as it has to be. Without
    `devices`, the kernel is taken where it serves whatever they are.
    """
    groups = _groups.replica_groups(axis_sizes, expert_axes)
    if groups.shape[1] == 1:
        return None
    everywhere = _gpus_of_job()
    if devices is None:
        return _reason_for_any(tuple(map(_place, everywhere)), groups.size)
    if not set(devices) <= set(everywhere):
        return None  # For another machine.
    subject = f"the {groups.shape[1]} ranks of an expert group"
    return _reason(subject, tuple(map(_place, devices)), tuple(map(tuple, groups.tolist())))


def _gpus_of_job() -> list[Any]:
    try:
        return jax.devices("cuda")
    except RuntimeError:
        return []


def _place(device: Any) -> Place:
    return Place(device.process_index, device.id)


def _reason_for_any(places: tuple[Place, ...], num_devices: int) -> str | None:
    """The reason where a program takes some of these GPUs, in an order that is not known."""
    if num_devices > len(places):
        return None  # For another machine.
    unknown = "which GPU has which rank is known inside jax.set_mesh(mesh) only"
    if num_devices < len(places) and len({place.process for place in places}) > 1:
        # Processes that have no part in the program would never answer.
        return f"{unknown}, and the mesh has {num_devices} of {len(places)}"
    reason = _reason(f"the {len(places)} GPUs", places, (tuple(range(len(places))),))
    return reason and f"{unknown}, and {reason}"


@functools.lru_cache(maxsize=64)
def _reason(subject: str, places: tuple[Place, ...], groups: tuple[tuple[int, ...], ...]) -> str | None:
    processes = sorted({place.process for place in places})
    facts = dict(zip(processes, _facts_of(processes), strict=True))
    reasons = (_reason_of_group(subject, [places[position] for position in group], facts) for group in groups)
    return next((reason for reason in reasons if reason), None)


def _reason_of_group(subject: str, members: Sequence[Place], facts: Mapping[int, Mapping[str, Any]]) -> str | None:
    involved = [facts[process] for process in sorted({place.process for place in members})]
    if (hosts := len({fact["host"] for fact in involved})) > 1:
        names = ", ".join(sorted({fact["name"] for fact in involved}))
        return f"{subject} are on {hosts} hosts ({names})"
    if (namespaces := len({fact["ipc"] for fact in involved})) > 1:
        return f"{subject} are in {namespaces} IPC namespaces, as containers have them"
    places = {facts[place.process]["gpus"][str(place.device)]: place for place in members}
    for fact in involved:
        for one, other in fact["unreachable"]:
            if one in places and other in places:
                pair = (f"GPU {place.device} of process {place.process}" for place in (places[one], places[other]))
                return " has no access to the memory of ".join(pair)
    return None


def _facts_of(processes: Sequence[int]) -> list[dict[str, Any]]:
    own = json.dumps(_own_facts())
    try:
        texts = _compat.share_between_processes("jax_megamoe/peers", own, processes, _TIMEOUT_SECONDS)
    except jax.errors.JaxRuntimeError as error:  # of the store where they meet
        reason = (str(error).splitlines() or ["no reason"])[0]
        raise GroupError(
            f"a process of {', '.join(map(str, processes))} has not told of its GPUs ({reason}), wanted all of them to "
            f"lower this program within {_TIMEOUT_SECONDS:g} s: see whether they are alive and run the same one."
        ) from error
    return [json.loads(text) for text in texts]


@functools.cache
def _own_facts() -> dict[str, Any]:
    """This process's host and GPUs, and which GPUs of the host they can't reach."""
    names = _gpus.bus_ids()
    # Without names, a process knows about its own GPUs only.
    local = {
        device.local_hardware_id: names[device.local_hardware_id]
        if device.local_hardware_id < len(names)
        else f"device {device.id}"
        for device in jax.local_devices(backend="cuda")
    }
    unreachable = [
        (local[one], name)
        for one in local
        for other, name in {**dict(enumerate(names)), **local}.items()
        if one != other and not _library.can_access_peer(one, other)
    ]
    return {
        "host": _library.host_identity(),
        "name": socket.gethostname(),
        "ipc": _ipc_namespace(),
        "gpus": {device.id: local[device.local_hardware_id] for device in jax.local_devices(backend="cuda")},
        "unreachable": unreachable + _gpus.unreachable(set(local.values()), set(names)),
    }


def _ipc_namespace() -> str:
    """Processes in different ones cannot map each other's memory."""
    try:
        return os.readlink("/proc/self/ns/ipc")
    except OSError:
        return ""
