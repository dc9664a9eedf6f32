"""Where `route` is the kernel, and where array code: what is lowered for CUDA, without a GPU."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from tests.support.cuda_lowering import attribute, calls, cuda_text
from tests.support.meshes import AUTO, EXPLICIT, make_mesh, place

KERNEL = ["jax_megamoe.route.v1"]
LOGITS = jnp.zeros((8, 64))


def text_of(logits: Any = LOGITS, top_k: int = 4, **options: Any) -> str:
    return cuda_text(lambda x: mm.route(x, top_k, **options), logits)


def test_one_device_has_the_kernel(built):
    text = text_of(scoring="sigmoid", bias=jnp.zeros(64), num_groups=8, top_groups=4)
    assert calls(text) == KERNEL
    found = {name: int(attribute(text, name)) for name in ("scoring", "num_groups", "top_groups", "sums_two")}
    assert found == {"scoring": 1, "num_groups": 8, "top_groups": 4, "sums_two": 1}
    assert calls(cuda_text(jax.vmap(lambda x: mm.route(x, 4)), jnp.zeros((3, 8, 64)))) == KERNEL


def test_what_the_kernel_does_not_serve_is_array_code(built):
    tokens, table = jnp.zeros(8, jnp.int32), jnp.zeros((10, 4), jnp.int32)
    assert calls(text_of(jnp.zeros((8, 1025)))) == []
    assert calls(text_of(top_k=33)) == []
    assert calls(text_of(token_ids=tokens, hash_table=table)) == []
    assert calls(text_of(image_bias=jnp.zeros(64), is_image=tokens > 0)) == []


def test_no_build_is_array_code():
    assert jax.default_backend() == "cpu"
    ids, _ = jax.jit(lambda x: mm.route(x, 4))(LOGITS)
    np.testing.assert_array_equal(ids, np.tile(np.arange(4), (8, 1)))


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("in_context", [True, False], ids=["set_mesh", "arguments"])
def test_a_program_of_several_devices_is_array_code_which_xla_splits(built, kind, in_context):
    mesh = make_mesh({"data": 8}, kind)
    logits = place(mesh, LOGITS, "data")
    if in_context:
        with jax.set_mesh(mesh):
            assert calls(text_of(logits)) == []
    else:
        assert calls(text_of(logits)) == []


@pytest.mark.parametrize("check_vma", [True, False], ids=["marks", "no marks"])
def test_shard_map_has_the_kernel(built, check_vma):
    mesh = make_mesh({"data": 8}, AUTO)
    mapped = jax.shard_map(
        lambda x, bias: mm.route(x, 4, bias=bias),
        mesh=mesh,
        in_specs=(P("data"), P()),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    assert calls(cuda_text(mapped, LOGITS, jnp.zeros(64))) == KERNEL
    ids, weights = jax.jit(mapped)(LOGITS, jnp.arange(64.0))
    np.testing.assert_array_equal(ids, np.tile([63, 62, 61, 60], (8, 1)))
    np.testing.assert_allclose(weights, 0.25)


def test_axes_that_are_not_manual_are_left_to_array_code(built):
    mesh = make_mesh({"data": 4, "model": 2}, AUTO)
    partly = jax.shard_map(
        lambda x: mm.route(x, 4), mesh=mesh, in_specs=P("data"), out_specs=P("data"), axis_names={"data"}
    )
    assert calls(cuda_text(partly, LOGITS)) == []


def test_derivatives_are_there():
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(mm.route(x, 4)[1][:, 0])))(jnp.arange(128.0).reshape(2, 64) / 50)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0
    tangent = jax.jvp(lambda x: mm.route(x, 4)[1], (LOGITS,), (jnp.ones_like(LOGITS),))[1]
    np.testing.assert_allclose(tangent, 0, atol=1e-7)
