"""Stand-ins for the variables of neural network libraries, by the protocols that those have."""

from typing import Any


class Param:
    """As in Flax NNX: `get_value()`, and `__jax_array__`, which returns what is held, whatever it is."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def get_value(self) -> Any:
        return self._value

    def __jax_array__(self) -> Any:
        return self._value


class Partitioned:
    """As in Flax Linen and others: the attribute `value`."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Convertible:
    """Something that can become an array, by JAX's own protocol."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __jax_array__(self) -> Any:
        return self._value


ALL = (Param, Partitioned, Convertible)
