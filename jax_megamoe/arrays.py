"""What counts as an array, and as weights, in the arguments of every public function."""

import numbers

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from jax_megamoe.errors import ArgumentError, DTypeError, ShardingError

Array = jax.Array | np.ndarray


def unwrap(value: object) -> object:
    """What a Param, Variable or box of a framework holds (an array, or `ExpertWeights`); anything else as it is.

    Read are `get_value()` (Flax NNX), `value` (Flax Linen, other frameworks) and `__jax_array__()` (a protocol of JAX),
    the first that there is; also of boxes inside boxes.
    """
    while not isinstance(value, jax.Array | np.ndarray | np.generic):
        if callable(get_value := getattr(value, "get_value", None)):
            value = get_value()
        elif (held := getattr(value, "value", None)) is not None and not callable(held):
            value = held
        elif callable(to_array := getattr(value, "__jax_array__", None)):
            value = to_array()
        else:
            break
    return value


def as_array(name: str, value: object, wanted: str = "an array") -> Array:
    """The array that was passed as argument `name`: of JAX (traced too) or NumPy, a NumPy scalar, or one in a box.

    Nothing is copied or put on a device. Raises `DTypeError` for anything else, which says what was `wanted`.
    """
    held = unwrap(value)
    if isinstance(held, jax.Array | np.ndarray):
        return held
    if isinstance(held, np.generic):
        return np.asarray(held)
    remedy = "convert it with jax.numpy.asarray" if isinstance(held, list | tuple | numbers.Number) else "pass one"
    raise DTypeError(f"{name} is {type_of(held)}, wanted {wanted}: {remedy}.")


def require_device_memory(name: str, array: Array, move: str | None = None) -> None:
    """Raises `ShardingError` for an array of JAX in host memory, and says to move it, or what `move` names."""
    if jax.typeof(array).memory_space == jax.memory.Space.Host:
        raise ShardingError(
            f"{name} is in host memory, wanted device memory: move it with "
            f"jax.device_put({move or name}, jax.memory.Space.Device), inside jax.jit too."
        )


def require_known_sizes(name: str, array: Array) -> None:
    """Raises `ArgumentError` for symbolic sizes: memory and launches are planned while a program is traced."""
    if any(export.is_symbolic_dim(size) for size in array.shape):
        raise ArgumentError(
            f"{name} has shape {array.shape}, wanted sizes that are numbers, also under jax.export: "
            "export one program for each number of tokens, and pad to the next."
        )


def type_of(value: object) -> str:
    """The type of a value as messages name it: "a list", "an int", "an array", "None"."""
    if value is None:
        return "None"
    name = "array" if isinstance(value, jax.Array | np.ndarray) else type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def clamp_to_int32[A: (jax.Array, np.ndarray)](values: A) -> A:
    """Integers of any type as int32; one that does not fit becomes the nearest one that does, and names nothing either.

    NumPy's stay NumPy's: on their way to a device, those of 64 bits would lose the upper ones.
    """
    info, int32 = jnp.iinfo(values.dtype), jnp.iinfo(jnp.int32)
    low, high = max(info.min, int32.min), min(info.max, int32.max)
    if isinstance(values, np.ndarray):
        clipped: np.ndarray = np.clip(values, values.dtype.type(low), values.dtype.type(high)).astype(np.int32)
        return clipped
    return jnp.clip(values, jnp.asarray(low, values.dtype), jnp.asarray(high, values.dtype)).astype(jnp.int32)
