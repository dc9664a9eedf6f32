"""The rival's column: hands its process (`python -m bench.rival`) the same inputs, and merges what it reports."""

import concurrent.futures
import json
import math
import pathlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

import jax_megamoe as mm
from bench.inputs import Inputs
from bench.rival import MAX_DIFF
from bench.shape import Shape

_ROOT = pathlib.Path(__file__).parent.parent.parent


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
        for expert in range(weights.num_experts):
            for file, array in zip(files, _unpack_expert(weights, expert), strict=True):
                np.asarray(array).tofile(file)
    finally:
        for file in files:
            file.close()


def write_case(folder: pathlib.Path, name: str, inputs: Inputs, results: list[Any], reference: Any) -> None:
    """Writes the inputs of each call, what the kernel made of them, and the reference result of the first."""
    np.savez(
        folder / f"{name}.npz",
        x=_bits(inputs.x),
        topk_ids=np.stack([np.asarray(ids, np.int32) for ids in inputs.topk_ids]),
        topk_weights=np.stack([np.asarray(weights, np.float32) for weights in inputs.topk_weights]),
        ours=_bits(results),
        reference=np.asarray(reference).view(np.uint16),
    )


def _bits(arrays: list[Any]) -> np.ndarray:
    return np.stack([np.asarray(array).view(np.uint16) for array in arrays])


def compile_ahead(python: str, folder: pathlib.Path, shape: Shape, tokens: list[int], timeout: float = 300) -> None:
    """Has the rival compile its kernels, several numbers of tokens at a time; it keeps them on disk.

    A failure is only noted here: the process that times them meets it again and reports it.
    """
    # Each process holds the weights once, and leaves the rest of the device to this one.
    workers = max(1, min(8, int(40e9 // shape.weight_bytes)))

    def compile_one(num_tokens: int) -> None:
        command = [python, "-m", "bench.rival", str(folder), "--compile", str(num_tokens)]
        try:
            done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False, timeout=timeout)
        except (OSError, subprocess.TimeoutExpired) as error:
            print(f"rival, {num_tokens} tokens: {error}", file=sys.stderr)
            return
        if done.returncode:
            print(f"rival, {num_tokens} tokens, while compiling:\n{done.stderr[-4000:]}", file=sys.stderr)

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        list(pool.map(compile_one, tokens))


def run_rival(
    python: str, folder: pathlib.Path, on_record: Callable[[str], None] = lambda name: None, timeout: float = 300
) -> dict[str, dict[str, Any]]:
    """Times the folder's cases in a process of the rival's; a record for each, whatever happens."""
    names = [case["name"] for case in json.loads((folder / "request.json").read_text())["cases"]]
    records: dict[str, dict[str, Any]] = {}
    why = ""
    command = [python, "-m", "bench.rival", str(folder)]
    for report in _lines_of(command, timeout):
        if "case" in report:
            records[report.pop("case")] = report
            on_record(next(reversed(records)))
        elif "error" in report:
            why = report["error"]
    for name in names:
        records.setdefault(name, {"error": why or "the process ended before this case"})
    return records


def _lines_of(command: list[str], timeout: float) -> Iterator[dict[str, Any]]:
    try:
        process = subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True)
    except OSError as error:
        yield {"error": str(error)}
        return
    killer = threading.Timer(timeout, process.kill)
    killer.start()
    try:
        assert process.stdout is not None
        reported = False
        for line in process.stdout:
            report = _parse(line)
            if report is not None:
                reported = reported or "error" in report
                yield report
        status = process.wait()
        if status and not reported:
            late = not killer.is_alive()
            yield {"error": f"no result after {timeout:.0f} s" if late else f"the process ended with status {status}"}
    finally:
        killer.cancel()
        if process.poll() is None:
            process.kill()
            process.wait()


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
