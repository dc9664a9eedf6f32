"""`route` as one kernel: what is lowered for CUDA, without a GPU; where it is array code or, asked for, an error."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from jax_megamoe.errors import ArgumentError, MegaMoEError, PlatformError, ShapeError, ShardingError
from jax_megamoe.primitives import _library
from tests.support.cuda_lowering import attribute, calls, cuda_text
from tests.support.meshes import AUTO, EXPLICIT, make_mesh, place

KERNEL = ["jax_megamoe.route.v1"]
LOGITS = jnp.zeros((8, 64))


def text_of(logits: Any = LOGITS, top_k: int = 4, **options: Any) -> str:
    return cuda_text(lambda x: mm.route(x, top_k, **{"implementation": "cuda", **options}), logits)


def test_one_device_has_the_kernel(built):
    text = text_of(scoring="sigmoid", bias=jnp.zeros(64), num_groups=8, top_groups=4)
    assert calls(text) == KERNEL
    found = {name: int(attribute(text, name)) for name in ("scoring", "num_groups", "top_groups", "sums_two")}
    assert found == {"scoring": 1, "num_groups": 8, "top_groups": 4, "sums_two": 1}
    mapped = jax.vmap(lambda x: mm.route(x, 4, implementation="cuda"))
    assert calls(cuda_text(mapped, jnp.zeros((3, 8, 64)))) == KERNEL


TOKENS, TABLE = jnp.zeros(8, jnp.int32), jnp.zeros((10, 4), jnp.int32)


@pytest.mark.parametrize("logits", [LOGITS, jnp.zeros((512, 64)), jnp.zeros((4, 128, 64), jnp.bfloat16)])
def test_the_kernel_is_the_default(built, logits):
    assert calls(text_of(logits, implementation=None, scoring="sigmoid", bias=jnp.ones(64))) == KERNEL
    assert calls(text_of(logits, implementation="reference")) == []


def test_where_it_does_not_serve_the_default_is_array_code(built):
    def default(**arguments: Any) -> list[str]:
        return calls(text_of(**{"implementation": None, **arguments}))

    assert default(logits=jnp.zeros((513, 64))) == []
    assert default(logits=jnp.zeros((8, 1025))) == []
    assert default(top_k=33) == []
    assert default(token_ids=TOKENS, hash_table=TABLE) == []
    assert default(image_bias=jnp.zeros(64), is_image=TOKENS > 0) == []
    over_biases = jax.vmap(lambda bias: mm.route(LOGITS, 4, bias=bias))
    assert calls(cuda_text(over_biases, jnp.zeros((3, 64)))) == []
    for kind in (AUTO, EXPLICIT):
        assert default(logits=place(make_mesh({"data": 8}, kind), LOGITS, "data")) == []
    exported = jax.export.export(jax.jit(lambda x: mm.route(x, 4)), platforms=["cuda"])(LOGITS)
    assert calls(exported.mlir_module()) == []


def test_without_the_kernels_the_default_is_array_code(monkeypatch):
    monkeypatch.setattr(_library, "_core", None)
    assert calls(text_of(implementation=None)) == []


def test_on_a_cpu_the_default_is_array_code():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 64)), jnp.float32)
    bias = jnp.asarray(np.random.default_rng(1).normal(size=(3, 64)), jnp.float32)
    found = jax.vmap(lambda x, b: mm.route(x, 4, bias=b))(logits, bias)
    wanted = jax.vmap(lambda x, b: mm.route(x, 4, bias=b, implementation="reference"))(logits, bias)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": jnp.zeros((8, 1025))}, ShapeError, "and implementation is 'cuda', wanted .* at most 1024 experts"),
        ({"top_k": 33}, ShapeError, "top_k is 33 and implementation is 'cuda', wanted at most 32"),
        ({"token_ids": TOKENS, "hash_table": TABLE}, ArgumentError, "token_ids is given and implementation is 'cuda'"),
        ({"image_bias": jnp.zeros(64), "is_image": TOKENS > 0}, ArgumentError, "image_bias is given and"),
        ({"implementation": "cpu"}, ArgumentError, "implementation is 'cpu', wanted one of cuda, reference"),
    ],
)
def test_what_the_kernel_does_not_serve_is_an_error(built, arguments, error, message):
    with pytest.raises(error, match=message):
        text_of(**arguments)


def test_a_bias_that_is_mapped_is_an_error(built):
    with pytest.raises(NotImplementedError, match="bias is mapped by jax.vmap"):
        mapped = jax.vmap(lambda bias: mm.route(LOGITS, 4, bias=bias, implementation="cuda"))
        cuda_text(mapped, jnp.zeros((3, 64)))


def test_a_cpu_is_an_error():
    with pytest.raises(PlatformError, match="implementation of route is 'cuda' on cpu, wanted a Hopper GPU"):
        jax.jit(lambda x: mm.route(x, 4, implementation="cuda"))(LOGITS)


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("in_context", [True, False], ids=["set_mesh", "arguments"])
def test_a_program_that_xla_would_have_to_split_is_an_error(built, kind, in_context):
    mesh = make_mesh({"data": 8}, kind)
    logits = place(mesh, LOGITS, "data")
    with pytest.raises(ShardingError, match="implementation of route is 'cuda'"):
        if in_context:
            with jax.set_mesh(mesh):
                text_of(logits)
        else:
            text_of(logits)


@pytest.mark.parametrize("check_vma", [True, False], ids=["marks", "no marks"])
def test_shard_map_has_the_kernel(built, check_vma):
    mesh = make_mesh({"data": 8}, AUTO)
    mapped = jax.shard_map(
        lambda x, bias: mm.route(x, 4, bias=bias, implementation="cuda"),
        mesh=mesh,
        in_specs=(P("data"), P()),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    assert calls(cuda_text(mapped, LOGITS, jnp.zeros(64))) == KERNEL


def test_axes_that_are_not_manual_are_an_error(built):
    mesh = make_mesh({"data": 4, "model": 2}, AUTO)
    partly = jax.shard_map(
        lambda x: mm.route(x, 4, implementation="cuda"),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
        axis_names={"data"},
    )
    with pytest.raises(MegaMoEError, match="wanted all of its axes manual"):
        cuda_text(partly, LOGITS)


def test_derivatives_are_those_of_array_code():
    logits = jnp.arange(128.0).reshape(2, 64) / 50

    def tangent(implementation: Any) -> Any:
        # Forwards: what depends on no result of the kernel is computed without it.
        run = lambda x: mm.route(x, 4, implementation=implementation)[1]  # noqa: E731
        return jax.jvp(run, (logits,), (jnp.ones_like(logits).at[0].set(jnp.arange(64.0)),))[1]

    np.testing.assert_allclose(tangent("cuda"), tangent(None), rtol=1e-6)
