"""One process of several with a device each: `python -m tests.gpu.process_worker FOLDER`, as processes.py starts it.

Runs the layer over all devices and saves this process's part of the result and of the load; tests/gpu/test_expert_parallel.py
compares them with one device. `JAX_PLATFORMS=cpu` tries the script itself without a GPU. With a second argument, each
process has an IPC namespace of its own, as containers have, and collectives take the kernel's place.
"""

import os
import sys
from pathlib import Path

import jax
import numpy as np

from tests.support.hlo import is_fused
from tests.support.layer_with_options import make_problem, moe
from tests.support.meshes import mesh_of, place_all
from tests.support.processes import join, leave

TOKENS = (1, 40)  # of each process


OWN_IPC = "own-ipc"


def main(folder: Path, kind: str = "") -> None:
    """Two programs of different sizes, several times in turn."""
    if kind == OWN_IPC:
        os.unshare(os.CLONE_NEWIPC)
    place = join()
    mesh = mesh_of(jax.devices(), {"expert": place.processes})
    arguments = [place_all(mesh, make_problem(tokens * place.processes, "masked")) for tokens in TOKENS]
    fused = [is_fused(moe.lower(*a).compile()) for a in arguments]
    assert fused == [jax.default_backend() != "cpu" and kind != OWN_IPC] * len(TOKENS)
    for turn in range(20):
        for tokens, a in zip(TOKENS, arguments, strict=True):
            y, load = (np.asarray(value.addressable_shards[0].data) for value in moe(*a))
            # bfloat16 has no place in a .npy file.
            np.save(folder / f"{tokens}.{turn}.{place.process}.y.npy", y.view(np.uint16))
            np.save(folder / f"{tokens}.{turn}.{place.process}.load.npy", load)
    leave(place)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
