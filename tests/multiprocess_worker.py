"""One process of several that run the layer together: `python -m tests.multiprocess_worker PROCESSES PROCESS PORT FOLDER`.

The processes share four CPU devices. Each saves what it has of every result, and the demo's texts; tests/test_multiprocess.py
puts it together.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType

NUM_DEVICES = 4


class Case(NamedTuple):
    """A mesh over all devices and how the tokens are split on it."""

    sizes: dict[str, int]
    kind: AxisType = AxisType.Auto
    tokens: tuple[str, ...] = ("data", "expert")
    reverse: bool = False


CASES = {
    "expert": Case({"expert": 4}),
    "reversed": Case({"data": 2, "expert": 2}, AxisType.Explicit, reverse=True),
    "replicated": Case({"data": 2, "expert": 2}, tokens=("data",)),
}


def run_case(case: Case, devices: list[Any]) -> tuple[jax.Array, jax.Array]:
    """The small expert layer and its load on the mesh of the case."""
    import jax_megamoe as mm
    from tests.support.expert_layer import make_layer
    from tests.support.meshes import mesh_of, place_all

    mesh = mesh_of(devices, case.sizes, case.kind, case.reverse)
    layer = make_layer()

    def layer_and_load(*arguments: Any) -> Any:
        return mm.moe(*arguments, token_axes=tokens, implementation="collective", return_expert_load=True)

    tokens = tuple(axis for axis in case.tokens if axis in case.sizes)
    y, load = jax.jit(layer_and_load)(*place_all(mesh, layer, tokens))
    return y, load


def run_demo(devices: list[Any]) -> list[str]:
    """Texts that the demo's loop decodes on a mesh of the devices, greedily; fewer of them than devices."""
    from jax_megamoe.demo import decode, mesh, model

    config = model.ModelConfig(hidden_size=128, num_layers=2, num_heads=4, num_experts=4, context=16)
    # The first process knows the model. The unembedding starts at zero, which would make all logits equal.
    untrained = model.initialize(config, jax.random.key(jax.process_index()))
    noise = jax.random.normal(jax.random.key(1), untrained.unembedding.shape)
    parameters = mesh.of_first_process(untrained._replace(unembedding=noise / 8))
    experts = model.quantize(parameters.experts)
    demo_mesh = mesh.make_mesh(config, len(devices), devices)
    prompts = ["of a", "the st", "x = "]
    return decode.generate(config, parameters, experts, prompts, 12, temperature=0.0, mesh=demo_mesh).texts


def check_sharing_of_facts(processes: int, process: int) -> None:
    """What the choice of the implementation rests on: all processes learn the same about each other."""
    from jax_megamoe import _compat

    for round_ in range(2):  # the second one overwrites
        found = _compat.share_between_processes("test", f"fact {process}", range(processes), 40)
        assert found == [f"fact {p}" for p in range(processes)], (round_, found)


def main(processes: int, process: int, port: int, folder: Path) -> None:
    """Runs all cases and saves this process's shards."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", processes, process, initialization_timeout=40)
    assert jax.process_count() == processes and jax.device_count() == NUM_DEVICES
    check_sharing_of_facts(processes, process)
    (folder / f"demo.{process}.json").write_text(json.dumps(run_demo(jax.devices())))
    for name, case in CASES.items():
        for what, array in zip(("y", "load"), run_case(case, jax.devices()), strict=True):
            for shard in array.addressable_shards:
                (first, *_) = shard.index
                data = np.asarray(shard.data)
                # bfloat16 has no place in a .npy file.
                bits = data.view(np.uint16) if what == "y" else data
                np.save(folder / f"{name}.{what}.{first.start or 0}.{process}.{shard.device.id}.npy", bits)


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
