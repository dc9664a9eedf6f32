"""The replica groups of the expert axis against those that JAX writes for its own collectives over the same axes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_megamoe.primitives._groups import group_attributes, replica_groups
from tests.support.skips import unless, why_no_host_devices

pytestmark = unless(why_no_host_devices())

CASES: list[tuple[dict[str, int], str | tuple[str, ...]]] = [
    ({"expert": 8}, "expert"),
    ({"data": 2, "expert": 4}, "expert"),
    ({"expert": 4, "model": 2}, "expert"),
    ({"data": 2, "expert": 2, "model": 2}, "expert"),
    ({"a": 2, "b": 2, "c": 2}, ("c", "a")),
    ({"a": 2, "b": 2, "c": 2}, ("a", "b")),
    ({"a": 2, "b": 4}, ("b", "a")),
    ({"data": 8}, ()),
]
ORDERS = {"in order": np.arange(8), "reversed": np.arange(8)[::-1], "shuffled": np.random.default_rng(3).permutation(8)}


def as_tuple(axes: str | tuple[str, ...]) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes


@pytest.fixture
def dense_groups():
    """Has JAX write ids into its programs and not names of mesh axes, which say nothing about positions."""
    before = getattr(jax.config, "jax_use_rgv3", None)
    if before is None:
        yield
        return
    jax.config.update("jax_use_rgv3", False)
    yield
    jax.config.update("jax_use_rgv3", before)


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize(("sizes", "axes"), [case for case in CASES if case[1]], ids=str)
def test_groups_are_those_of_a_psum(sizes, axes, order, dense_groups):
    mesh = Mesh(np.array(jax.devices("cpu")[:8])[order].reshape(tuple(sizes.values())), tuple(sizes))
    spec = P(tuple(sizes))
    f = jax.shard_map(lambda x: jax.lax.psum(x, axes), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    text = jax.jit(f).lower(jnp.zeros(8)).as_text()
    (dense,) = re.findall(r"replica_groups = dense<(.*?)> : tensor<(\d+)x(\d+)xi64>", text)
    found = np.array([int(n) for n in re.findall(r"\d+", dense[0])]).reshape(int(dense[1]), int(dense[2]))
    # The order within a group is that of the ranks; that of the groups has no meaning.
    assert sorted(found.tolist()) == sorted(replica_groups(sizes, as_tuple(axes)).tolist())


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize(("sizes", "axes"), [case for case in CASES if case[1]], ids=str)
def test_ranks_count_as_axis_index_does(sizes, axes, order):
    """What each device reports: its place in the assignment and its rank, and with them where it stands in the groups."""
    mesh = Mesh(np.array(jax.devices("cpu")[:8])[order].reshape(tuple(sizes.values())), tuple(sizes))
    names = tuple(sizes)
    report = jax.jit(
        jax.shard_map(
            lambda: jnp.stack([jax.lax.axis_index(names), jax.lax.axis_index(axes)])[None],
            mesh=mesh,
            in_specs=(),
            out_specs=P(names),
        )
    )()
    positions = {device: place for place, device in enumerate(mesh.devices.flat)}
    groups = replica_groups(sizes, as_tuple(axes))
    for shard in report.addressable_shards:
        ((place, rank),) = np.asarray(shard.data)
        assert positions[shard.device] == place
        assert (groups[:, rank] == place).sum() == 1


def test_groups_partition_the_devices():
    for sizes, axes in CASES:
        groups = replica_groups(sizes, as_tuple(axes))
        assert sorted(groups.ravel()) == list(range(8))
        assert groups.shape[1] == np.prod([sizes[axis] for axis in as_tuple(axes)], dtype=int)


def test_examples():
    np.testing.assert_array_equal(replica_groups({"data": 2, "expert": 4}, ("expert",)), [[0, 1, 2, 3], [4, 5, 6, 7]])
    np.testing.assert_array_equal(replica_groups({"expert": 2, "model": 2}, ("expert",)), [[0, 2], [1, 3]])
    np.testing.assert_array_equal(replica_groups({"a": 2, "b": 2}, ("b", "a")), [[0, 2, 1, 3]])
    np.testing.assert_array_equal(replica_groups({}, ()), [[0]])


def test_attributes():
    attributes = group_attributes({"expert": 2, "model": 2}, ("expert",))
    assert attributes["group_size"] == 2
    flat = np.asarray(attributes["replica_groups"])
    assert flat.dtype == np.int64 and flat.tolist() == [0, 2, 1, 3]
