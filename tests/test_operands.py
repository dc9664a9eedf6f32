"""What the C++ handlers make of a call's operands and weights, compiled for the host and handed to them as XLA would."""

import importlib.util
from pathlib import Path
from typing import get_args

import jax.numpy as jnp
import pytest

from jax_megamoe import weight_layout
from jax_megamoe.weights import DATA_FIELDS
from tests.support.native_program import CUDA, compile_program, cuda_include

# T 3, k 2, H 256, I 384, E 4, in the order of primitives/_kernel_call.py.
RIGHT = "T 3 k 2 H 256 I 384 E 4 fp8_block L 1 at 0 1 2 3 4 5 6 7 8 9 10 bf16 7 2.5"
# Five layers of the routed experts.
STACKED = "1 f8e4m3fn 5 4 6 2 16384;2 f32 5 4 6 2 4;3 f8e4m3fn 5 4 4 3 8192;4 f32 5 4 4 2 4"


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    """From changes of a call that is right, "operand type dims...", to what comes of it."""
    jaxlib = importlib.util.find_spec("jaxlib")
    assert jaxlib is not None and jaxlib.origin is not None
    # The runtime's error texts are all that is called of CUDA.
    flags: list[str | Path] = ["-isystem", Path(jaxlib.origin).parent / "include", "-isystem", cuda_include()]
    sources = [
        CUDA / "ffi" / "moe_call.cc",
        CUDA / "host" / "limits.cc",
        CUDA.parent.parent / "tests/native/fake_cuda.cc",
    ]
    program = compile_program(tmp_path_factory.mktemp("native"), "moe_call_test", *sources, flags=flags)
    return lambda change: program(change + "\n").strip()


def test_operands_and_results_get_where_they_belong(call):
    assert call("none") == RIGHT
    assert call("8 f32 3 256") == RIGHT.replace("bf16", "f32")


def test_layers_are_stacked(call):
    assert call(STACKED) == RIGHT.replace("L 1", "L 5")


SHARED = "T 3 k 2 H 256 I 384 E 6 fp8_block L 1 at 0 1 2 3 4 5 6 7 12 13 14 shared 2 at 8 9 10 11 bf16 7 2.5"


def test_shared_experts_come_behind_the_layer(call):
    assert call("shared") == SHARED
    shared = "8 f8e4m3fn 5 2 6 2 16384;9 f32 5 2 6 2 4;10 f8e4m3fn 5 2 4 3 8192;11 f32 5 2 4 2 4"
    assert call(f"shared;{STACKED};{shared}") == SHARED.replace("L 1", "L 5")


def test_batch_invariance_is_an_attribute(call):
    """Without it the rule decides, as in programs that were exported before there was the option."""
    assert call("invariant 0") == call("none") == RIGHT
    assert call("invariant 1") == RIGHT.replace(" bf16", " batch-invariant bf16")


MXFP4 = "1 u8 4 6 2 8704;2 f32 4 6 128 2;3 u8 4 4 3 4352;4 f32 4 4 64 2"
FP8_CHANNEL = "2 f32 4 6 128 2;4 f32 4 4 64 2"


@pytest.mark.parametrize(("leaves", "name"), [("none", "fp8_block"), (FP8_CHANNEL, "fp8_channel"), (MXFP4, "mxfp4")])
def test_the_leaves_say_their_format(call, leaves, name):
    assert call(leaves) == RIGHT.replace("fp8_block", name)


