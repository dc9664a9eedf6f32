"""What XLA for GPUs makes of the decoders of `examples`: what it exchanges and copies. Needs its plugin, but no GPU."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from examples import deepseek_v4
from examples.batching import greedy_step
from examples.expectations import tiny
from examples.meshes import DATA, EXPERT_AXIS, TENSOR
from jax_megamoe.primitives import _library
from tests.support.decoders import FAMILIES, Decoder
from tests.support.skips import gpu_tests, why_no_cuda_plugin, why_no_kernel

pytestmark = gpu_tests(why_no_cuda_plugin() or why_no_kernel())

NUM_SLOTS, LENGTH = 32, 512


@pytest.fixture(scope="module", params=FAMILIES)
def decoder(request, tmp_path_factory) -> Decoder:
    folder = tmp_path_factory.mktemp(request.param) / "checkpoint"
    tiny.write(request.param, folder)
    return Decoder.load(request.param, folder)


def compiled_text(decoder: Decoder, data: int, tensor: int) -> str:
    """The step's program for so many H100, with arrays placed as `load` places them."""
    config = (Path(__file__).parent / "h100.txtpb").read_text()
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=config, topology=f"1x1x{data * tensor}"
    )
    devices: Any = np.array(topology.devices).reshape(data, tensor)
    mesh = Mesh(devices, (DATA, TENSOR), axis_types=(AxisType.Auto,) * 2)
    splits = decoder.module.SPLITS

    def described(leaf: Any, *spec: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, P(*spec)))

    def parameter(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        is_whole = any(getattr(key, "name", None) in ("shared", "indexer") for key in path)
        return described(leaf, *(() if is_whole else splits.get(path[-1].name, ())))

    lead = () if decoder.config.is_unrolled else (None,)
    cache = jax.eval_shape(lambda: decoder.module.empty_cache(decoder.config, NUM_SLOTS, LENGTH, jnp.bfloat16))
    numbers = described(jax.ShapeDtypeStruct((NUM_SLOTS,), jnp.int32))
    with jax.set_mesh(mesh):
        lowered = greedy_step.lower(
            decoder.decode,
            jax.tree_util.tree_map_with_path(parameter, decoder.parameters),
            jax.tree.map(lambda leaf: described(leaf, None, EXPERT_AXIS), decoder.experts),
            jax.tree.map(lambda leaf: described(leaf, *lead, *splits["cache"]), cache),
            numbers,
            numbers,
        )
    return str(lowered.compile().as_text())


@pytest.fixture(scope="module")
def unrolled_text(decoder: Decoder) -> str:
    """The program of one GPU, without a scan."""
    return compiled_text(decoder.unrolled(), 1, 1)


def computation_of_call(text: str, target: str) -> list[str]:
    """The lines of the computation in which the custom call is, which has to be one."""
    computations = re.split(r"\n(?=(?:ENTRY )?%?[\w.\-]+ \(.*\{\n)", text)
    found = [lines for lines in computations if f'custom_call_target="{target}"' in lines]
    assert len(found) == 1
    return found[0].splitlines()


def test_a_layer_exchanges_what_attention_adds_and_the_result_of_moe(decoder):
    body = computation_of_call(compiled_text(decoder, 2, 4), _library.MOE_PEERS_TARGET)
    matches = [re.search(r" (all-\w+|reduce-scatter|collective-\w+)(-start)?\(", line) for line in body]
    found = sorted(match[1] for match in matches if match)
    if decoder.module is not deepseek_v4:
        assert found == ["all-gather", "all-reduce"]
        return
    # All layers, each of another kind, and which of the logits, which are split, is the largest.
    num_layers = decoder.config.num_layers
    assert found == ["all-gather"] * (num_layers + 1) + ["all-reduce"] * num_layers


def test_unrolled_layers_copy_neither_weights_nor_cache(decoder, unrolled_text):
    entry = computation_of_call(unrolled_text, _library.MOE_TARGET)
    results = [(line.split(" = ")[0].split("%")[-1].strip(), line.split(" = ")[1]) for line in entry if " = " in line]
    assert any("gemm" in name or "dot" in name or "cublas" in name for name, _ in results)
    # What is selected is computed, too: the windows of DeepSeek-V4's entries.
    sliced = [text for name, text in results if "slice" in name and "select" not in name]
    moved = sliced + [text for name, text in results if name.startswith("copy")]
    # But for a layer's bias of the router, 4 bytes an expert, whose kernel wants it by itself, and for the counters of
    # loops.
    small = re.compile(rf"f32\[(1,)?{decoder.experts.num_experts}\]|s32\[\]")
    assert not [text for text in moved if not small.match(text)]


def test_streams_are_mixed_in_few_rounds_of_a_loop(decoder, unrolled_text):
    if decoder.module is not deepseek_v4:
        pytest.skip("only DeepSeek-V4 has several streams")
    rounds = [int(count) for count in re.findall(r'"known_trip_count":\{"n":"(\d+)"', unrolled_text)]
    # Two of each layer, and nothing else of the step is a loop: what launches kernels one by one from the host.
    assert len(rounds) == unrolled_text.count(" while(") == 2 * decoder.config.num_layers
    assert max(rounds) <= 6 < decoder.config.sinkhorn_steps
