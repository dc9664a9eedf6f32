"""Programs in processes of their own, one with all GPUs or one for each of them, as under `jax.distributed`.

A module that is run so is a worker. Its `main` begins with `join`, says what happened with `say`, and ends with `leave`;
`run` starts it, ends it at a limit, and has what it said.
"""

import faulthandler
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax

from jax_megamoe import _compat

# Worker's place, and after how many seconds it prints where its threads are and ends.
_PLACE, _LIMIT = "MEGAMOE_WORKER_PLACE", "MEGAMOE_WORKER_SECONDS"
# Of a GPU's memory, set aside at once: an allocation later on may wait for kernels that run.
_SHARE = 0.03


class Place(NamedTuple):
    """Which one of how many processes this is."""

    processes: int = 1
    process: int = 0


class Outcome(NamedTuple):
    """What became of one process."""

    status: int
    lines: list[dict[str, Any]]  # that it said
    errors: str  # its standard error, and what else it printed


def join() -> Place:
    """In a worker, before anything asks for a device: its place, its processes knowing of each other."""
    if _LIMIT in os.environ:
        faulthandler.dump_traceback_later(float(os.environ[_LIMIT]), exit=True)
    processes, process, port = map(int, os.environ.get(_PLACE, "1 0 0").split())
    if processes > 1:
        on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu"  # tries a worker itself without GPUs
        if on_cpu:
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        local = None if on_cpu else [process]
        jax.distributed.initialize(f"localhost:{port}", processes, process, local_device_ids=local)
    return Place(processes, process)


def say(**fields: Any) -> None:
    """One line for the process that started this one."""
    print(json.dumps(fields), flush=True)


def meet(place: Place, name: str, seconds: float = 60) -> None:
    """Waits until all processes are here; no device takes part."""
    _compat.share_between_processes(f"tests/{name}", "here", range(place.processes), seconds)


def signal_after(seconds: float, number: signal.Signals) -> None:
    """To this process, which goes on meanwhile."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


def leave(place: Place, alone: bool = False) -> NoReturn:
    """Ends this process without the ceremonies at exit, which wait for processes that may be dead."""
    if not alone:
        meet(place, "leave")
        # The first process has the store where they meet: it goes last.
        time.sleep(1.0 if place.process == 0 and place.processes > 1 else 0.0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run(
    module: str,
    *arguments: str,
    processes: int = 1,
    limit: float = 90,
    share: float = _SHARE,
    environment: Mapping[str, str] | None = None,
) -> list[Outcome]:
    """Runs `python -m module arguments` in so many processes; what becomes of each within the limit in seconds."""
    shared = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # tests and package from where this process has them
        "XLA_PYTHON_CLIENT_PREALLOCATE": "true",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": str(share),  # the process that starts them has the GPUs, too
        _LIMIT: str(max(1.0, limit - 5)),
        **(environment or {}),
    }
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        children: list[subprocess.Popen[bytes]] = []
        logs = [(Path(folder) / f"{process}.out", Path(folder) / f"{process}.err") for process in range(processes)]
        deadline = time.monotonic() + limit
        try:
            for process, (output, errors) in enumerate(logs):
                own = {**shared, _PLACE: f"{processes} {process} {port}"}
                with output.open("w") as out, errors.open("w") as err:
                    command = [sys.executable, "-m", module, *arguments]
                    children.append(subprocess.Popen(command, env=own, stdout=out, stderr=err))
            statuses = [_wait(child, deadline) for child in children]
        finally:
            for child in children:
                child.kill()
                child.wait()
        return [_outcome(status, *log) for status, log in zip(statuses, logs, strict=True)]


def check_ended(outcomes: Sequence[Outcome], statuses: Sequence[int] | None = None) -> None:
    """All ended by themselves, with these statuses, or with 0; prints what they said, for the one who wants to know."""
    for process, outcome in enumerate(outcomes):
        for line in outcome.lines:
            print(f"process {process}: {json.dumps(line)}")
    found = [outcome.status for outcome in outcomes]
    assert found == list(statuses or [0] * len(outcomes)), "\n".join(
        f"== process {process}: status {outcome.status}\n{outcome.errors[-3000:]}"
        for process, outcome in enumerate(outcomes)
    )


def _wait(child: "subprocess.Popen[bytes]", deadline: float) -> int:
    try:
        return child.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


def _outcome(status: int, output: Path, errors: Path) -> Outcome:
    lines, others = [], []
    for line in output.read_text(errors="replace").splitlines():
        try:
            lines.append(dict(json.loads(line)))
        except ValueError:
            others.append(line)
    return Outcome(status, lines, "\n".join([*others, errors.read_text(errors="replace")]))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])
