"""XLA's flags for decode loops: that XLA knows them, what counts as having them, and the hint where they are missing."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from jax_megamoe import xla_flags
from tests.support.cuda_lowering import cuda_text
from tests.support.expert_layer import make_layer
from tests.support.meshes import AUTO, MESHES, make_mesh, place_all

FLAGS = mm.recommended_xla_flags()
WHILE, SIZE = FLAGS.split()


def start_jax(flags: str) -> "subprocess.CompletedProcess[str]":
    """A process in which XLA reads the flags: on a CPU it knows those of GPUs, too."""
    program = "import jax; print('devices:', len(jax.devices()))"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_this_xla_knows_the_flags():
    assert start_jax(FLAGS).stdout == "devices: 1\n"
    # It would say so, of names and of values.
    assert start_jax(FLAGS.replace("command_buffer", "command_buffers")).returncode != 0
    assert start_jax(FLAGS.replace("WHILE", "WHILST")).returncode != 0


@pytest.mark.parametrize(
    ("value", "missing"),
    [
        ("", FLAGS),
        ("--xla_force_host_platform_device_count=8", FLAGS),
        (FLAGS, ""),
        (f"--xla_dump_to=/tmp/x {SIZE} {WHILE}", ""),
        (WHILE, SIZE),
        (f"{SIZE} --xla_gpu_enable_command_buffer=FUSION,CUSTOM_CALL,WHILE", ""),
        (f"{SIZE} --xla_gpu_enable_command_buffer=FUSION,-WHILE", WHILE),
        (f"{SIZE} --xla_gpu_enable_command_buffer=", WHILE),
        (f"{WHILE} --xla_gpu_graph_min_graph_size=5", SIZE),
        (f"{FLAGS} --xla_gpu_graph_min_graph_size=5", SIZE),  # the last one counts
        (f"'{WHILE}' \"{SIZE}\"", FLAGS),  # to XLA, the name of a file
    ],
)
def test_what_is_missing(monkeypatch, value, missing):
    monkeypatch.setenv("XLA_FLAGS", value)
    assert xla_flags.missing_xla_flags() == missing


def test_flags_in_a_file(monkeypatch, tmp_path):
    path = tmp_path / "flags"
    path.write_text(f"{WHILE}\n{SIZE}\n")
    monkeypatch.setenv("XLA_FLAGS", str(path))
    assert xla_flags.missing_xla_flags() == ""


def in_while_loop(*arguments: Any) -> jax.Array:
    x, *others = arguments
    return jax.lax.while_loop(
        lambda state: state[0] < 3, lambda state: (state[0] + 1, mm.moe(state[1], *others)), (0, x)
    )[1]


def in_scan(*arguments: Any) -> jax.Array:
    x, *others = arguments
    return jax.lax.scan(lambda x, _: (mm.moe(x, *others), None), x, jnp.arange(3))[0]


def in_scan_in_while_loop(*arguments: Any) -> jax.Array:
    x, *others = arguments
    return jax.lax.while_loop(
        lambda state: state[0] < 3, lambda state: (state[0] + 1, in_scan(state[1], *others)), (0, x)
    )[1]


def in_fori_loop_of_traced_length(*arguments: Any) -> jax.Array:
    x, *others = arguments
    return jax.lax.fori_loop(0, jnp.abs(others[1].ravel()[0]), lambda _, x: mm.moe(x, *others), x)


@pytest.fixture
def hints(built, monkeypatch, caplog) -> Callable[[], list[str]]:
    """What has been hinted at since, on a machine that has a GPU."""
    jax.devices()  # before the variable changes, from which it has the eight devices of the other tests
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(xla_flags, "_hint", xla_flags._Hint())
    monkeypatch.setattr(xla_flags, "_has_gpu", lambda: True)
    caplog.set_level(logging.WARNING, "jax_megamoe")
    return lambda: [record.message for record in caplog.records if "xla_gpu" in record.message]


LOOPS = [in_while_loop, in_scan_in_while_loop, in_fori_loop_of_traced_length]


@pytest.mark.parametrize("program", LOOPS, ids=lambda program: program.__name__)
def test_a_loop_is_hinted_at_once(hints, program):
    arguments = make_layer()[:4]
    for _ in range(2):
        cuda_text(program, *arguments)
    (hint,) = hints()
    assert "moe is called in jax.lax.while_loop" in hint and f"XLA_FLAGS='{FLAGS}'" in hint


@pytest.mark.parametrize("manual", [False, True])
def test_a_loop_over_a_mesh_is_hinted_at(hints, manual):
    mesh = make_mesh(MESHES["expert"], AUTO)
    program: Callable[..., Any] = in_while_loop
    if manual:
        specs: Any = {"in_specs": P("expert"), "out_specs": P("expert"), "check_vma": False}
        program = jax.shard_map(in_while_loop, mesh=mesh, **specs)
    cuda_text(program, *place_all(mesh, make_layer()))
    assert len(hints()) == 1


def test_only_what_is_missing_is_hinted_at(hints, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", SIZE)
    cuda_text(in_while_loop, *make_layer()[:4])
    assert f"XLA_FLAGS='{WHILE}'" in hints()[0]


def test_what_needs_no_hint(hints, monkeypatch):
    arguments = make_layer()[:4]
    cuda_text(in_scan, *arguments)
    cuda_text(mm.moe, *arguments)
    cuda_text(in_while_loop, *arguments, platforms=("cpu",))
    monkeypatch.setenv("XLA_FLAGS", FLAGS)
    cuda_text(in_while_loop, *arguments)
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(xla_flags, "_has_gpu", lambda: False)  # lowered for another machine
    cuda_text(in_while_loop, *arguments)
    assert hints() == []


def test_a_function_of_the_users_by_that_name_is_no_loop(hints):
    def while_loop(*arguments: Any) -> jax.Array:
        return mm.moe(*arguments)

    cuda_text(while_loop, *make_layer()[:4])
    assert hints() == []