WRONG = {
    "x dtype": ("0 f16 3 256", "x is f16[3, 256]; wanted bf16[T, H]"),
    "x rank": ("0 bf16 3 2 128", "x is bf16[3, 2, 128]; wanted bf16[T, H]"),
    "hidden size": (
        "0 bf16 3 128",
        "gate_up is f8e4m3fn[4, 6, 2, 16384]; wanted f8e4m3fn[(L,) E, I/64, H/128, 16384]",
    ),
    "gate_up rank": (
        "1 f8e4m3fn 6 2 16384",
        "gate_up is f8e4m3fn[6, 2, 16384]; wanted f8e4m3fn[(L,) E, I/64, H/128, 16384]",
    ),
    "gate_up dtype": (
        "1 f16 4 6 2 16384",
        "gate_up is f16[4, 6, 2, 16384]; wanted f8e4m3fn[(L,) E, I/64, H/128, 16384]",
    ),
    "bytes of FP8": (
        "1 u8 4 6 2 16384",
        "gate_up is u8[4, 6, 2, 16384]; wanted u8[(L,) E, I/64, H/128, 8704]",
    ),
    "gate_up_scale": ("2 f32 4 6 2 3", "gate_up_scale is f32[4, 6, 2, 3]; wanted f32[(L,) E, I/64, H/128, 4]"),
    "gate_up_scale of rows": ("2 f32 4 6 2 2", "gate_up_scale is f32[4, 6, 2, 2]; wanted f32[(L,) E, I/64, 128, 2]"),
    "down_scale of blocks": (
        "2 f32 4 6 128 2",
        "down_scale is f32[4, 4, 2, 4]; wanted f32[(L,) E, H/64, 64, 2]",
    ),
    "down of another format": (
        "1 u8 4 6 2 8704;2 f32 4 6 128 2",
        "down is f8e4m3fn[4, 4, 3, 8192]; wanted u8[(L,) E, H/64, I/128, 4352]",
    ),
    "down": (
        "3 f8e4m3fn 4 4 2 8192",
        "down is f8e4m3fn[4, 4, 2, 8192]; wanted f8e4m3fn[(L,) E, H/64, I/128, 8192]",
    ),
    "down of another layer count": ("3 f8e4m3fn 2 4 4 3 8192", "down is f8e4m3fn[2, 4, 4, 3, 8192]; wanted"),
    "down_scale": ("4 bf16 4 4 2 4", "down_scale is bf16[4, 4, 2, 4]; wanted f32[(L,) E, H/64, ceil(I/256), 4]"),
    "topk_ids dtype": ("5 s64 3 2", "topk_ids is s64[3, 2]; wanted s32[T, k]"),
    "topk_ids tokens": ("5 s32 4 2", "topk_ids is s32[4, 2]; wanted s32[T, k]"),
    "topk_weights": ("6 f32 3 1", "topk_weights is f32[3, 1]; wanted f32[T, k]"),
    "layer": ("7 s32 2", "layer is s32[2]; wanted s32[]"),
    "y": ("8 f16 3 256", "y is f16[3, 256]; wanted bf16 or f32[T, H]"),
    "load": ("9 s32 5", "load is s32[5]; wanted s32[E]"),
    "batch_invariant": ("invariant 2", "the attribute batch_invariant is neither 0 nor 1 of 64 bits"),
    "workspace": ("10 u8 100", "the workspace has 100 bytes; wanted 4096"),
    "no layer": ("1 f8e4m3fn 0 4 6 2 16384", "the weights are of no layer"),
    "too large": (f"0 bf16 {1 << 29} 256;5 s32 {1 << 29} 2", "a dimension exceeds 2^28"),
    "what the kernel does not serve": ("5 s32 3 33", "top_k is 33; it has to be 1 to 32"),
    "fewer": ("fewer", "the call has 7 operands and 3 results; wanted 8, or with shared experts 12, and 3: trace the"),
    "shared of another format": (
        "shared;8 u8 2 6 2 8704;9 f32 2 6 128 2",
        "shared.gate_up is u8[2, 6, 2, 8704]; wanted f8e4m3fn[(L,) E, I/64, H/128, 16384]",
    ),
    "shared of fewer layers": (
        f"shared;{STACKED}",
        "shared.gate_up is f8e4m3fn[2, 6, 2, 16384]; wanted f8e4m3fn[(L,) E, I/64, H/128, 16384]",
    ),
    "shared of another size": ("shared;10 f8e4m3fn 2 4 2 8192", "shared.down is f8e4m3fn[2, 4, 2, 8192]; wanted"),
    "shared rank": ("shared;8 f8e4m3fn 6 2 16384", "shared.gate_up is f8e4m3fn[6, 2, 16384]; wanted"),
    "load without the shared": ("shared;13 s32 4", "load is s32[4]; wanted s32[E], shared experts first"),
}


@pytest.mark.parametrize("change, message", WRONG.values(), ids=WRONG)
def test_an_error_says_what_it_got_and_wanted(call, change, message):
    assert call(change).startswith(f"jax_megamoe.moe: {message}")


SIZES = [(128, 128), (256, 384), (4096, 2048), (7168, 3072)]


@pytest.fixture(scope="module")
def weights_in_cpp(tmp_path_factory):
    """Format and layout, and the leaves, of each of SIZES and each format."""
    program = compile_program(tmp_path_factory.mktemp("native"), "weights_test")
    blocks = program("\n".join(f"{h} {i}" for h, i in SIZES)).strip().split("\n\n")
    return [[line.split() for line in block.splitlines()] for block in blocks]


def test_weights_are_the_same_in_cpp(weights_in_cpp):
    wanted = [(sizes, name) for sizes in SIZES for name in get_args(weight_layout.Format)]
    for ((hidden, inter), name), (head, *leaves) in zip(wanted, weights_in_cpp, strict=True):
        assert head == [name, weight_layout.LAYOUT_TAGS[name]]
        shapes = weight_layout.leaf_shapes(name, 1, hidden, inter)
        assert tuple(leaf[0] for leaf in leaves) == DATA_FIELDS == shapes._fields
        for (_, dtype, *numbers), shape, wanted_dtype in zip(
            leaves, shapes, weight_layout.LEAF_DTYPES[name], strict=True
        ):
            *dims, num_bytes = map(int, numbers)
            assert tuple(dims) == shape[1:]
            assert dtype == jnp.dtype(wanted_dtype).name
            assert num_bytes == shape[1] * shape[2] * shape[3] * jnp.dtype(wanted_dtype).itemsize
