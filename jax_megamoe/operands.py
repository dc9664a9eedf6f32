"""The arrays of a call by name. Primitives and FFI calls want them in one row: `Operands.row` and `Operands.of`.

A format of weights with other arrays changes `Leaves`; one more operand of the layer changes `Operands`, the handlers'
counterpart in cuda/ffi/moe_call.cc, and whoever makes or uses the new one.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Leaves(NamedTuple):
    """One thing for each array of `ExpertWeights`, in their order: the arrays, their types, shapes, specs."""

    gate_up: Any
    gate_up_scale: Any
    down: Any
    down_scale: Any


class Operands(NamedTuple):
    """One thing for each operand: the arrays, their types, or the axes that `jax.vmap` maps.

    x bf16[..., H]; leaves lead with E, or with L, E; topk_ids int32[..., k]; topk_weights f32[..., k]; layer int32[];
    shared, the leaves of shared experts, leads with S, or with L, S, and is () where there are none.
    """

    x: Any
    leaves: Leaves
    topk_ids: Any
    topk_weights: Any
    layer: Any
    shared: Leaves | tuple[()] = ()

    @property
    def row(self) -> tuple[Any, ...]:
        """All of them one after the other."""
        return (self.x, *self.leaves, self.topk_ids, self.topk_weights, self.layer, *self.shared)

    @classmethod
    def of(cls, row: Sequence[Any]) -> "Operands":
        """The inverse of `row`."""
        num_leaves = len(Leaves._fields)
        x, leaves, rest = row[0], Leaves(*row[1 : 1 + num_leaves]), row[1 + num_leaves :]
        topk_ids, topk_weights, layer = rest[:3]
        return cls(x, leaves, topk_ids, topk_weights, layer, Leaves(*rest[3:]) if rest[3:] else ())

    def map_tokens(self, function: Callable[[Any], Any]) -> "Operands":
        """Each operand that has a row for every token through the function, the others as they are."""
        x, ids, weights = map(function, (self.x, self.topk_ids, self.topk_weights))
        return self._replace(x=x, topk_ids=ids, topk_weights=weights)

    @property
    def num_routed_experts(self) -> int:
        """The routed experts whose weights are here: those of one device, where devices have different ones."""
        return int(self.leaves.gate_up.shape[-4])

    @property
    def num_shared_experts(self) -> int:
        """The shared experts, which every device has."""
        return int(self.shared.gate_up.shape[-4]) if isinstance(self.shared, Leaves) else 0

    @property
    def num_local_experts(self) -> int:
        """All experts whose weights are here, the shared ones first."""
        return self.num_routed_experts + self.num_shared_experts


class Sizes(NamedTuple):
    """What the memory of a call on one device follows from."""

    num_tokens: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    num_local_experts: int
    weight_format: str  # as ExpertWeights.format
    batch_invariant: bool = False  # the option of `moe`: chunks of other sizes
