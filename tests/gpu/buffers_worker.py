"""A server's buckets, one program for each size of batch: `python -m tests.gpu.buffers_worker ascending|descending`.

Says what the group's memory is, and what the GPUs have in use, after each bucket's first run, and whether the results of
all buckets are right then and after the last bucket.
"""

import os
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from jax_megamoe import expert_parallel
from jax_megamoe.primitives import _library
from tests.support import chain as chains
from tests.support.compare import bits, judge
from tests.support.gpu_memory import used_mib
from tests.support.hlo import is_fused
from tests.support.meshes import mesh_of
from tests.support.meshes import place as place_on
from tests.support.problems import Problem, Sizes, make_weights
from tests.support.processes import join, leave, meet, say

BUCKETS = tuple(range(512, 8193, 512))  # tokens of each rank
SCALE = int(os.environ.get("MEGAMOE_BUCKET_SCALE", "1"))  # divides tokens and sizes, to try the worker without GPUs
SIZES = Sizes(hidden=4096 // SCALE, inter=512, num_experts=8, top_k=6)  # of each rank


def state() -> dict[str, Any]:
    memories = _library.symmetric_memories()
    return {"devices": [m["device"] for m in memories], "bytes": [m["bytes"] for m in memories], "used": used_mib()}


class Bucket:
    """A captured program for so many tokens on each rank."""

    def __init__(self, ranks: int, tokens: int, x: np.ndarray, weights: mm.ExpertWeights) -> None:
        self.tokens, random = tokens, np.random.default_rng(tokens)
        ids = random.integers(0, SIZES.num_experts * ranks, (tokens * ranks, SIZES.top_k)).astype(np.int32)
        self.problem = Problem(x[: len(ids)], weights, ids, random.random(ids.shape, np.float32))

    def lower(self, mesh: Any, placed_weights: Any) -> list[Any]:
        """The program over the mesh, and the one of one device."""
        x, ids, topk_weights = (place_on(mesh, v, "expert") for v in (self.problem.x, *self.problem[2:]))
        self.arguments = (x, placed_weights, ids, topk_weights)
        mapped = chains.per_rank(lambda *operands: mm.moe(*operands), mesh, (P("expert"),) * 4, P("expert"))
        lowered = jax.jit(mapped, compiler_options=chains.CAPTURED).lower(*self.arguments)
        return [lowered, jax.jit(lambda *operands: mm.moe(*operands)).lower(*self.problem)]

    def take(self, compiled: Any, alone: Any) -> None:
        self.compiled = compiled
        self.wanted = bits(alone(*self.problem))

    def outcome(self, runs: int) -> str:
        """Right, or what was wrong in one of the runs."""
        for _ in range(runs):
            for shard in self.compiled(*self.arguments).addressable_shards:
                if (verdict := judge(shard.data, self.wanted[shard.index])) != "right":
                    return f"{self.tokens} tokens: {verdict}"
        return "right"


def main(order: str) -> None:
    place = join()
    devices = jax.devices()
    mesh, ranks = mesh_of(devices, {"expert": len(devices)}), len(devices)
    sizes = SIZES._replace(num_experts=SIZES.num_experts * ranks)
    weights = make_weights(sizes)
    placed_weights = place_on(mesh, weights, "expert")
    token_counts = [tokens // SCALE for tokens in (8 * SCALE, *(BUCKETS if order == "ascending" else BUCKETS[::-1]))]
    x = (
        np.random.default_rng(0)
        .standard_normal((max(token_counts) * ranks, SIZES.hidden), np.float32)
        .astype(jnp.bfloat16)
    )
    buckets = [Bucket(ranks, tokens, x, weights) for tokens in token_counts]
    lowered = {(i, j): one for i, b in enumerate(buckets) for j, one in enumerate(b.lower(mesh, placed_weights))}
    compiled = chains.compile_all(lowered)
    for i, bucket in enumerate(buckets):
        bucket.take(compiled[i, 0], compiled[i, 1])
    if devices[0].platform == "gpu":
        assert all(is_fused(bucket.compiled) for bucket in buckets)
        limit = expert_parallel.buffer_bytes(
            max(token_counts), sizes.top_k, sizes.hidden, sizes.inter, sizes.num_experts, ranks
        ).symmetric
        say(largest_bytes=limit, local_devices=jax.local_device_count())
    say(when="before", **state())
    # The first one is small: what comes with it is the communicator's, and the same for every program.
    for bucket in buckets:
        outcome = bucket.outcome(3)  # a graph is recorded in the first run or the second
        meet(place, f"bucket {bucket.tokens}")
        say(when=bucket.tokens, outcome=outcome, **state())
        meet(place, f"bucket {bucket.tokens} said")
    for bucket in buckets:
        say(again=bucket.tokens, outcome=bucket.outcome(2))
    say(when="end", **state())
    leave(place)


if __name__ == "__main__":
    main(sys.argv[1])
