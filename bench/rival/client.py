"""The rival's column: hands its processes (`python -m bench.rival`) the same inputs, and merges what they report."""

import argparse
import concurrent.futures
import dataclasses
import json
import math
import os
import pathlib
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

import jax_megamoe as mm
from bench.inputs import Inputs
from bench.rival import INSTALL, MAX_DIFF
from bench.rival.place import Place
from bench.shape import Shape
from jax_megamoe.weight_layout import Format

FORMAT: Format = "fp8_block"  # the only one that the rival is asked for
_ROOT = pathlib.Path(__file__).parent.parent.parent


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of commands that can measure the rival, too."""
    parser.add_argument("--rivals", action="store_true", help=f"also the public rival, with {FORMAT} ({INSTALL})")
    parser.add_argument("--rival-python", default=sys.executable, help="an interpreter that has the rival and torch")


def ask_versions(options: argparse.Namespace) -> dict[str, Any] | None:
    """What the rival's interpreter has, or None where nobody asked for the rival. Call it before JAX starts."""
    if not options.rivals:
        return None
    # The rival's process needs memory of the same device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return versions_of(options.rival_python)


def versions_of(python: str) -> dict[str, Any]:
    """What the rival's interpreter has; under "error" why it cannot run."""
    command = [python, "-m", "bench.rival", "--versions"]
    try:
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"error": str(error)}
    report = _parse(done.stdout.splitlines()[-1] if done.stdout else "")
    return report or {"error": done.stderr or f"{python} ended with status {done.returncode}"}


def case_name(routing: str, num_tokens: int) -> str:
    """The name of a case in a folder."""
    return f"{routing}-{num_tokens}"


def write_request(folder: pathlib.Path, shape: Shape, cases: list[tuple[str, int]]) -> None:
    """Says which cases of a shape, each a routing and a number of tokens, the folder will hold."""
    names = [{"name": case_name(*case)} for case in cases]
    (folder / "request.json").write_text(json.dumps({"shape": shape._asdict(), "cases": names}))


@jax.jit
def _unpack_expert(weights: mm.ExpertWeights, expert: jax.Array) -> tuple[jax.Array, ...]:
    one = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, expert, 1), weights)
    gate_up, gate_up_scale, down, down_scale = one.unpack()
    gate_up, down = (jax.lax.bitcast_convert_type(array, np.uint8) for array in (gate_up, down))
    return gate_up, gate_up_scale, down, down_scale


def write_weights(folder: pathlib.Path, weights: mm.ExpertWeights) -> None:
    """Writes the weights in the natural layout, one expert after the other: all at once would not fit on the device."""
    names = ("gate_up", "gate_up_scale", "down", "down_scale")
    files = [(folder / f"{name}.bin").open("wb") for name in names]
    try:
        for part in _parts(weights):
            for expert in range(part.num_experts):
                for file, array in zip(files, _unpack_expert(part, expert), strict=True):
                    np.asarray(array).tofile(file)
    finally:
        for file in files:
            file.close()


