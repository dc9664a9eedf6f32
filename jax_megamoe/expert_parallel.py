"""What a program that runs expert-parallel may ask: the memory that a group takes, and which ranks have failed."""

import itertools
from typing import NamedTuple

from jax_megamoe.arrays import check_flag
from jax_megamoe.errors import ShapeError
from jax_megamoe.operands import Sizes
from jax_megamoe.primitives import _library
from jax_megamoe.weight_checks import check_format, require_count
from jax_megamoe.weight_layout import padded_size


class BufferBytes(NamedTuple):
    """Memory on each GPU of an expert group."""

    symmetric: int  # shared with the other ranks; a group has one buffer, as large as its largest call so far wants it
    scratch: int  # from XLA's own memory, for the time of a call


def buffer_bytes(
    num_tokens: int,
    top_k: int,
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    num_ranks: int,
    *,
    format: str = "fp8_block",
    batch_invariant: bool = False,
) -> BufferBytes:
    """What one call of the fused kernel over `num_ranks` ranks needs on each of them, weights and results not counted.

    `num_tokens` are those of one rank; `num_experts` those of all ranks together; `format` is that of the weights,
    `batch_invariant` the option of `moe`. Sizes that are no multiples of 128 count as the next ones, as weights with
    `pad=True` have them. A group has one symmetric buffer, which serves all layers and every smaller call: with
    buckets of sizes, ask for the largest. The first call of a larger size makes all ranks replace the buffer by a
    larger one, together: run the largest first, and it is made once. It may be larger than said here by up to an
    eighth. Not XLA's memory: leave room for it (XLA_PYTHON_CLIENT_MEM_FRACTION).

    Raises:
      ShapeError: sizes that the kernel does not serve; num_experts is no multiple of num_ranks.
      LayoutError: an unknown format.
      ArgumentError: batch_invariant is no bool.
      PlatformError: the package is not built, or its compiled module is of another version.
    """
    check_format(format)
    check_flag("batch_invariant", batch_invariant)
    numbers = {
        "num_tokens": num_tokens,
        "top_k": top_k,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_experts": num_experts,
        "num_ranks": num_ranks,
    }
    num_tokens, top_k, hidden_size, intermediate_size, num_experts, num_ranks = itertools.starmap(
        require_count, numbers.items()
    )
    if num_experts % num_ranks:
        raise ShapeError(
            f"num_experts is {num_experts} and num_ranks {num_ranks}, wanted a multiple: choose another size of group."
        )
    hidden_size, intermediate_size = map(padded_size, (hidden_size, intermediate_size))
    num_local_experts = num_experts // num_ranks
    sizes = Sizes(num_tokens, top_k, hidden_size, intermediate_size, num_local_experts, format, bool(batch_invariant))
    return BufferBytes(_library.peer_buffer_bytes(sizes, num_ranks), _library.peer_workspace_bytes(sizes, num_ranks))


def failures() -> list[str]:
    """What ranks of this process have waited for in vain, or were told of, a sentence each; empty while all is well.

    Each names rank, peer, phase and epoch: "rank 0 waited in vain for rank 1, phase routing, epoch 7: ..." on the rank
    that gave up, "rank 1 was told that rank 0 waited in vain for ..." on the others. The results of that call are NaN.
    The next run of any program of the group, in a CUDA graph too, raises the sentence as an error, and the run after
    that sets the group up anew: no process has to be restarted. Asks no GPU, so that it can be called at any time; a
    failure goes with the memory that it is about.
    """
    return [memory["failure"] for memory in _library.symmetric_memories() if memory["failure"]]
