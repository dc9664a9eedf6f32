"""One of two processes that load a checkpoint: `tests/test_checkpoint_loading.py` starts it."""

import sys

import jax
import numpy as np
from jax.sharding import Mesh

from tests.support import processes


def main(folder: str) -> None:
    place = processes.join()
    import jax_megamoe as mm

    own = {number: [d for d in jax.devices() if d.process_index == number][:4] for number in range(2)}
    mesh = Mesh(np.array(own[0] + own[1]), ("expert",))
    calls: list[tuple[int, int]] = []
    weights = mm.load_experts(folder, mesh=mesh, progress=lambda *call: calls.append(call))
    whole = mm.load_experts(folder)
    shards = sorted(weights.leaves.down.addressable_shards, key=lambda shard: shard.index[1].start)
    experts = [shard.index[1].start for shard in shards]
    same = all(
        np.array_equal(np.asarray(shard.data).view(np.uint8), np.asarray(other)[shard.index].view(np.uint8))
        for leaf, other in zip(weights.leaves, whole.leaves, strict=True)
        for shard in leaf.addressable_shards
    )
    processes.say(experts=experts, read=calls[-1][0], total=calls[-1][1], same=same)
    processes.leave(place)


if __name__ == "__main__":
    main(sys.argv[1])
