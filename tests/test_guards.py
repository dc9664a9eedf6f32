"""The package under JAX's guards, which forbid what is legal but often a mistake: the same results as without."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_megamoe as mm
from jax_megamoe.errors import ArgumentError
from jax_megamoe.weight_layout import Format
from tests.support.cases import exhaustive
from tests.support.expert_layer import E, H, I, make_layer, natural_weights, packed_weights
from tests.support.meshes import AUTO, make_mesh, place, place_all

GUARDS: dict[str, Callable[[], Any]] = {
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "transfers": lambda: jax.transfer_guard("disallow"),
    "dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
    # The unused slots of the layer have NaN for weights.
    "NaN": lambda: jax.debug_nans(True),
    "64 bits": lambda: jax.enable_x64(True),
}


@contextlib.contextmanager
def all_that_forbid() -> Iterator[None]:
    """The guards that change no types: what one of them forbids fails with the others beside it, too."""
    with contextlib.ExitStack() as stack:
        for name, guard in GUARDS.items():
            if name != "64 bits":
                stack.enter_context(guard())
        yield


# Each guard means that JAX traces anew: one by one they say which one forbids what all of them do.
ALONE_OR_TOGETHER = {
    **{name: exhaustive(guard, id=name) for name, guard in GUARDS.items()},
    "64 bits": pytest.param(GUARDS["64 bits"], id="64 bits"),
    "all that forbid": pytest.param(all_that_forbid, id="all that forbid"),
}


NEW_FORMATS: tuple[Format, ...] = ("fp8_channel", "mxfp4")


def quantize_leaves(floats: list[jax.Array], format: Format) -> list[jax.Array]:
    return jax.tree.leaves(mm.quantize_experts(floats[0], floats[0], floats[1], format=format))


def pack_leaves(arrays: tuple[jax.Array, ...]) -> list[jax.Array]:
    return jax.tree.leaves(mm.pack_experts(*arrays))


@functools.cache
def operations() -> dict[str, Callable[[], Any]]:
    """Calls whose arguments are on the device already."""
    layer, logits = make_layer(), jax.random.normal(jax.random.key(0), (2, 5, 16))
    stacked = mm.stack_experts([packed_weights(0), packed_weights(1)])
    bias, tokens, table = jnp.arange(16.0), jnp.arange(10).reshape(2, 5), jnp.arange(30).reshape(10, 3)
    floats = [jnp.asarray(np.random.default_rng(0).normal(size=s), jnp.float32) for s in ((E, I, H), (E, H, I))]
    blocks = [jnp.asarray(array) for array in natural_weights()]
    single_tokens = [value[:, None] for value in (layer.x, layer.ids, layer.topk_weights)]
    index, mask = jnp.int32(1), tokens > 4
    expert_ids = jnp.array([3, 0, 1, 2, 4, 5, 6, 7, 3, 3, 1, 7])
    replicas = mm.replica_map(expert_ids, E, 3)
    physical_load, loads_of_layers = jnp.arange(12), jnp.arange(24).reshape(2, 12)
    options: dict[str, Any] = {"activation_clamp": np.float64(1.5), "return_expert_load": True}
    shared = mm.take_experts(packed_weights(1), jnp.array([2]))
    gates = jnp.full((*layer.x.shape[:-1], 1), 0.5)
    router = mm.checkpoints.Router(jnp.zeros((16, H)), None, None, {"top_k": 3}, logit_bias=bias)

    mesh = make_mesh({"expert": 4}, AUTO)
    on_mesh = place_all(mesh, layer)
    layers_on_mesh = [place(mesh, packed_weights(i), "expert") for i in range(2)]
    stacked_on_mesh = place(mesh, stacked, None, "expert")
    ids_on_mesh = place(mesh, np.asarray(expert_ids))

    def scan(x, weights, ids, topk_weights):
        def body(x, index):
            return mm.moe(x, weights, ids, topk_weights, layer=index, routed_scaling_factor=np.float64(0.5)), None

        return jax.lax.scan(body, x, jnp.arange(2))[0]  # of 64 bits, where they are on

    def mapped(x, ids, topk_weights):
        return mm.moe(x, layer.weights, ids, topk_weights)

    of_formats: dict[str, Callable[[], Any]] = {}
    for format in NEW_FORMATS:
        weights = mm.quantize_experts(floats[0], floats[0], floats[1], format=format)
        of_formats |= {
            f"quantize to {format}": functools.partial(quantize_leaves, floats, format),
            f"pack {format}": functools.partial(pack_leaves, weights.unpack()),
            f"unpack {format}": weights.unpack,
            f"moe of {format}": functools.partial(mm.moe, layer.x, weights, *layer[2:4], **options),
        }

    return of_formats | {
        "route": lambda: mm.route(logits, 3),
        "route in groups": lambda: mm.route(logits, 3, scoring="sigmoid", bias=bias, num_groups=4, top_groups=2),
        "route by maximum": lambda: mm.route(logits, 3, num_groups=4, top_groups=2, group_scoring="max"),
        "route small scores": lambda: mm.route(logits, 3, scoring="sqrtsoftplus"),
        "route by table": lambda: mm.route(logits, 3, scoring="sqrtsoftplus", token_ids=tokens, hash_table=table),
        "route images": lambda: mm.route(logits, 3, bias=bias, image_bias=bias, is_image=mask),
        "replica map": lambda: mm.replica_map(expert_ids, E, 3),
        "to physical": lambda: mm.to_physical(layer.ids, *replicas, first_token=1),
        "to physical in steps": lambda: mm.to_physical(layer.ids, *replicas, first_token=index),
        "logical load": lambda: mm.logical_load(physical_load, *replicas),
        "logical load of layers": lambda: mm.logical_load(loads_of_layers, *replicas),
        "take experts": lambda: jax.tree.leaves(mm.take_experts(packed_weights(), expert_ids)),
        "take experts of a stack": lambda: jax.tree.leaves(mm.take_experts(stacked, expert_ids)),
        "take experts on a mesh": lambda: jax.tree.leaves(mm.take_experts(stacked_on_mesh, ids_on_mesh)),
        "moe of valid tokens": lambda: mm.moe(*layer[:4], num_valid_tokens=3, **options),
        "moe of traced valid tokens": lambda: mm.moe(*layer[:4], num_valid_tokens=index, **options),
        "moe of valid tokens on a mesh": lambda: mm.moe(*on_mesh, num_valid_tokens=3, **options),
        "reference of valid tokens": lambda: mm.reference.moe(*layer[:4], num_valid_tokens=index, **options),
        "moe": lambda: mm.moe(*layer[:4], **options),
        "moe with shared experts": lambda: mm.moe(*layer[:4], shared=shared, **options),
        "moe with gated shared experts": lambda: mm.moe(*layer[:4], shared=shared, shared_weights=gates, **options),
        "route with biased logits": lambda: router.route(logits),
        "moe of a layer": lambda: mm.moe(layer.x, stacked, *layer[2:4], layer=1),
        "moe of a traced layer": lambda: mm.moe(layer.x, stacked, *layer[2:4], layer=index),
        "moe in jit": lambda: jax.jit(scan)(layer.x, stacked, *layer[2:4]),
        "moe in vmap": lambda: jax.jit(jax.vmap(mapped))(*single_tokens),
        "reference": lambda: mm.reference.moe(*layer[:4], **options),
        "quantize": lambda: jax.tree.leaves(mm.quantize_experts(floats[0], floats[0], floats[1])),
        "pack": lambda: jax.tree.leaves(mm.pack_experts(*blocks)),
        "stack": lambda: jax.tree.leaves(mm.stack_experts([packed_weights(0), packed_weights(1)])),
        "unpack": stacked.unpack,
        "moe on a mesh": lambda: mm.moe(*on_mesh, **options),
        "moe of a layer on a mesh": lambda: mm.moe(on_mesh[0], stacked_on_mesh, *on_mesh[2:], layer=1),
        "fill a stack on a mesh": lambda: jax.tree.leaves(mm.stack_experts(iter(layers_on_mesh), num_layers=2)),
    }


@functools.cache
def unguarded(name: str) -> Any:
    return operations()[name]()


@pytest.mark.parametrize("name", sorted(operations()))
@pytest.mark.parametrize("guard", ALONE_OR_TOGETHER.values())
def test_results_are_those_without_the_guard(guard, name):
    wanted = unguarded(name)
    with guard():
        results = operations()[name]()
    for result, value in zip(jax.tree.leaves(results), jax.tree.leaves(wanted), strict=True):
        assert result.dtype == value.dtype
        np.testing.assert_array_equal(np.asarray(result), np.asarray(value))


# The scale of such a row is NaN, which a guard against NaN finds first.
@pytest.mark.parametrize("guard", sorted(set(GUARDS) - {"NaN"}))
def test_exponents_that_cannot_be_served_are_found(guard):
    floats = [jnp.ones(shape) for shape in ((E, I, H), (E, I, H), (E, H, I))]
    floats[2] = floats[2].at[1, 3, :32].set(2.0**-40)
    message = "row 3 of expert 1 of down has E8M0 exponents from 85 to 125"
    with GUARDS[guard](), pytest.raises(ArgumentError, match=message):
        mm.quantize_experts(*floats, format="mxfp4")
