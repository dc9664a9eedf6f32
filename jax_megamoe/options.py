"""The types of `moe` and of `reference.moe`, which take the same options."""

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypedDict, Unpack, cast, overload

import jax

from jax_megamoe.activations import SiTU, SwiGLU
from jax_megamoe.placement import AxisNames
from jax_megamoe.weights import ExpertWeights

Implementation = Literal["cuda", "collective", "reference"]


class Options(TypedDict, total=False):
    """All keywords but `return_expert_load`, on which the type of the result depends."""

    activation: SwiGLU | SiTU | None
    activation_clamp: float | None
    routed_scaling_factor: float
    layer: int | jax.Array | None
    num_valid_tokens: int | jax.Array | None
    shared: ExpertWeights | None
    shared_weights: jax.Array | None
    batch_invariant: bool
    expert_axis: AxisNames
    token_axes: AxisNames
    implementation: Implementation | None


class MoE(Protocol):
    """A function whose result is y, and with `return_expert_load` also the load."""

    @overload
    def __call__(
        self,
        x: jax.Array,
        weights: ExpertWeights,
        topk_ids: jax.Array,
        topk_weights: jax.Array,
        *,
        return_expert_load: Literal[False] = ...,
        **options: Unpack[Options],
    ) -> jax.Array: ...
    @overload
    def __call__(
        self,
        x: jax.Array,
        weights: ExpertWeights,
        topk_ids: jax.Array,
        topk_weights: jax.Array,
        *,
        return_expert_load: Literal[True],
        **options: Unpack[Options],
    ) -> tuple[jax.Array, jax.Array]: ...
    @overload
    def __call__(
        self,
        x: jax.Array,
        weights: ExpertWeights,
        topk_ids: jax.Array,
        topk_weights: jax.Array,
        *,
        return_expert_load: bool,
        **options: Unpack[Options],
    ) -> jax.Array | tuple[jax.Array, jax.Array]: ...


def typed_by_load(function: Callable[..., Any]) -> MoE:
    """The function itself, with the type of its result by `return_expert_load`."""
    return cast(MoE, function)
