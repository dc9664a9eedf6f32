"""The types of the options that `moe` and `reference.moe` have in common, for their overloads."""

from typing import Literal, TypedDict

import jax

from jax_megamoe.placement import AxisNames

Implementation = Literal["cuda", "collective", "reference"]


class Options(TypedDict, total=False):
    """All keywords but `return_expert_load`, on which the type of the result depends."""

    activation_clamp: float | None
    routed_scaling_factor: float
    layer: int | jax.Array | None
    expert_axis: AxisNames
    token_axes: AxisNames
    implementation: Implementation | None
