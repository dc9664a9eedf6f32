"""The arrays of a call by name: those of the weights."""

from typing import Any, NamedTuple


class Leaves(NamedTuple):
    """One thing for each array of `ExpertWeights`, in their order: the arrays, their shapes, or specs."""

    gate_up: Any
    gate_up_scale: Any
    down: Any
    down_scale: Any
