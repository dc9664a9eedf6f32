"""The primitives: what they lower to on each platform, and what they are to JAX's transformations."""

import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_megamoe as mm
from jax_megamoe.errors import MegaMoEError
from jax_megamoe.operands import Operands
from jax_megamoe.primitives import _library
from jax_megamoe.primitives.moe_local import moe_local, moe_local_p
from tests.support.cuda_lowering import WORKSPACE, cuda_text
from tests.support.expert_layer import E, H, K, Layer, assert_matches_model, make_layer, packed_weights


def arguments_of(layer: Layer) -> tuple[Any, ...]:
    return layer[:4]


@pytest.mark.usefixtures("built")
def test_cuda_lowering():
    text = cuda_text(lambda *a: mm.moe(*a, activation_clamp=10.0, return_expert_load=True), *arguments_of(make_layer()))
    (call,) = [line for line in text.splitlines() if "jax_megamoe.moe.v1" in line]
    assert "activation_clamp = 1.000000e+01 : f32" in call and "routed_scaling_factor = 1.000000e+00 : f32" in call
    operands, results = call.rsplit(": (", 1)[1].split("->")
    tensors = re.findall(r"tensor<[^>]*>", operands)
    assert len(tensors) == 8
    assert tensors[0] == f"tensor<16x{H}xbf16>"
    assert tensors[5:] == [f"tensor<16x{K}xi32>", f"tensor<16x{K}xf32>", "tensor<i32>"]
    wanted = [f"tensor<16x{H}xbf16>", f"tensor<{E}xi32>", f"tensor<{WORKSPACE}xui8>"]
    assert re.findall(r"tensor<[^>]*>", results) == wanted


@pytest.mark.usefixtures("built")
def test_no_clamp_is_infinity():
    text = cuda_text(mm.moe, *arguments_of(make_layer()))
    assert "activation_clamp = 0x7F800000 : f32" in text