def _parts(weights: mm.ExpertWeights) -> list[mm.ExpertWeights]:
    """What each device has of the weights, in the order of the experts."""

    def part_of(leaf: jax.Array, number: int) -> jax.Array:
        shards = sorted(leaf.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        return shards[number].data

    parts = []
    for number in range(len(weights.gate_up.addressable_shards)):
        part = jax.tree.map(lambda leaf, number=number: part_of(leaf, number), weights)
        parts.append(dataclasses.replace(part, num_experts=len(part.gate_up)))
    return parts


def write_case(
    folder: pathlib.Path, name: str, inputs: Inputs, results: list[Any], reference: Any | None = None
) -> None:
    """Writes the inputs of each call, what the kernel made of them, and the reference result of the first, if known."""
    arrays: dict[str, Any] = {
        "x": _bits(inputs.x),
        "topk_ids": np.stack([np.asarray(ids, np.int32) for ids in inputs.topk_ids]),
        "topk_weights": np.stack([np.asarray(weights, np.float32) for weights in inputs.topk_weights]),
        "ours": _bits(results),
    }
    if reference is not None:
        arrays["reference"] = np.asarray(reference).view(np.uint16)
    np.savez(folder / f"{name}.npz", **arrays)


def _bits(arrays: list[Any]) -> np.ndarray:
    return np.stack([np.asarray(array).view(np.uint16) for array in arrays])


def compile_ahead(
    python: str, folder: pathlib.Path, shape: Shape, tokens: list[int], ranks: int = 1, timeout: float = 300
) -> None:
    """Has the rival compile its kernels, several numbers of tokens at a time; it keeps them on disk.

    A failure is only noted here: the processes that time them meet it again and report it.
    """
    # Each process holds a rank's weights once, and leaves the rest of the device to this one.
    workers = max(1, min(8, int(40e9 // shape.weight_bytes)))

    def compile_one(num_tokens: int) -> None:
        for report in _reports_of(_commands(python, [str(folder), "--compile", str(num_tokens)], ranks), timeout):
            if "error" in report:
                print(f"rival, {num_tokens} tokens, while compiling: {report['error']}", file=sys.stderr)

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        list(pool.map(compile_one, tokens))


def run_rival(
    python: str,
    folder: pathlib.Path,
    on_record: Callable[[str], None] = lambda name: None,
    ranks: int = 1,
    timeout: float = 300,
) -> dict[str, dict[str, Any]]:
    """Times the folder's cases in processes of the rival's, one for each rank; a record for each, whatever happens."""
    names = [case["name"] for case in json.loads((folder / "request.json").read_text())["cases"]]
    records: dict[str, dict[str, Any]] = {}
    why = ""
    for report in _reports_of(_commands(python, [str(folder)], ranks), timeout):
        if "case" in report:
            records[report.pop("case")] = report
            on_record(next(reversed(records)))
        elif "error" in report:
            why = report["error"]
    for name in names:
        records.setdefault(name, {"error": why or "the process ended before this case"})
    return records


def _commands(python: str, arguments: list[str], ranks: int) -> list[list[str]]:
    command = [python, "-m", "bench.rival", *arguments]
    return [[*command, "--place", str(place)] for place in Place.all_of(ranks)]


def _reports_of(commands: list[list[str]], timeout: float) -> Iterator[dict[str, Any]]:
    """The JSON objects that processes print, as they come. After an error of one of them all are ended."""
    processes: list[subprocess.Popen[str]] = []
    lines: queue.Queue[tuple[subprocess.Popen[str], str | None]] = queue.Queue()
    deadline = time.monotonic() + timeout
    try:
        for command in commands:
            processes.append(subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True))
            threading.Thread(target=_forward, args=(processes[-1], lines), daemon=True).start()
        running = len(processes)
        while running:
            process, line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
            if line is not None:
                report = _parse(line)
                if report is not None:
                    yield report
                    if "error" in report and "case" not in report:
                        return
                continue
            running -= 1
            if process.wait() != 0:
                yield {"error": f"the process ended with status {process.returncode}"}
                return
    except OSError as error:
        yield {"error": str(error)}
    except queue.Empty:
        yield {"error": f"no result after {timeout:.0f} s"}
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def _forward(process: subprocess.Popen[str], lines: queue.Queue[tuple[subprocess.Popen[str], str | None]]) -> None:
    """Puts a process's lines into the queue, and None after the last."""
    assert process.stdout is not None
    for line in process.stdout:
        lines.put((process, line))
    lines.put((process, None))


def _parse(line: str) -> dict[str, Any] | None:
    try:
        report = json.loads(line)
    except json.JSONDecodeError:
        return None
    return report if isinstance(report, dict) else None


def merge(rows: list[dict[str, Any]], records: dict[str, dict[str, Any]], why: str = "not measured") -> None:
    """Adds the rival's record and the ratio of the times to the rows of a shape; a wrong result counts as an error."""
    for row in rows:
        record = dict(records.get(case_name(row["routing"], row["tokens"]), {"error": why}))
        diffs = {name: record[name] for name in ("diff", "diff_to_ours") if name in record}
        if "error" not in record and not all(abs(diff) < MAX_DIFF for diff in diffs.values()):
            record["error"] = f"wrong result: {diffs}, wanted below {MAX_DIFF}"
        # JSON has no NaN.
        record.update({name: diff if math.isfinite(diff) else None for name, diff in diffs.items()})
        row["rival"] = record
        if "error" not in record:
            row["ours_over_rival"] = row["us"] / record["us"]
            if "ceiling_us" in row:
                record["ratio"] = record["us"] / row["ceiling_us"]
