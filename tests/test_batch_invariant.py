"""`batch_invariant=True`: a token's bits whatever else is in the call, over any mesh; and what GPUs are told of it.

Bits are compared on CPUs here, whose products give a row the same bits in all tiles of two rows or more; of the kernel
tests/gpu/test_batch_invariant.py does it.
"""

import functools
import inspect
import re
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from jax_megamoe.errors import ArgumentError, PlatformError
from jax_megamoe.primitives import _library
from jax_megamoe.weight_layout import Format
from tests.support import numpy_model
from tests.support.cases import one_in
from tests.support.compare import bits, difference
from tests.support.cuda_lowering import FUSED, LOCAL, calls, cuda_text
from tests.support.expert_layer import TOLERANCE, E, H, I, K, make_layer, packed_weights
from tests.support.meshes import AUTO, KINDS, MESHES, make_mesh, place, place_all
from tests.support.skips import unless, why_no_host_devices

pytestmark = unless(why_no_host_devices())

FORMATS = get_args(Format)
TOKENS = 48
FUNCTIONS = {"moe": mm.moe, "reference": mm.reference.moe}
WITH_EXPERTS = {name: MESHES[name] for name in ("expert", "data x expert")}
invariant: Any = functools.partial(mm.moe, batch_invariant=True)


