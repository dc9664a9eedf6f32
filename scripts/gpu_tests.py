"""All GPU tests of a machine at once: `python scripts/gpu_tests.py [--limit SECONDS] [pytest options]`.

Most of their time is XLA's, on one core for each process: tests that need one GPU are dealt out to several processes
for each GPU, those that need several GPUs run after them in one, and last those that want the GPUs for themselves.
Exits with 1 where a test failed, and with 2 where a process did not end within the limit; what it had done until then
is printed, also where the script itself is ended.
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
ONE_GPU = (
    "tests/gpu/test_kernel.py",
    "tests/gpu/test_virtual_ranks.py",
    "tests/gpu/test_residency.py",
    "tests/gpu/test_group_of_one.py",
    "tests/gpu/test_compiled_programs.py",
    "tests/gpu/test_compiled_examples.py",
    "tests/gpu/test_edges.py",
    "tests/gpu/test_bad_values.py",
    "tests/gpu/test_formats.py",
    "tests/gpu/test_halves.py",
    "tests/gpu/test_lone_token.py",
    "tests/gpu/test_checkpoints.py",
    "tests/gpu/test_shared_experts.py",
    "tests/gpu/test_batch_invariant.py",
    "tests/gpu/test_activations.py",
    "tests/gpu/test_route.py",
    "tests/gpu/test_teaching.py",
    "tests/gpu/test_handlers.py",
    "tests/gpu/test_single_gpu_faults.py",
)
ALL_GPUS = (
    "tests/gpu/test_expert_parallel.py",
    "tests/gpu/test_failures.py",
    "tests/gpu/test_beside.py",
    "tests/gpu/test_buffers.py",
    "tests/gpu/test_demo.py",
    "tests/gpu/test_peers.py",
    "tests/gpu/test_doctor.py",
    "tests/gpu/test_memory.py",
    "tests/gpu/test_soak.py",
    "tests/gpu/test_group_handlers.py",
    "tests/gpu/test_no_memory.py",
    "tests/gpu/test_mps.py",
    "tests/gpu/test_bad_values_of_ranks.py",
    "tests/test_sharding.py",
    "tests/test_manual_sharding.py",
    "tests/test_shared_experts.py",
)

# What compares times, which other work on the GPUs would move.
ALONE = "tests/gpu/test_failures.py::test_killed"

NO_TESTS = 5  # pytest's status where none is selected, as by -k
SECONDS_TO_SAY = 10.0  # after the limit, until a process is killed


def main(arguments: list[str] | None = None) -> int:
    """Runs the rounds and prints what pytest said, failures first to last; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, default=600, help="seconds for each of the rounds")
    parser.add_argument("--processes-per-gpu", type=int, default=4)
    options, pytest_options = parser.parse_known_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    gpus = visible_gpus()
    if not gpus:
        print("There is no GPU: these tests would all be skipped.", file=sys.stderr)
        return 2
    shards = deal(collect(ONE_GPU), len(gpus) * options.processes_per_gpu)
    share = f"{0.8 / options.processes_per_gpu:.3f}"
    rounds = [
        [(f"GPU {gpus[i % len(gpus)]}", gpus[i % len(gpus)], share, shard) for i, shard in enumerate(shards) if shard],
        # Half of the memory: the tests of failures start up to twelve processes beside this one.
        [("all GPUs", ",".join(gpus), "0.5", [f"--deselect={ALONE}", *ALL_GPUS])],
        [("all GPUs, alone", ",".join(gpus), "0.5", [ALONE])],
    ]
    statuses = [status for jobs in rounds for status in run(jobs, pytest_options, options.limit)]
    return overall(statuses)


def overall(statuses: Iterable[int]) -> int:
    """The worst of the processes' statuses; pytest's own where none of them had a test to run."""
    ran = [status for status in statuses if status != NO_TESTS]
    return max(ran, default=NO_TESTS)


def visible_gpus() -> list[str]:
    """The names under which CUDA_VISIBLE_DEVICES offers GPUs to this process."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return []
    return [str(number) for number, _ in enumerate(listed.splitlines())]


def collect(files: Iterable[str]) -> list[str]:
    """The ids of the tests that are marked gpu."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", *files]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}  # faster, and leaves the GPUs alone
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    if done.returncode or not tests:
        raise SystemExit(f"pytest collects no tests:\n{done.stdout}{done.stderr}")
    return tests


def deal(tests: list[str], num_shards: int) -> list[list[str]]:
    """The tests in turn to so many shards: neighbours take about as long, so that shards do, too."""
    return [tests[first::num_shards] for first in range(num_shards)]


def run(jobs: list[tuple[str, str, str, list[str]]], pytest_options: list[str], limit: float) -> list[int]:
    """Runs (title, GPUs, share of their memory, tests) side by side; prints the end of each one's output."""
    deadline = time.monotonic() + limit
    with tempfile.TemporaryDirectory() as folder:
        running: list[tuple[str, subprocess.Popen[bytes], Path]] = []
        try:
            for number, (title, gpus, share, tests) in enumerate(jobs):
                log = Path(folder) / str(number)
                running.append((title, start([*pytest_options, *tests], gpus, share, log), log))
            wait([process for _, process, _ in running], deadline)
        finally:  # also where somebody ends this script: what they did until then is not lost
            ended = end([process for _, process, _ in running])
            statuses = [report(*job, was_ended=job[1] in ended) for job in running]
        return statuses


def wait(processes: Iterable["subprocess.Popen[bytes]"], deadline: float) -> None:
    """Until all have ended, or the deadline."""
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))


def end(processes: Iterable["subprocess.Popen[bytes]"]) -> list["subprocess.Popen[bytes]"]:
    """Ends those that still run, which get some seconds to say what has failed; returns them."""
    ended = [process for process in processes if process.poll() is None]
    for process in ended:
        process.send_signal(signal.SIGINT)
    wait(ended, time.monotonic() + SECONDS_TO_SAY)
    for process in ended:
        process.kill()
        process.wait()
    return ended


def start(pytest_arguments: list[str], gpus: str, share: str, log: Path) -> "subprocess.Popen[bytes]":
    """A process of tests that sees these GPUs, takes so much of their memory and writes to `log`."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus, "XLA_PYTHON_CLIENT_MEM_FRACTION": share}
    environment["MEGAMOE_FULL_SUITE"] = "1"  # tests that wait for a minute, beside others
    # Processes of a test with one process per GPU find the package here too.
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *pytest_arguments]
    with log.open("w") as output:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)


def report(title: str, process: "subprocess.Popen[bytes]", log: Path, was_ended: bool) -> int:
    """Prints what a process wrote; its status: 0, 1, 2 where it had to be ended, or NO_TESTS."""
    code = process.returncode  # a signal is a negative number
    status = 2 if was_ended else code if code == NO_TESTS else int(code != 0)
    lines = [line for line in log.read_text().splitlines() if not line.startswith("SKIPPED")]
    what = "did not end in time" if was_ended else f"status {status}"
    # What a library logs at exit comes after pytest's summary.
    summary = [line for line in lines if re.search(r"\d+ (passed|skipped|deselected)", line)][-1:]
    first = next((number for number, line in enumerate(lines) if re.match("=+ (FAILURES|ERRORS) =+", line)), -60)
    print(f"== {title}: {what}", *(summary if status in (0, NO_TESTS) else lines[first:]), sep="\n", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
