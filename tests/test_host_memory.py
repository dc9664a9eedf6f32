"""Arrays that are in host memory (pinned_host): what only reads them serves, what computes says where they have to be."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_megamoe as mm
from jax_megamoe.errors import ArgumentError, ShardingError
from tests.support.expert_layer import make_layer, natural_weights, packed_weights


def to_host(value: Any) -> Any:
    return jax.device_put(value, jax.memory.Space.Host)


def calls() -> dict[str, tuple[Any, str]]:
    layer, weights = make_layer(), to_host(packed_weights())
    logits, bias, ids, table = jnp.ones((4, 8)), jnp.ones(8), jnp.zeros(4, jnp.int32), jnp.zeros((9, 2), jnp.int32)
    gate, up, down = (jnp.ones(shape) for shape in ((2, 128, 256), (2, 128, 256), (2, 256, 128)))
    blocks = [jnp.asarray(array) for array in natural_weights()]
    return {
        "x": (lambda: mm.moe(to_host(layer.x), *layer[1:4]), "x"),
        "weights": (lambda: mm.moe(layer.x, weights, *layer[2:4]), "weights.gate_up"),
        "reference": (lambda: mm.reference.moe(layer.x, weights, *layer[2:4]), "weights.gate_up"),
        "traced": (lambda: jax.jit(mm.moe)(layer.x, weights, *layer[2:4]), "weights.gate_up"),
        "unpack": (weights.unpack, "weights.gate_up"),
        "stack": (lambda: mm.stack_experts([packed_weights(), weights]), r"weights\[1\].gate_up"),
        "fill": (lambda: mm.stack_experts(iter([packed_weights(), weights]), num_layers=2), r"weights\[1\].gate_up"),
        "gate": (lambda: mm.quantize_experts(to_host(gate), up, down), "gate"),
        "down": (lambda: mm.quantize_experts(gate, up, to_host(down)), "down"),
        "scale": (lambda: mm.pack_experts(blocks[0], to_host(blocks[1]), *blocks[2:]), "gate_up_scale"),
        "logits": (lambda: mm.route(to_host(logits), 2), "logits"),
        "bias": (lambda: mm.route(logits, 2, bias=to_host(bias)), "bias"),
        "table": (lambda: mm.route(logits, 2, token_ids=ids, hash_table=to_host(table)), "hash_table"),
    }


@pytest.mark.parametrize("call", sorted(calls()))
def test_what_computes_names_the_argument(call):
    function, name = calls()[call]
    with pytest.raises(ShardingError, match=rf"^{name} is in host memory, wanted device memory: .*jax\.device_put\("):
        function()


def deleted(value: Any) -> Any:
    """A copy of arrays that a program has overwritten."""
    copy = jax.tree.map(jnp.copy, value)
    for leaf in jax.tree.leaves(copy):
        leaf.delete()
    return copy


def test_what_is_deleted_is_named():
    layer, weights = make_layer(), deleted(packed_weights())
    for name, call in {
        "x": lambda: mm.moe(deleted(layer.x), *layer[1:4]),
        "topk_ids": lambda: mm.moe(*layer[:2], deleted(jnp.asarray(layer[2])), layer[3]),
        "weights.gate_up": lambda: mm.moe(layer.x, weights, *layer[2:4]),
        "logits": lambda: mm.route(deleted(jnp.ones((4, 8))), 2),
    }.items():
        with pytest.raises(ArgumentError, match=f"^{name} is deleted, as donated arrays are, wanted one that lives"):
            call()


def test_what_only_reads_serves():
    weights, on_host = packed_weights(), to_host(packed_weights())
    assert (on_host.nbytes, repr(on_host)) == (weights.nbytes, repr(weights))
    restored = mm.ExpertWeights.from_arrays(on_host.to_arrays())
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(weights), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))
    back = jax.device_put(on_host, jax.memory.Space.Device)
    layer = make_layer()
    np.testing.assert_array_equal(mm.moe(layer.x, back, *layer[2:4]), mm.moe(*layer[:4]))