@functools.cache
def floats(num_experts: int = E, seed: int = 0) -> tuple[jax.Array, ...]:
    """Gate, up and down of so many experts."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((num_experts, I, H), (num_experts, I, H), (num_experts, H, I))
    return tuple(0.06 * jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))


@functools.cache
def problem(weight_format: Format = "fp8_block") -> tuple[Any, ...]:
    """Of every other token the first and the third slot cancel: what the second adds between them loses digits, and
    would not if they were added first, as they are where they are on one rank and the second slot is not."""
    rng, layer = np.random.default_rng(0), make_layer(TOKENS)
    ids = rng.integers(-1, E, (TOKENS, 4)).astype(np.int32)
    topk_weights = rng.random((TOKENS, 4), np.float32)
    ids[::2] = (np.arange(TOKENS // 2)[:, None] + [0, 5, 0, 3]) % E
    topk_weights[::2, 0] *= 1 << 20
    topk_weights[::2, 2] = -topk_weights[::2, 0]
    weights = mm.quantize_experts(*floats(), format=weight_format)
    return layer.x, weights, jnp.asarray(ids), jnp.asarray(topk_weights)


def on_mesh(mesh: Any, function: Any, arguments: tuple[Any, ...], **options: Any) -> jax.Array:
    """The result for arguments on the mesh, whole."""
    y = jax.jit(functools.partial(function, **options))(*place_all(mesh, arguments))
    return jnp.asarray(np.asarray(y))


# What a token's bits depend on.


@pytest.mark.parametrize("weight_format", FORMATS)
def test_any_part_of_a_batch(weight_format):
    """Alone, in small calls, at other places, beside other tokens and invalid ones."""
    x, weights, ids, topk_weights = problem(weight_format)
    run = jax.jit(invariant)
    wanted = bits(run(x, weights, ids, topk_weights))
    for first, end in ((0, 1), (3, 8), (8, 48)):
        part = slice(first, end)
        np.testing.assert_array_equal(bits(run(x[part], weights, ids[part], topk_weights[part])), wanted[part])
    order = np.random.default_rng(0).permutation(TOKENS)
    np.testing.assert_array_equal(bits(run(x[order], weights, ids[order], topk_weights[order])), wanted[order])
    valid = jax.jit(functools.partial(invariant, num_valid_tokens=20))(x, weights, ids, topk_weights)
    np.testing.assert_array_equal(bits(valid)[:20], wanted[:20])


@pytest.mark.parametrize(("kind", "sizes"), one_in(2, KINDS, MESHES))
def test_any_mesh(sizes, kind):
    wanted = bits(jax.jit(invariant)(*problem()))
    mesh = make_mesh(sizes, kind)
    np.testing.assert_array_equal(bits(on_mesh(mesh, invariant, problem())), wanted)


@pytest.mark.parametrize(("num_ranks", "weight_format"), one_in(2, [2, 4], FORMATS))
def test_any_number_of_ranks(num_ranks, weight_format):
    mesh = make_mesh({"expert": num_ranks}, AUTO)
    wanted = bits(jax.jit(invariant)(*problem(weight_format)))
    np.testing.assert_array_equal(bits(on_mesh(mesh, invariant, problem(weight_format))), wanted)


def test_without_the_option_bits_depend_on_the_ranks():
    """So that the tests above can fail: slots are added first that are on one rank."""
    alone = bits(jax.jit(mm.moe)(*problem()))
    assert (bits(on_mesh(make_mesh(MESHES["expert"], AUTO), mm.moe, problem())) != alone).any()


@pytest.mark.parametrize(
    ("function", "tokens"), one_in(2, FUNCTIONS, [P(), P("expert"), P(("data", "expert")), P("data")])
)
def test_in_shard_map(function, tokens):
    """Where ranks have the same tokens, their slots' results are added by XLA's all-reduce."""
    mesh = make_mesh(MESHES["data x expert"], AUTO)
    run = functools.partial(function, batch_invariant=True)
    specs = (tokens, P("expert"), tokens, tokens)
    mapped = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=tokens))
    np.testing.assert_array_equal(bits(mapped(*problem())), bits(jax.jit(run)(*problem())))


@pytest.mark.parametrize(
    ("sizes", "shared_format"), one_in(2, WITH_EXPERTS, {"one kernel": "fp8_block", "two": "mxfp4"})
)
def test_shared_experts(sizes, shared_format):
    mesh = make_mesh(sizes, AUTO)
    shared = mm.quantize_experts(*floats(num_experts=2, seed=1), format=shared_format)
    wanted = bits(jax.jit(invariant)(*problem(), shared=shared))
    assert (bits(jax.jit(invariant)(*problem())) != wanted).any()
    np.testing.assert_array_equal(bits(on_mesh(mesh, invariant, problem(), shared=place(mesh, shared))), wanted)


def test_layers_and_vmap():
    x, weights, ids, topk_weights = problem()
    wanted = bits(jax.jit(invariant)(*problem()))
    stacked = mm.stack_experts([packed_weights(1), weights])
    run = jax.jit(lambda *a, layer: invariant(*a, layer=layer))
    np.testing.assert_array_equal(bits(run(x, stacked, ids, topk_weights, layer=jnp.int32(1))), wanted)
    folded = (value.reshape(6, 8, -1) for value in (x, ids, topk_weights))
    y = jax.jit(jax.vmap(lambda x, ids, topk_weights: invariant(x, weights, ids, topk_weights)))(*folded)
    np.testing.assert_array_equal(bits(y).reshape(wanted.shape), wanted)


def test_loads_are_counted_alike():
    layer, mesh = make_layer(), make_mesh(MESHES["data x expert"], AUTO)
    _, load = jax.jit(functools.partial(invariant, return_expert_load=True))(*place_all(mesh, layer))
    np.testing.assert_array_equal(load, layer.load)


# What is computed.


@pytest.mark.parametrize("function", [mm.moe, mm.reference.moe], ids=["moe", "reference"])
def test_numerics_are_those_of_the_orientation_for_many_tokens(function):
    """128 columns of activations share a scale: the second 64 are so small here that they become subnormal."""
    rng, columns = np.random.default_rng(0), np.arange(2 * I)
    experts = numpy_model.Experts(
        numpy_model.round_e4m3(rng.normal(size=(E, 2 * I, H))),
        np.broadcast_to(np.where(columns >= I + 64, 2.0**-21, 2.0**-5), (E, 2 * I)).astype(np.float32),
        numpy_model.round_e4m3(rng.normal(size=(E, H, I))),
        np.full((E, H), 2.0**-5, np.float32),
    )
    x, _, ids, topk_weights = make_layer()[:4]
    down = np.array(experts.down)
    down[:, :, :64] = 0  # what is left is what differs
    experts = experts._replace(down=down)
    arguments = np.asarray(x), experts, np.asarray(ids), np.asarray(topk_weights)
    wanted, by_default = (numpy_model.moe(*arguments, activation_block=block)[0] for block in (128, 64))
    assert difference(wanted, by_default) > 1e-3
    weights = mm.pack_experts(*experts)
    assert weights.format == "fp8_channel"
    assert difference(function(x, weights, ids, topk_weights, batch_invariant=True), wanted) < TOLERANCE
    assert difference(function(x, weights, ids, topk_weights), by_default) < TOLERANCE


# What GPUs are told.


def flags(text: str) -> list[str]:
    found = re.findall(r"batch_invariant = (\d+) : i64", text)
    assert len(found) == len(calls(text)) > 0
    return found


@pytest.mark.parametrize("given", [True, False, np.True_, 1])
def test_a_call_of_one_device_says_so(built, given):
    asked: list[tuple[Any, ...]] = []

    def workspace_bytes(*sizes: Any) -> int:
        asked.append(sizes)
        return 4096

    built.workspace_bytes = workspace_bytes
    text = cuda_text(functools.partial(mm.moe, batch_invariant=given), *make_layer()[:4])
    assert calls(text) == [LOCAL] and flags(text) == [str(int(given))]
    assert asked == [(16, K, H, I, E, "fp8_block", bool(given))]


def test_a_call_of_a_group_says_so(built):
    text = cuda_text(invariant, *place_all(make_mesh(MESHES["expert"], AUTO), make_layer()))
    assert calls(text) == [FUSED] and flags(text) == ["1"]
    assert set(built.asked) == {(2, K, H, I, E // 8, "fp8_block", True, 8)}


@pytest.mark.usefixtures("built")
def test_all_calls_of_a_program_say_so():
    x, weights, ids, topk_weights = make_layer()[:4]
    shared = mm.quantize_experts(*floats(num_experts=2), format="mxfp4")
    assert flags(cuda_text(lambda *a: invariant(*a, shared=shared), x, weights, ids, topk_weights)) == ["1", "1"]
    stacked = mm.stack_experts([weights, weights])
    assert flags(cuda_text(lambda *a: invariant(*a, layer=1), x, stacked, ids, topk_weights)) == ["1"]
    mapped = jax.vmap(lambda x, ids, topk_weights: invariant(x, weights, ids, topk_weights))
    folded = (value.reshape(2, 8, -1) for value in (x, ids, topk_weights))
    assert flags(cuda_text(mapped, *folded)) == ["1"]
    mesh = make_mesh(MESHES["data x expert"], AUTO)
    local = jax.shard_map(invariant, mesh=mesh, in_specs=(P("expert"),) * 4, out_specs=P("expert"))
    text = cuda_text(local, *place_all(mesh, make_layer(), "expert"))
    assert calls(text) == [FUSED] and flags(text) == ["1"]


@pytest.mark.usefixtures("built")
def test_collectives_bring_the_result_of_each_slot():
    mesh = make_mesh(MESHES["expert"], AUTO)
    text = cuda_text(functools.partial(invariant, implementation="collective"), *place_all(mesh, make_layer()))
    assert calls(text) == [LOCAL] and flags(text) == ["1"]
    (call,) = [line for line in text.splitlines() if LOCAL in line]
    assert f"tensor<{16 * K}x{H}xbf16>" in call and f"tensor<{16 * K}x1xi32>" in call
    (exchange,) = re.findall(r'"?stablehlo\.all_to_all"?\(.*?-> tensor<([^>]*)>', text, re.DOTALL)
    assert exchange.endswith("ui16") and int(np.prod([int(n) for n in exchange.split("x")[:-1]])) == 16 * K * H


# Arguments, and memory.


@pytest.mark.parametrize("function", [mm.moe, mm.reference.moe], ids=["moe", "reference"])
@pytest.mark.parametrize("value", [None, 2, "yes", jnp.bool_(True)], ids=str)
def test_what_is_no_flag_is_refused(function, value):
    with pytest.raises(ArgumentError, match=r"batch_invariant is .*, wanted True or False, known while tracing"):
        function(*make_layer()[:4], batch_invariant=value)


def test_buffer_bytes_of_this_build():
    core: Any = _library._core
    if not hasattr(core, "peer_buffer_bytes"):
        pytest.skip("jax_megamoe._core has no peer_buffer_bytes")
    ask = functools.partial(mm.expert_parallel.buffer_bytes, top_k=6, hidden_size=4096, intermediate_size=2048)
    ask = functools.partial(ask, num_experts=256, num_ranks=8)
    assert ask(32, batch_invariant=True) != ask(32)  # chunks are larger, so that there are fewer of them
    assert ask(8192, batch_invariant=True) == ask(8192)
    with pytest.raises(ArgumentError, match="batch_invariant is 'no', wanted True or False"):
        mm.expert_parallel.buffer_bytes(8, 6, 4096, 2048, 256, 8, batch_invariant="no")  # type: ignore[arg-type]


def test_a_module_that_does_not_know_the_option_is_refused(built):
    """As in an editable install after a change of CUDA code, until it is built anew."""
    built.workspace_bytes = lambda tokens, top_k, hidden, inter, experts, weight_format: 4096
    with pytest.raises(PlatformError, match="_core has another workspace_bytes, wanted a build of the same version"):
        cuda_text(invariant, *make_layer()[:4])


def test_both_functions_have_it_off():
    for function in (mm.moe, mm.reference.moe):
        assert inspect.signature(function).parameters["batch_invariant"].default is False
