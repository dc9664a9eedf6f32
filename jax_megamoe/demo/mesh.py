"""Where things are when the model decodes on several devices: one mesh axis splits attention's heads and the experts.

Tensor parallel attention: a device has the projections and the cache of its heads, and what the devices have for the
residual stream is summed. Expert parallel `moe`: a device has its experts and takes its share of the tokens.
The rest, routers included, is small and on every device.
"""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_megamoe.demo.model import Experts, ModelConfig, Parameters
from jax_megamoe.errors import ShardingError

AXIS = "expert"  # the name by which `moe` knows it


def make_mesh(config: ModelConfig, num_devices: int, devices: list[Any] | None = None) -> Mesh:
    """A mesh of the first of the devices (default: those of all processes).

    Raises `ShardingError` where there are too few, where the model can't be split so, and where several processes leave
    out some of their devices.
    """
    devices = jax.devices() if devices is None else devices
    if num_devices > len(devices) or (num_devices < len(devices) and jax.process_count() > 1):
        raise ShardingError(
            f"{num_devices} devices were asked for and {jax.process_count()} processes have {len(devices)}: "
            "ask for as many as there are."
        )
    if config.num_heads % num_devices or config.num_experts % num_devices:
        raise ShardingError(
            f"the model has {config.num_heads} heads and {config.num_experts} experts, wanted multiples of the "
            f"{num_devices} devices: choose another number of them."
        )
    return jax.make_mesh((num_devices,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices[:num_devices])


def place(mesh: Mesh, parameters: Parameters, experts: Experts) -> tuple[Parameters, Experts]:
    """Both on the mesh, each device with what is its own. All processes of the mesh pass the same values."""

    def put[Tree](tree: Tree, *spec: str | None) -> Tree:
        sharding = NamedSharding(mesh, P(*spec))

        def put_leaf(leaf: jax.Array) -> jax.Array:
            value = np.asarray(leaf)
            return jax.make_array_from_callback(value.shape, sharding, lambda part: value[part])

        return jax.tree.map(put_leaf, tree)

    blocks = put(parameters.blocks)._replace(
        qkv=put(parameters.blocks.qkv, None, None, None, AXIS),
        attention_out=put(parameters.blocks.attention_out, None, AXIS),
    )
    float_experts = put(parameters.experts, None, AXIS)
    placed = Parameters(
        put(parameters.embedding), blocks, float_experts, put(parameters.final_norm), put(parameters.unembedding)
    )
    return placed, float_experts if experts is parameters.experts else put(experts, None, AXIS)


def of_first_process[Tree](tree: Tree) -> Tree:
    """What the first process has passed, on all of them; the others pass trees of the same shapes."""
    return multihost_utils.broadcast_one_to_all(tree) if jax.process_count() > 1 else tree
