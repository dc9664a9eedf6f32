"""The reference against the NumPy model, and what the contract says about slots, loads and shapes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from jax_megamoe import reference
from jax_megamoe.errors import DTypeError, LayoutError, MegaMoEError, ShapeError
from jax_megamoe.operands import Operands
from tests.support import numpy_model
from tests.support.cases import one_in
from tests.support.compare import difference

E, H, I = 6, 256, 384
# The order of FP32 sums, and FP8 values that it moves across a rounding boundary.
TOLERANCE = 1e-7

moe = jax.jit(reference.moe, static_argnames=("activation_clamp", "routed_scaling_factor", "return_expert_load"))


@pytest.fixture(scope="module")
def natural() -> numpy_model.Experts:
    rng = np.random.default_rng(0)
    shapes = ((E, I, H), (E, I, H), (E, H, I))
    return numpy_model.quantize_experts(*(rng.normal(size=s).astype(np.float32) * s[-1] ** -0.5 for s in shapes))


@pytest.fixture(scope="module")
def weights(natural) -> mm.ExpertWeights:
    return mm.pack_experts(*natural)


def inputs(num_tokens: int, top_k: int, seed: int = 0, low: int = 0, high: int = E) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_tokens, H)).astype(numpy_model.BF16)
    ids = rng.integers(low, high, (num_tokens, top_k)).astype(np.int32)
    topk_weights = rng.random((num_tokens, top_k), np.float32)
    topk_weights[(ids < 0) | (ids >= E)] = np.nan
    return x, ids, topk_weights


@pytest.mark.parametrize(("top_k", "num_tokens"), one_in(2, [1, 3], [1, 7, 64, 300]))
def test_matches_the_numpy_model(natural, weights, num_tokens, top_k):
    x, ids, topk_weights = inputs(num_tokens, top_k, low=-2, high=E + 2)
    y, load = moe(x, weights, ids, topk_weights, return_expert_load=True)
    wanted, wanted_load = numpy_model.moe(x, natural, ids, topk_weights)
    assert y.dtype == jnp.bfloat16 and load.dtype == jnp.int32
    assert difference(y, wanted) < TOLERANCE
    np.testing.assert_array_equal(load, wanted_load)


def test_stays_close_to_unquantised_arithmetic(natural, weights):
    x, ids, topk_weights = inputs(64, 3)
    exact, _ = numpy_model.moe(x, natural, ids, topk_weights, quantized=False)
    assert 1e-5 < difference(moe(x, weights, ids, topk_weights), exact) < 2e-3


@pytest.mark.parametrize(("clamp", "factor"), [(0.25, 1.0), (None, 2.5), (10.0, 0.3), (1e-3, 7.0)])
def test_clamp_and_scaling(natural, weights, clamp, factor):
    x, ids, topk_weights = inputs(32, 2, seed=3)
    options = {"activation_clamp": clamp, "routed_scaling_factor": factor}
    wanted, _ = numpy_model.moe(x, natural, ids, topk_weights, **options)
    assert difference(moe(x, weights, ids, topk_weights, **options), wanted) < TOLERANCE
    if clamp is not None and clamp < 1:
        unclamped = moe(x, weights, ids, topk_weights, routed_scaling_factor=factor)
        assert difference(unclamped, wanted) > 1e-2


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 999),
    pattern=st.sampled_from(["one expert", "two experts", "mostly unused", "duplicates"]),
    magnitude=st.sampled_from([1e-3, 1.0, 30.0]),
)
@example(seed=130, pattern="two experts", magnitude=30.0)  # a scale at a tie
def test_skewed_and_sparse_routing(natural, weights, seed, pattern, magnitude):
    x, ids, topk_weights = inputs(40, 4, seed, low=-1)
    rng = np.random.default_rng(seed)
    match pattern:
        case "one expert":
            ids[:] = rng.integers(E)
        case "two experts":
            ids = rng.choice([1, 4], ids.shape).astype(np.int32)
        case "mostly unused":
            ids[rng.random(ids.shape) < 0.9] = 2**31 - 1
        case "duplicates":
            ids[:, 1:] = ids[:, :1]
    topk_weights = np.where((ids < 0) | (ids >= E), np.float32(np.nan), np.nan_to_num(topk_weights, nan=0.5))
    x = (x.astype(np.float32) * magnitude).astype(x.dtype)
    y, load = map(np.asarray, moe(x, weights, ids, topk_weights, return_expert_load=True))
    wanted, wanted_load = numpy_model.moe(x, natural, ids, topk_weights)
    # Drawn inputs come close to ties, which FP32 sums in another order break the other way: of E4M3 roundings, and now and
    # then of an activation's scale, a power of two, which rounds 64 columns of one token anew.
    assert difference(y, wanted) < 1e-5
    errors = np.square(y.astype(np.float32) - wanted.astype(np.float32)).sum(-1)
    others = np.argsort(errors)[:-1]
    assert difference(y[others], wanted[others]) < 10 * TOLERANCE
    np.testing.assert_array_equal(load, wanted_load)


def test_a_token_without_slots_gives_exact_zeros(weights):
    x, ids, topk_weights = inputs(8, 2)
    ids[3], topk_weights[3] = [-1, E], np.nan
    y = np.asarray(moe(x, weights, ids, topk_weights))
    assert not y[3].view(np.uint16).any()
    assert np.isfinite(y.astype(np.float32)).all()
    nothing, load = moe(x, weights, np.full_like(ids, -1), np.full_like(topk_weights, np.nan), return_expert_load=True)
    assert not np.asarray(nothing).view(np.uint16).any() and not np.asarray(load).any()


def test_duplicates_count_twice(weights):
    x, _, _ = inputs(4, 1)
    twice, load = moe(x, weights, np.full((4, 2), 3, np.int32), np.ones((4, 2), np.float32), return_expert_load=True)
    once = moe(x, weights, np.full((4, 1), 3, np.int32), np.ones((4, 1), np.float32))
    np.testing.assert_array_equal(np.asarray(twice, np.float32), 2 * np.asarray(once, np.float32))
    assert load.tolist() == [0, 0, 0, 8, 0, 0]


def test_nan_in_one_token_stays_there(weights):
    x, ids, topk_weights = inputs(20, 3)
    clean = np.asarray(moe(x, weights, ids, topk_weights))
    x[7, 130] = np.nan
    y = np.asarray(moe(x, weights, ids, topk_weights))
    assert np.isnan(y[7].astype(np.float32)).all()
    np.testing.assert_array_equal(np.delete(y, 7, 0).view(np.uint16), np.delete(clean, 7, 0).view(np.uint16))


def test_no_tokens(weights):
    x, ids, topk_weights = inputs(0, 2)
    y, load = moe(x, weights, ids, topk_weights, return_expert_load=True)
    assert y.shape == (0, H) and load.tolist() == [0] * E


def test_leading_dimensions_and_vmap_give_the_same_rows(weights):
    x, ids, topk_weights = inputs(12, 2)
    flat = np.asarray(moe(x, weights, ids, topk_weights), np.float32)
    split = [array.reshape(2, 3, 2, -1) for array in (x, ids, topk_weights)]
    np.testing.assert_array_equal(np.asarray(moe(split[0], weights, *split[1:]), np.float32), flat.reshape(2, 3, 2, H))
    mapped = jax.vmap(lambda x, ids, topk_weights: reference.moe(x, weights, ids, topk_weights))(*split)
    assert difference(mapped, flat) < TOLERANCE
    single = moe(x[0], weights, ids[0], topk_weights[0])
    assert single.shape == (H,) and difference(single, flat[0]) < TOLERANCE


def test_stacked_layers_eager_and_scanned(weights):
    x, ids, topk_weights = inputs(5, 2)
    reversed_experts = jax.tree.map(lambda leaf: leaf[::-1], weights)
    stacked = mm.stack_experts([weights, reversed_experts])
    wanted = [np.asarray(moe(x, layer, ids, topk_weights), np.float32) for layer in (weights, reversed_experts)]
    _, scanned = jax.lax.scan(
        lambda carry, i: (carry, reference.moe(x, stacked, ids, topk_weights, layer=i)), None, jnp.arange(2)
    )
    for layer in range(2):
        np.testing.assert_array_equal(np.asarray(scanned[layer], np.float32), wanted[layer])
    np.testing.assert_array_equal(
        np.asarray(reference.moe(x, stacked, ids, topk_weights, layer=1), np.float32), wanted[1]
    )


@pytest.mark.parametrize("check_vma", [True, False])
def test_local_parts_add_up_over_an_expert_axis(weights, check_vma):
    x, ids, topk_weights = inputs(16, 3, low=-1)
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:2])

    def local(x, w, ids, topk_weights):
        first = jax.lax.axis_index("expert") * w.gate_up.shape[0]
        operands = Operands(x, w.leaves, ids - first, topk_weights, jnp.int32(0))
        y, load = reference.moe_local(operands, out_dtype=jnp.float32)
        return jax.lax.psum(y, "expert").astype(jnp.bfloat16), load

    in_specs, out_specs = (P(), P("expert"), P(), P()), (P(), P("expert"))
    mapped = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)
    y, load = jax.jit(mapped)(x, weights, ids, topk_weights)
    wanted, wanted_load = moe(x, weights, ids, topk_weights, return_expert_load=True)
    # The sums over slots associate differently: at most one BF16 rounding apart.
    assert difference(y, wanted) < 1e-6
    np.testing.assert_array_equal(load, wanted_load)


def test_runs_are_bitwise_reproducible(weights):
    arguments = inputs(33, 3)
    first, second = (np.asarray(moe(arguments[0], weights, *arguments[1:])) for _ in range(2))
    np.testing.assert_array_equal(first.view(np.uint16), second.view(np.uint16))


UNFIT: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x of float32": ({"x": np.zeros((4, H), np.float32)}, DTypeError, "x has dtype float32, wanted bfloat16"),
    "x of another hidden size": ({"x": jnp.zeros((4, 128), jnp.bfloat16)}, ShapeError, r"x has shape \(4, 128\)"),
    "ids of fewer tokens": ({"topk_ids": np.zeros((3, 2), np.int32)}, ShapeError, r"topk_ids has shape \(3, 2\)"),
    "ids of float32": (
        {"topk_ids": np.zeros((4, 2), np.float32)},
        DTypeError,
        "topk_ids has dtype float32, wanted int32",
    ),
    "topk_weights of more slots": (
        {"topk_weights": np.zeros((4, 3), np.float32)},
        ShapeError,
        r"topk_weights has shape \(4, 3\)",
    ),
    "no weights": ({"weights": None}, LayoutError, "weights is None, wanted ExpertWeights"),
    "layer without a stack": ({"layer": 0}, ShapeError, "layer is 0, wanted None"),
    "clamp zero": ({"activation_clamp": 0.0}, MegaMoEError, "activation_clamp is 0.0, wanted a positive FP32 number"),
    "clamp NaN": ({"activation_clamp": float("nan")}, MegaMoEError, "activation_clamp is nan"),
    "implementation of GPUs": ({"implementation": "cuda"}, MegaMoEError, "implementation is 'cuda'"),
}


@pytest.mark.parametrize(("replaced", "error", "message"), UNFIT.values(), ids=UNFIT)
def test_unfit_arguments_are_refused_by_name(weights, replaced, error, message):
    x, ids, topk_weights = inputs(4, 2)
    arguments: dict[str, Any] = {"x": x, "weights": weights, "topk_ids": ids, "topk_weights": topk_weights}
    with pytest.raises(error, match=message):
        reference.moe(**{**arguments, **replaced})


@pytest.mark.parametrize("differentiate", [jax.grad, jax.jacfwd], ids=["grad", "jvp"])
def test_there_is_no_derivative(weights, differentiate):
    x, ids, topk_weights = inputs(4, 2)

    def loss(x, topk_weights):
        return moe(x, weights, ids, topk_weights).astype(jnp.float32).sum()

    for argument in (0, 1):
        with pytest.raises(NotImplementedError, match="inference only"):
            differentiate(loss, argument)(x, topk_weights)
        with pytest.raises(NotImplementedError, match="inference only"):
            jax.jit(differentiate(loss, argument))(x, topk_weights)


def test_some_axes_manual_and_others_automatic(weights):
    x, ids, topk_weights = inputs(16, 3, low=-1)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices("cpu")[:4])
    specs: Any = {"in_specs": (P("data"), P(), P("data"), P("data")), "out_specs": P("data"), "axis_names": {"data"}}
    y = jax.jit(jax.shard_map(moe, mesh=mesh, **specs))(x, weights, ids, topk_weights)
    np.testing.assert_array_equal(y, moe(x, weights, ids, topk_weights))
