"""One process of several with a device each: `python process_worker.py PROCESSES PROCESS PORT FOLDER`.

Runs the layer over all devices and saves this process's part of the result and of the load; tests/gpu/test_expert_parallel.py
compares them with one device. `JAX_PLATFORMS=cpu` tries the script itself without a GPU.
"""

import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

TOKENS = (1, 40)  # of each process


def main(processes: int, process: int, port: int, folder: Path) -> None:
    """Two programs of different sizes, several times in turn."""
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu"
    if on_cpu:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    local = None if on_cpu else [process]
    jax.distributed.initialize(f"localhost:{port}", processes, process, local_device_ids=local)
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from gpu.test_expert_parallel import is_fused, make_problem, moe

    mesh = jax.make_mesh((processes,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, P("expert"))

    def place(leaf: Any) -> Any:
        return jax.make_array_from_callback(leaf.shape, sharding, lambda part: np.asarray(leaf)[part])

    arguments = [jax.tree.map(place, make_problem(tokens * processes, "masked")) for tokens in TOKENS]
    assert on_cpu or all(is_fused(moe, *a) for a in arguments)
    for turn in range(20):
        for tokens, a in zip(TOKENS, arguments, strict=True):
            y, load = (np.asarray(value.addressable_shards[0].data) for value in moe(*a))
            # bfloat16 has no place in a .npy file.
            np.save(folder / f"{tokens}.{turn}.{process}.y.npy", y.view(np.uint16))
            np.save(folder / f"{tokens}.{turn}.{process}.load.npy", load)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
