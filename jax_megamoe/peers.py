"""`python -m jax_megamoe.peers` says how the GPUs of an expert axis reach each other, and how fast.

Prints the topology, who can access whose memory, the transport that was chosen, a check of pushed data over many
launches, the round trip of a flag in microseconds and pushes in GB/s. One process with all GPUs, or with
`--processes N` one process for each of N GPUs, as under `jax.distributed`. Exit status 1 where anything is wrong.
"""

import argparse
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_megamoe import provenance
from jax_megamoe.errors import MegaMoEError

# Functions of this module before they had one of their own.
from jax_megamoe.expert_parallel import buffer_bytes as buffer_bytes
from jax_megamoe.expert_parallel import failures as failures
from jax_megamoe.primitives import _library, wire_test
from jax_megamoe.primitives.wire_test import WireTest

_ADDRESS, _PROCESS = "MEGAMOE_PEERS_ADDRESS", "MEGAMOE_PEERS_PROCESS"
_AXES = ("expert",)
_MOST_PROCESSES = 32  # of a group
_SECONDS_TO_SAY = 10.0  # until the others are ended, once a process has failed: they know something, too


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jax_megamoe.peers", description=__doc__)
    parser.add_argument("--processes", type=int, default=1, help="one process per GPU, so many; 1: one for all GPUs")
    parser.add_argument("--transport", default="any", choices=tuple(wire_test.TRANSPORTS))
    parser.add_argument("--launches", type=int, default=200, help="checked launches")
    parser.add_argument("--bytes", type=int, default=1 << 20, help="of a push, a multiple of 16")
    parser.add_argument("--reverse", action="store_true", help="the devices in reverse order")
    parser.add_argument("--mute", type=int, default=-1, help="a rank that keeps silent: the others' waits have to end")
    parser.add_argument("--commit", default=None, help="where the package is in no git checkout")
    parser.add_argument("--output", type=pathlib.Path, default=None, help="a JSON file")
    options = parser.parse_args(argv)
    if not 1 <= options.processes <= _MOST_PROCESSES:
        parser.error(f"--processes is {options.processes}, wanted 1 to {_MOST_PROCESSES}: one for each GPU of a host.")
    if options.processes > 1 and _PROCESS not in os.environ:
        return _launch(options.processes, sys.argv[1:] if argv is None else argv)
    if options.processes > 1:
        process = int(os.environ[_PROCESS])
        jax.distributed.initialize(os.environ[_ADDRESS], options.processes, process, local_device_ids=[process])
    if jax.default_backend() != "gpu":
        print(
            "error: this process sees no GPU, wanted some whose wires can be measured: run it where "
            "`python -m jax_megamoe doctor` lists them.",
            file=sys.stderr,
        )
        return 1
    try:
        return _report(options)
    except (MegaMoEError, jax.errors.JaxRuntimeError) as error:
        print(f"process {jax.process_index()}: FAILED: {error}", file=sys.stderr)
        return 1


