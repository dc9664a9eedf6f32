"""How checkpoints are loaded: memory, what each process reads, progress, and agreement with the functions that pack."""

import ctypes
import dataclasses
import gc
import io
import itertools
import re
import threading
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

import jax_megamoe as mm
from jax_megamoe.checkpoints.conversion import to_fp8_blocks
from jax_megamoe.checkpoints.progress import Report, progress_line
from tests.support import numpy_model, processes
from tests.support.cases import exhaustive
from tests.support.checkpoints import E, H, I, build, large_checkpoint, memory_of_put, write
from tests.support.families import PLANS
from tests.support.meshes import make_mesh
from tests.support.terminal import Terminal

MIB = 1 << 20

# Of checkpoints that are large, so that memory tells.
pytestmark = pytest.mark.usefixtures("optimized")


class MallInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc."""

    _names = "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


def allocated_memory() -> int:
    """Bytes that have been asked of malloc and not been given back: of host arrays, and on a CPU of devices', too.

    What malloc keeps of what was given back is none of it, nor what compiling leaves behind: pages of the process count
    both, and how many of these there are depends on which thread has asked for what, when.
    """
    libc = ctypes.CDLL("libc.so.6")
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("needs glibc 2.33, whose malloc says what is in use")
    libc.mallinfo2.restype = MallInfo
    found = libc.mallinfo2()
    return int(found.uordblks + found.hblkhd)


class Peak:
    """The most memory beyond that at the start, while the block runs."""

    def __enter__(self) -> "Peak":
        gc.collect()
        self.start = self.most = allocated_memory()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.most = max(self.most, allocated_memory())
            time.sleep(0.001)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.most = max(self.most, allocated_memory())

    @property
    def nbytes(self) -> int:
        return self.most - self.start


def assert_needs_at_most(limit: int, call: Callable[[], object]) -> None:
    """The least of several times, of a call that has compiled its programs before.

    XLA's threads let go of arrays some time after they are dropped, on a busy machine of several experts' at once. What a
    call needs it always takes, and what it returns at least: else a result of before was there at the start.
    """
    jax.block_until_ready(call())
    peaks: list[tuple[int, int]] = []  # what is returned, and the peak
    while len(peaks) < 5 and not any(least <= peak <= limit for least, peak in peaks):
        time.sleep(0.05)
        with Peak() as peak:
            kept = jax.block_until_ready(call())
        peaks.append((kept.nbytes if isinstance(kept, mm.ExpertWeights) else 0, peak.nbytes))
        del kept
    print("peaks", *(f"{peak / MIB:.1f} MiB" for _, peak in peaks), f"at most {limit / MIB:.1f}")
    least, found = peaks[-1]
    assert least <= found <= limit, f"took {found} bytes, wanted {least} to {limit}"


@pytest.mark.parametrize(
    "kind, format",
    [("fp8_block", None), exhaustive("mxfp4", None), ("mxfp4", "fp8_block")],
)
def test_little_is_in_memory_beside_the_result(kind, format, tmp_path):
    """At most a tenth of the result and one layer, of all memory but mapped files."""
    folder = large_checkpoint(tmp_path, kind, layers=3)
    result = 3 * mm.load_experts(folder, 0, format=format).nbytes
    assert_needs_at_most(int(1.1 * result) + result // 3, lambda: mm.load_experts(folder, format=format))


@pytest.mark.parametrize("kind", ["fp8_block", "mxfp4", "floats"])
def test_experts_are_written_into_the_result_in_place(kind, tmp_path, monkeypatch):
    result, memory = memory_of_put(large_checkpoint(tmp_path, kind), monkeypatch)
    assert memory.alias_size_in_bytes >= result
    assert memory.temp_size_in_bytes <= result // 10


def test_little_is_in_memory_beside_the_result_on_a_mesh(tmp_path):
    folder = large_checkpoint(tmp_path, "fp8_block", layers=3, experts=32)
    mesh = make_mesh({"expert": 8}, AxisType.Auto)
    result = 3 * mm.load_experts(folder, 0).nbytes
    assert_needs_at_most(int(1.1 * result) + result // 3, lambda: mm.load_experts(folder, mesh=mesh))


def test_a_layer_of_its_own_takes_no_more_than_itself_and_a_tenth(tmp_path):
    folder = large_checkpoint(tmp_path, "fp8_block", layers=1, experts=64)
    result = mm.load_experts(folder, 0).nbytes
    # Of one layer, "one layer more" would be twice the result: it is an expert as read, and as packed.
    assert_needs_at_most(int(1.1 * result) + 6 * MIB, lambda: mm.load_experts(folder, 0))


def test_converting_holds_some_experts_and_no_layer(tmp_path):
    from jax_megamoe.checkpoints import convert

    (tmp_path / "stock").mkdir()
    folder = large_checkpoint(tmp_path / "stock", "fp8_block", layers=1, experts=64)
    numbers = itertools.count()
    # Of a layer of 96 MiB.
    assert_needs_at_most(48 * MIB, lambda: convert(folder, tmp_path / f"cache{next(numbers)}"))


@pytest.mark.parametrize("on_mesh", [False, True])
def test_layers_of_the_same_sizes_share_programs(on_mesh, tmp_path, caplog):
    stock = build(dataclasses.replace(PLANS["deepseek-v3"], intermediate_size=384))  # that no other test compiles for
    checkpoint = mm.read_checkpoint(write(tmp_path, stock.config, stock.tensors))
    mesh = make_mesh({"expert": 8}, AxisType.Auto) if on_mesh else None
    said = []
    for layer in (1, 2):
        caplog.clear()
        with jax.log_compiles():
            checkpoint.experts(layer, mesh=mesh)
        said.append([record.getMessage() for record in caplog.records if "Compiling" in record.getMessage()])
    assert said[0] and said[1] == []


@pytest.mark.parametrize("name, one_expert", [("deepseek-v3", 3 * (I * H + 4 * 2)), ("qwen3-bf16", 3 * 2 * I * H)])
def test_a_function_is_told_bytes(name, one_expert, tmp_path):
    stock = build(PLANS[name])
    folder = write(tmp_path, stock.config, stock.tensors)
    calls: list[tuple[int, int]] = []
    mm.load_experts(folder, progress=lambda *call: calls.append(call))
    assert calls == [(n * one_expert, 2 * E * one_expert) for n in range(1, 2 * E + 1)]


def test_true_prints_lines(tmp_path, capsys):
    stock = build(PLANS["deepseek-v3"])
    mm.load_experts(write(tmp_path, stock.config, stock.tensors), progress=True)
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"experts [\d.]+ of [\d.]+ GB \(100 %\), [\d.e-]+ GB/s, [\d.]+ s", last)


def test_a_line_has_the_rate_and_the_time_left():
    assert progress_line("experts", int(12.3e9), int(40e9), 6.0) == "experts 12.3 of 40 GB (30 %), 2.05 GB/s, 14 s left"
    assert progress_line("experts", 0, 10, 0.0) == "experts 0 of 1e-08 GB (0 %)"
    assert progress_line("experts", 0, 0, 1.0) == "experts 0 of 0 GB (100 %)"
    out = io.StringIO()
    report = Report(True, 100, out=out)
    for _ in range(100):
        report.add(1)
    assert len(out.getvalue().splitlines()) == 1  # at the end: there was no second in between


def test_a_terminal_gets_a_bar():
    out = Terminal()
    report = Report(True, 4_000_000_000, out=out)
    for _ in range(4):
        report.add(1_000_000_000)
    last = out.last_drawn()
    assert last.startswith("experts: 100%|") and "4.00G/4.00G" in last and "B/s" in last
    assert out.getvalue().endswith("\n") and "\n" not in out.getvalue()[:-1]


def test_no_progress_writes_nothing():
    for progress in (None, False, lambda done, total: None):
        out = Terminal()
        Report(progress, 1, out=out).add(1)
        assert out.getvalue() == ""


def test_what_each_of_two_processes_reads(tmp_path):
    """Experts 0 to 3 on devices of the first process, 4 to 7 on those of the second."""
    stock = build(PLANS["deepseek-v4"])
    folder = write(tmp_path, stock.config, stock.tensors)
    outcomes = processes.run("tests.checkpoint_worker", str(folder), processes=2, limit=120)
    processes.check_ended(outcomes)
    one = 3 * I * H // 2 + 3 * I * H // 32
    for process, outcome in enumerate(outcomes):
        said = outcome.lines[-1]
        assert said["experts"] == list(range(4 * process, 4 * process + 4))
        assert said["read"] == 3 * 4 * one and said["total"] == 3 * 4 * one
        assert said["same"] is True


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(low=st.integers(1, 240), spread=st.integers(0, 20), seed=st.integers(0, 100))
def test_mxfp4_as_fp8_blocks_is_exact_or_said_not_to_be(low, spread, seed):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (1, 128, 64)).astype(np.uint8)
    exponents = rng.integers(low, min(low + spread, 254) + 1, (1, 128, 4)).astype(np.uint8)
    values, scale, is_lost = to_fp8_blocks(jnp.asarray(codes), jnp.asarray(exponents))
    found = numpy_model.dequantize(np.asarray(values), np.asarray(scale))
    if not bool(is_lost[0]):
        np.testing.assert_array_equal(found, numpy_model.dequantize_mxfp4(codes, exponents))
    # With any E2M1 value anywhere, these are exactly the blocks that FP8 cannot hold.
    assert bool(is_lost[0]) == (int(exponents.max()) - int(exponents.min()) > 14)