@pytest.mark.usefixtures("built")
def test_cuda_reads_stacked_weights_in_place():
    layer = make_layer()
    stacked = mm.stack_experts([packed_weights(0), packed_weights(1)])

    def f(x: jax.Array, stacked: mm.ExpertWeights, ids: jax.Array, topk_weights: jax.Array) -> jax.Array:
        def step(x: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
            return mm.moe(x, stacked, ids, topk_weights, layer=index), None

        return jax.lax.scan(step, x, jnp.arange(2, dtype=jnp.int32))[0]

    text = cuda_text(f, layer.x, stacked, layer.ids, layer.topk_weights)
    assert text.count("jax_megamoe.moe.v1") == 1
    weight_shapes = ["x".join(map(str, leaf.shape)) for leaf in jax.tree.leaves(stacked)]
    # Only the call, and what hands the arrays on to it, names the shapes of the weights; nothing makes smaller ones.
    passing = ("custom_call", "stablehlo.while", "func.func", "call @", "return", "cond {", "do {")
    for line in text.splitlines():
        if any(shape in line for shape in weight_shapes) and not any(word in line for word in passing):
            raise AssertionError(f"the weights are touched: {line}")
    for leaf in jax.tree.leaves(stacked):
        assert "tensor<" + "x".join(map(str, leaf.shape[1:])) + "x" not in text
        assert "tensor<1x" + "x".join(map(str, leaf.shape[1:])) + "x" not in text


@pytest.mark.usefixtures("built")
def test_no_tokens_need_no_kernel():
    x, ids, topk_weights = jnp.zeros((0, H), jnp.bfloat16), jnp.zeros((0, K), jnp.int32), jnp.zeros((0, K))
    assert "jax_megamoe.moe.v1" not in cuda_text(mm.moe, x, packed_weights(), ids, topk_weights)


@pytest.mark.usefixtures("built")
def test_reference_on_a_gpu_is_explicit():
    text = cuda_text(lambda *a: mm.moe(*a, implementation="reference"), *arguments_of(make_layer()))
    assert "jax_megamoe.moe.v1" not in text and "stablehlo.dot_general" in text
    text = cuda_text(lambda *a: mm.moe(*a, implementation="cuda"), *arguments_of(make_layer()))
    assert "jax_megamoe.moe.v1" in text and "stablehlo.dot_general" not in text


@pytest.mark.usefixtures("built")
def test_one_program_for_both_platforms():
    traced = jax.jit(mm.moe).trace(*arguments_of(make_layer()))
    text = traced.lower(lowering_platforms=("cpu", "cuda")).as_text()
    assert "jax_megamoe.moe.v1" in text and "stablehlo.dot_general" in text


def test_missing_build_is_an_error_on_a_gpu(monkeypatch):
    monkeypatch.setattr(_library, "_core", None)
    with pytest.raises(MegaMoEError, match="_core is not built, wanted its CUDA kernels"):
        cuda_text(mm.moe, *arguments_of(make_layer()))
    monkeypatch.setattr(_library, "_core", types.SimpleNamespace(has_cuda=False))
    with pytest.raises(MegaMoEError, match="_core was built without CUDA"):
        cuda_text(mm.moe, *arguments_of(make_layer()))


@pytest.mark.usefixtures("built")
def test_other_gpus_are_an_error(monkeypatch):
    device = types.SimpleNamespace(device_kind="Some GPU", compute_capability="8.0")
    monkeypatch.setattr(jax, "local_devices", lambda backend=None: [device])
    with pytest.raises(MegaMoEError, match=r"the GPU is Some GPU \(8.0\), wanted compute capability 9.0"):
        cuda_text(mm.moe, *arguments_of(make_layer()))
    device.compute_capability = "9.0"
    assert "jax_megamoe.moe.v1" in cuda_text(mm.moe, *arguments_of(make_layer()))


def test_other_platforms_are_an_error():
    traced = jax.jit(mm.moe).trace(*arguments_of(make_layer()))
    with pytest.raises(MegaMoEError, match="the platform is tpu, wanted cuda or cpu"):
        traced.lower(lowering_platforms=("tpu",))


def test_registers_types_before_targets(monkeypatch):
    calls = []
    core: Any = types.SimpleNamespace(
        ffi_registrations=lambda: {"targets": {"target": {"execute": 1}}, "types": {"type": {"type_id": 2}}}
    )
    monkeypatch.setattr(_library.importlib, "import_module", lambda name: core)
    for kind in ("type", "target"):
        monkeypatch.setattr(
            jax.ffi, f"register_ffi_{kind}", lambda name, capsules, platform: calls.append((name, capsules, platform))
        )
    assert _library._load() is core
    assert calls == [("type", {"type_id": 2}, "CUDA"), ("target", {"execute": 1}, "CUDA")]


def test_a_broken_build_is_not_taken_for_a_missing_one(monkeypatch):
    def fail(name: str) -> None:
        raise ImportError("undefined symbol")

    monkeypatch.setattr(_library.importlib, "import_module", fail)
    with pytest.raises(ImportError, match="undefined symbol"):
        _library._load()


def local_operands(layer: Layer) -> Operands:
    return Operands(layer.x, layer.weights.leaves, layer.ids, layer.topk_weights, jnp.int32(0))


def test_moe_local_by_itself():
    layer = make_layer()
    y, load = moe_local(local_operands(layer))
    assert_matches_model(y, layer)
    np.testing.assert_array_equal(load, layer.load)
    partial_sums, _ = jax.jit(lambda a: moe_local(a, out_dtype=jnp.float32))(local_operands(layer))
    assert partial_sums.dtype == jnp.float32
    np.testing.assert_array_equal(partial_sums.astype(jnp.bfloat16), y)


def test_moe_local_under_vmap_is_one_call():
    layer = make_layer()
    operands = local_operands(layer)

    def local(x: jax.Array, ids: jax.Array, topk_weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        return moe_local(operands._replace(x=x, topk_ids=ids, topk_weights=topk_weights))

    f = jax.vmap(local, in_axes=(1, 1, 1), out_axes=1)
    arguments = tuple(value.reshape(4, 4, -1) for value in (layer.x, layer.ids, layer.topk_weights))
    (call,) = [e for e in jax.make_jaxpr(f)(*arguments).eqns if e.primitive is moe_local_p]
    assert str(call.invars[0].aval) == f"bfloat16[16,{H}]"
    assert_matches_model(f(*arguments)[0], layer)


def test_moe_local_has_no_derivative():
    operands = local_operands(make_layer())
    with pytest.raises(NotImplementedError, match="inference only"):
        jax.grad(lambda x: moe_local(operands._replace(x=x), out_dtype=jnp.float32)[0].sum())(operands.x)
