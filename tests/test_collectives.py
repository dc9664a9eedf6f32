"""XLA's collectives around the experts of one device: what travels, and what that does to the numbers."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from jax_megamoe import collectives
from tests.support import numpy_model
from tests.support.cases import one_in
from tests.support.compare import bits, difference
from tests.support.cuda_lowering import cuda_text
from tests.support.expert_layer import TOLERANCE, H, K, assert_matches_model, make_layer, natural_weights
from tests.support.hlo import bytes_of_collectives, types_of_collectives
from tests.support.meshes import AUTO, make_mesh, place_all
from tests.support.problems import Sizes, make_problem
from tests.support.skips import unless, why_no_host_devices

NUM_DEVICES = 8

pytestmark = unless(why_no_host_devices(NUM_DEVICES))

collective = functools.partial(mm.moe, implementation="collective")
FUNCTIONS = {"moe": collective, "reference": mm.reference.moe}


def on_mesh(sizes: dict[str, int], arguments: Any, function: Any = collective) -> Any:
    """The compiled function on a mesh, in a `shard_map` over all its axes, and what it returns."""
    mesh = make_mesh(sizes, AUTO)
    tokens = P(tuple(sizes))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=(tokens, P("expert"), tokens, tokens), out_specs=tokens)
    placed = place_all(mesh, arguments, tuple(sizes))
    compiled = jax.jit(mapped).lower(*placed).compile()
    return compiled, compiled(*placed)


MESHES = [{"expert": 2}, {"data": 2, "expert": 4}, {"expert": 8}]


@pytest.mark.parametrize(("function", "sizes"), one_in(2, FUNCTIONS, MESHES))
def test_bits_of_one_device_on_cpus(sizes, function):
    """FP32 holds sums of three BF16 numbers of about one size, so that the order of the ranks does not show."""
    layer = make_layer()
    _, y = on_mesh(sizes, layer, function)
    np.testing.assert_array_equal(bits(y), bits(jax.jit(function)(*layer[:4])))
    assert_matches_model(y, layer)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_sums_of_ranks_meet_in_bf16_on_gpus(sizes, monkeypatch):
    """What programs for GPUs do, in one for CPUs."""
    monkeypatch.setattr(collectives, "_exchange_for_platform", collectives._exchange_bf16)
    layer = make_layer()
    compiled, y = on_mesh(sizes, layer)
    x, ids, topk_weights = map(np.asarray, (layer.x, layer.ids, layer.topk_weights))
    wanted, _ = numpy_model.moe(x, natural_weights(), ids, topk_weights, num_ranks=sizes["expert"])
    assert difference(y, wanted) < TOLERANCE < difference(y, layer.y) < 1e-5
    num_tokens = len(x) * sizes["expert"] // math.prod(sizes.values())
    assert bytes_of_collectives(str(compiled.as_text()))["all-to-all"] == num_tokens * 2 * H


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_bytes_that_travel(num_ranks):
    compiled, _ = on_mesh({"expert": num_ranks}, make_layer(6 * num_ranks))
    out, back = 6 * num_ranks * (H + 2 * H // 128 + 8 * K), 6 * num_ranks * 4 * H
    assert bytes_of_collectives(str(compiled.as_text())) == {"all-gather": out, "all-to-all": back}


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize(("function", "check_vma"), one_in(2, FUNCTIONS, [True, False]))
def test_types_that_travel_on_each_platform(check_vma, function):
    mesh, layer = make_mesh({"expert": 4}, AUTO), make_layer()
    mapped = jax.shard_map(function, mesh=mesh, in_specs=(P("expert"),) * 4, out_specs=P("expert"), check_vma=check_vma)
    arguments = place_all(mesh, layer, "expert")
    sums = f"4x4x{H}x"
    for platforms, types in {("cuda",): ["ui16"], ("cpu",): ["f32"], ("cpu", "cuda"): ["f32", "ui16"]}.items():
        travel = types_of_collectives(cuda_text(mapped, *arguments, platforms=platforms))
        assert set(travel["all_gather"]) == {f"16x{H + 2 * H // 128 + 8 * K}xui8"}
        assert sorted(travel["all_to_all"]) == [sums + type_ for type_ in types]
        assert set(travel) == {"all_gather", "all_to_all"}


@pytest.mark.parametrize(("function", "check_vma"), one_in(2, FUNCTIONS, [True, False], first=1))
def test_every_way_to_trace(check_vma, function):
    """Outside `jax.jit` and under `jax.vmap` a program chooses by its platform, too."""

    def twice(x: Any, weights: Any, *routing: Any) -> Any:
        x, ids, topk_weights = (jnp.stack([value, value]) for value in (x, *routing))
        return jax.vmap(function, in_axes=(0, None, 0, 0))(x, weights, ids, topk_weights)

    mesh, layer, specs = make_mesh({"expert": 4}, AUTO), make_layer(), (P("expert"),) * 4
    arguments = place_all(mesh, layer, "expert")
    once = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P("expert"), check_vma=check_vma)
    assert_matches_model(once(*arguments), layer)
    mapped = jax.shard_map(twice, mesh=mesh, in_specs=specs, out_specs=P(None, "expert"), check_vma=check_vma)
    for y in jax.jit(mapped)(*arguments):
        assert_matches_model(y, layer)
    text = cuda_text(mapped, *arguments, platforms=("cpu",))
    assert all(type_.endswith("xf32") for type_ in types_of_collectives(text)["all_to_all"])


@pytest.mark.parametrize(
    ("function", "differentiate", "check_vma"),
    one_in(2, {**FUNCTIONS, "default": mm.moe}, {"grad": jax.grad, "jvp": jax.jacfwd}, [True, False]),
)
def test_there_is_no_derivative(check_vma, differentiate, function):
    """What travels is integers, whose derivative would be zero."""
    mesh, layer = make_mesh({"expert": 4}, AUTO), make_layer()
    specs = (P("expert"),) * 4
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P("expert"), check_vma=check_vma)
    x, weights, ids, topk_weights = place_all(mesh, layer, "expert")

    def loss(x: Any, topk_weights: Any) -> Any:
        return mapped(x, weights, ids, topk_weights).astype(jnp.float32).sum()

    for argument in (0, 1):
        with pytest.raises(NotImplementedError, match="inference only"):
            jax.jit(differentiate(loss, argument))(x, topk_weights)


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_roundings_that_no_compiler_may_skip(batch_invariant):
    """Those of x before it is quantised, and of y: XLA on GPUs skips them where FP32 comes before and after."""
    mesh, layer, specs = make_mesh({"expert": 4}, AUTO), make_layer(), (P("expert"),) * 4
    function = functools.partial(collective, batch_invariant=batch_invariant)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P("expert"))
    text = cuda_text(mapped, *place_all(mesh, layer, "expert"))
    types = re.findall(r"stablehlo.reduce_precision %\w+, format = e8m7 : tensor<(\w+)>", text)
    assert types == [f"4x{H}xf32"] * 2


def test_tokens_that_all_ranks_have_do_not_travel():
    """Their sums are added up in FP32, on all platforms."""
    mesh, layer = make_mesh({"expert": 4}, AUTO), make_layer()
    mapped = jax.shard_map(collective, mesh=mesh, in_specs=(P(), P("expert"), P(), P()), out_specs=P())
    arguments = place_all(mesh, layer, tokens=None)
    compiled = jax.jit(mapped).lower(*arguments).compile()
    assert bytes_of_collectives(str(compiled.as_text())) == {"all-reduce": 4 * layer.x.size}
    assert difference(compiled(*arguments), layer.y) < TOLERANCE


def odd_rows() -> dict[str, Any]:
    """Rows of x that are no usual numbers."""
    some = np.random.default_rng(1).standard_normal(H).astype(np.float32)
    return {
        "NaN": np.where(np.arange(H) == 5, np.nan, some),
        "infinity": np.where(np.arange(H) == 200, np.inf, some),
        "infinities": np.where(np.arange(H) % 2, -np.inf, np.inf),
        "NaN and infinity": np.where(np.arange(H) < 2, [[np.nan], [np.inf]], some)[0],
        "zeros": np.zeros(H),
        "negative zeros": -np.zeros(H),
        "below the floor": some * 3e-5,
        "about the floor": np.where(np.arange(H) % 3, 9.99e-5, 1e-4),
        "subnormal": some * 1e-39,
        "largest": np.where(np.arange(H) % 2, 3.3895e38, some),
    }


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_odd_values_travel(function):
    """Numbers are those of one device, bit by bit where slots are added as there, and NaN stays in its token."""
    rows = odd_rows()
    layer = make_layer(2 * len(rows) + 4)
    x = np.array(layer.x)
    ids = np.arange(len(x) * K, dtype=np.int32).reshape(-1, K) % 8  # each token has experts
    topk_weights = np.ones(ids.shape, np.float32)
    x[1 : 2 * len(rows) : 2] = np.stack(list(rows.values())).astype(x.dtype)
    arguments = (jnp.asarray(x), layer.weights, jnp.asarray(ids), jnp.asarray(topk_weights))
    invariant = functools.partial(function, batch_invariant=True)
    wanted = np.asarray(jax.jit(invariant)(*arguments)).astype(np.float32)
    _, y = on_mesh({"data": 2, "expert": 4}, arguments, invariant)
    finite = np.isfinite(wanted)
    np.testing.assert_array_equal(np.isfinite(np.asarray(y).astype(np.float32)), finite)
    np.testing.assert_array_equal(bits(y)[finite], bits(wanted.astype(x.dtype))[finite])
    bad = [2 * row + 1 for row in range(4)]
    assert set(np.flatnonzero(~finite.all(1))) >= set(bad) and finite[::2].all() and not finite[bad].any()


def test_a_padded_hidden_size_travels():
    problem = make_problem(16, Sizes(hidden=160, inter=128, num_experts=8, top_k=K), "masked")
    invariant = functools.partial(collective, batch_invariant=True)
    compiled, y = on_mesh({"expert": 4}, problem, invariant)
    np.testing.assert_array_equal(bits(y), bits(jax.jit(invariant)(*problem)))
    assert bytes_of_collectives(str(compiled.as_text())) == {
        "all-gather": 16 * (256 + 4 + 8 * K),
        "all-to-all": 16 * K * 2 * 256,
    }


def test_tokens_that_some_axes_split():
    """Over the others, of which every rank has the same tokens, XLA adds the sums of the former."""
    mesh, layer = make_mesh({"a": 2, "b": 4}, AUTO), make_layer(32)
    function = functools.partial(collective, expert_axis=("a", "b"), token_axes="b")
    specs = (P("b"), P(("a", "b")), P("b"), P("b"))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P("b"))
    arguments = place_all(mesh, layer, "b", ("a", "b"))
    compiled = jax.jit(mapped).lower(*arguments).compile()
    assert bytes_of_collectives(str(compiled.as_text())) == {
        "all-gather": 32 * (H + 2 * H // 128 + 8 * K),
        "all-to-all": 32 * 4 * H,
        "all-reduce": 8 * 4 * H,
    }
    assert_matches_model(compiled(*arguments), layer)
