"""Generated placements of calls of `moe` on meshes: refused in a sentence while tracing, or results of right types."""

import contextlib
from typing import Any, get_args

import jax
import jax.numpy as jnp
import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from jax_megamoe.weight_layout import Format
from tests.support.hostile import cases, make_weights, outcome
from tests.support.meshes import AUTO, EXPLICIT, make_mesh
from tests.support.skips import unless, why_no_host_devices

pytestmark = unless(why_no_host_devices())

T, K, E, H, I = 16, 8, 8, 256, 128
MESHES = [{"expert": 8}, {"data": 2, "expert": 4}, {"data": 8}, {"expert": 4, "model": 2}, {"a": 2, "b": 2, "c": 2}]
NAMES: list[Any] = ["expert", "data", ("expert",), ("data", "expert"), (), None, "model", ("a", "c"), "nowhere", 0]
NAMES += [("expert", "expert"), ("expert", 1), ["expert"]]


@st.composite
def specs(draw: st.DrawFn, mesh: Any, shape: tuple[int, ...]) -> P:
    """Any that the sizes allow, with each axis at most once."""
    entries: list[Any] = [None] * len(shape)
    for axis in draw(st.lists(st.sampled_from(list(mesh.shape)), unique=True, max_size=2)):
        place = draw(st.integers(0, len(shape) - 1) | st.just(0))
        if entries[place] is None and shape[place] % mesh.shape[axis] == 0:
            entries[place] = axis
    return P(*entries)


@pytest.mark.parametrize("moe", [mm.moe, mm.reference.moe], ids=["moe", "reference"])
@cases(120)
@given(data=st.data())
def test_placements(moe, data):
    draw = data.draw
    way = draw(st.sampled_from(["automatic", "explicit", "context", "shard_map"]))
    mesh = make_mesh(draw(st.sampled_from(MESHES)), AUTO if way in ("automatic", "shard_map") else EXPLICIT)
    held, said = draw(st.sampled_from([(E, E), (E, E), (E, E), (E, 2 * E), (E // 2, E), (12, 12)]))
    format: Format = draw(st.sampled_from(get_args(Format)))
    weights = make_weights(format, (held,), said, H, I)
    leaves = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(weights)]
    tokens = [((T, H), jnp.bfloat16), ((T, K), jnp.int32), ((T, K), jnp.float32)]
    arrays = [jax.ShapeDtypeStruct(*array) for array in tokens] + leaves
    # Most are split alike, as they should be.
    of_tokens, of_experts = draw(specs(mesh, (T, 1))), draw(specs(mesh, (held, 1)))
    is_odd = draw(st.integers(0, 2)) == 0
    chosen = [
        draw(specs(mesh, array.shape)) if is_odd else of_tokens if number < 3 else of_experts
        for number, array in enumerate(arrays)
    ]
    options: dict[str, Any] = {"return_expert_load": True}
    for name in draw(st.lists(st.sampled_from(["expert_axis", "token_axes"]), unique=True)):
        options[name] = draw(st.sampled_from(NAMES))
    if draw(st.integers(0, 3)) == 0:
        options["num_valid_tokens"] = draw(st.integers(0, T))

    def call(x: Any, ids: Any, topk_weights: Any, *leaves: Any) -> Any:
        held_weights = jax.tree.unflatten(jax.tree.structure(weights), leaves)
        return moe(x, held_weights, ids, topk_weights, **options)

    function, check_vma = call, draw(st.booleans())
    if way == "shard_map":
        # The types alone: what is the same on all devices, and what not, is no question of the result's.
        out_specs = (chosen[0], P())
        function = jax.shard_map(call, mesh=mesh, in_specs=tuple(chosen), out_specs=out_specs, check_vma=False)
        if check_vma:
            function = jax.shard_map(
                lambda *operands: (call(*operands)[0], jnp.zeros(1)),
                mesh=mesh,
                in_specs=tuple(chosen),
                out_specs=out_specs,
            )
    else:
        arrays = [
            jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec))
            for array, spec in zip(arrays, chosen, strict=True)
        ]
    with jax.set_mesh(mesh) if way == "context" else contextlib.nullcontext():
        found = outcome(lambda: jax.eval_shape(function, *arrays))
    event("refused" if found is None else "taken")
    if found is not None:
        assert (found[0].shape, found[0].dtype) == ((T, H), jnp.bfloat16)
        for name in ("expert_axis", "token_axes"):
            names = options.get(name)
            given_names = (names,) if isinstance(names, str) else names or ()
            assert all(isinstance(axis, str) and axis in mesh.shape for axis in given_names)
            assert len(set(given_names)) == len(given_names)