def _launch(processes: int, arguments: list[str]) -> int:
    """Starts the processes on this host and waits for them; one that fails ends the others."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        address = f"localhost:{listener.getsockname()[1]}"
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "jax_megamoe.peers", *arguments],
            env={**os.environ, _ADDRESS: address, _PROCESS: str(process)},
        )
        for process in range(processes)
    ]
    end = time.monotonic() + 540
    try:
        while True:
            status = max(abs(child.poll() or 0) for child in children)
            if all(child.returncode is not None for child in children):
                return status
            if time.monotonic() > end:
                return status or 1
            time.sleep(0.1)
            if status:
                end = min(end, time.monotonic() + _SECONDS_TO_SAY)
    finally:
        for child in children:
            child.kill()


def _report(options: argparse.Namespace) -> int:
    is_first = jax.process_index() == 0
    say = print if is_first else _say_nothing
    devices = jax.devices()[::-1] if options.reverse else jax.devices()
    mesh = Mesh(np.array(devices), _AXES)
    result: dict[str, Any] = {
        **provenance.describe(options.commit),
        "num_devices": len(devices),
        "processes": jax.process_count(),
        "reverse": options.reverse,
        "bytes": options.bytes,
    }
    say(f"{result['num_devices']} x {result['device']}, {result['processes']} processes, jax {result['jax']}")
    if is_first:
        _print_topology()
    result["access"] = _access_of_local_devices()
    say("peer access of this process's devices (row reaches column):")
    for row in result["access"]:
        say("  " + " ".join("yes" if value else " no" for value in row))

    test = WireTest(bytes=options.bytes, transport=wire_test.TRANSPORTS[options.transport], mute=options.mute)
    if options.mute >= 0:
        test = test._replace(timeout_microseconds=2_000_000)
    # Once alone, so that the set-up is seen to work before anything is captured, then many in one program.
    first = wire_test.program(mesh, _AXES, test, 1)
    wire_test.check_rows(wire_test.gather_rows(first()), mesh, _AXES)
    # While `first` is there: inside one process the memory goes with the last program that uses it.
    result["transports"] = sorted({memory["transport"] for memory in _library.symmetric_memories()})
    say(f"transport: {', '.join(result['transports'])}")
    for _ in range(-(-options.launches // 20)):
        _run(mesh, test, 20)
    say(f"{options.launches} launches of {options.bytes} bytes to every peer: all words right, ranks as axis_index")
    result["round_trip_us"] = _round_trips(mesh, test)
    _print_matrix(say, "flag round trip, us", result["round_trip_us"])
    result["push_us"], result["push_gb_per_s"] = _pushes(mesh, test)
    _print_matrix(say, f"one push of {options.bytes} bytes and its acknowledgement, us", result["push_us"])
    _print_matrix(say, "pushes to one peer, GB/s", result["push_gb_per_s"])
    result["push_to_all_gb_per_s"] = _push_to_all(mesh, test)
    say(f"pushes to all peers at once, GB/s out of each rank: {_cells(result['push_to_all_gb_per_s'])}")
    if options.output is not None and is_first:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _say_nothing(*_: Any) -> None:
    pass


def _print_topology() -> None:
    try:
        topology = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, check=False)
    except OSError:
        print("no nvidia-smi on this machine")
        return
    print(topology.stdout.strip())


def _access_of_local_devices() -> list[list[bool]]:
    _library.check_kernel_available()
    ids = [device.local_hardware_id for device in jax.local_devices()]
    return [[_library.can_access_peer(one, other) for other in ids] for one in ids]


def _run(mesh: Mesh, test: WireTest, launches: int) -> np.ndarray:
    rows = wire_test.run(mesh, _AXES, test, launches)
    wire_test.check_rows(rows, mesh, _AXES)
    return rows


def _round_trips(mesh: Mesh, test: WireTest) -> list[list[float]]:
    rounds = 1000
    rows = _run(mesh, test._replace(mode=wire_test.ROUND_TRIP, iterations=rounds), 3)
    return (rows[1:, :, :, wire_test.NANOSECONDS].min(axis=0) / rounds / 1e3).tolist()


def _pushes(mesh: Mesh, test: WireTest) -> tuple[list[list[float]], list[list[float]]]:
    """Microseconds of one push and GB/s of many, from each rank to each other."""
    num_ranks = mesh.devices.size
    microseconds, rates = np.zeros((2, num_ranks, num_ranks))
    for shift in range(num_ranks):
        if shift == 0 and num_ranks > 1:
            continue
        one = _run(mesh, test._replace(mode=wire_test.PUSH, shift=shift), 5)[1:].min(axis=0)
        many = _run(mesh, test._replace(mode=wire_test.PUSH, shift=shift, iterations=64), 5)[1:].min(axis=0)
        for rank in range(num_ranks):
            peer = (rank + shift) % num_ranks
            microseconds[rank, peer] = one[rank, peer, wire_test.NANOSECONDS] / 1e3
            rates[rank, peer] = many[rank, peer, wire_test.BYTES] / many[rank, peer, wire_test.NANOSECONDS]
    return microseconds.tolist(), rates.tolist()


def _push_to_all(mesh: Mesh, test: WireTest) -> list[float]:
    rows = _run(mesh, test._replace(mode=wire_test.PUSH, iterations=64), 5)[1:]
    slowest = rows[:, :, :, wire_test.NANOSECONDS].max(axis=2)
    return (rows[:, :, :, wire_test.BYTES].sum(axis=2) / np.maximum(slowest, 1)).max(axis=0).tolist()


def _cells(values: list[float]) -> str:
    return " ".join(f"{value:8.2f}" for value in values)


def _print_matrix(say: Any, title: str, rows: list[list[float]]) -> None:
    say(f"{title} (row to column):")
    for row in rows:
        say("  " + _cells(row))


if __name__ == "__main__":
    sys.exit(main())
