"""What counts as an array, and as weights, in the arguments of every public function."""

import math
import numbers
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.sharding import NamedSharding

from jax_megamoe.errors import ArgumentError, DTypeError, ShardingError

Array = jax.Array | np.ndarray
MAX_FLOAT32 = float(np.finfo(np.float32).max)
_MOST_BOXES = 16  # inside each other


def unwrap(value: object) -> object:
    """What a Param, Variable or box of a framework holds (an array, or `ExpertWeights`); anything else as it is.

    Read are `get_value()` (Flax NNX), `value` (Flax Linen, other frameworks) and `__jax_array__()` (a protocol of JAX),
    the first that there is; also of boxes inside boxes, as far as there is an end to them.
    """
    for _ in range(_MOST_BOXES):
        if isinstance(value, jax.Array | np.ndarray | np.generic | type):  # a class is no box, whatever its objects are
            break
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
    if isinstance(held, jax.Array):
        return held
    if isinstance(held, np.ndarray | np.generic) and not isinstance(held, np.ma.MaskedArray):
        return _native(name, np.asarray(held))
    remedy = "convert it with jax.numpy.asarray" if isinstance(held, list | tuple | numbers.Number) else "pass one"
    raise DTypeError(f"{name} is {type_of(held)}, wanted {wanted}: {remedy}.")


def _native(name: str, array: np.ndarray) -> np.ndarray:
    """An array of NumPy in the byte order of this machine; raises `DTypeError` for a dtype that JAX does not have."""
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    dtype = array.dtype
    is_number = dtype.kind in "biufc" and dtype not in (np.longdouble, np.clongdouble)
    if not is_number and dtype.type.__module__ != "ml_dtypes":
        if dtype == np.dtype("V1"):
            remedy = "if it is FP8 that np.savez has written, take .view(ml_dtypes.float8_e4m3fn) of it"
        else:
            remedy = "convert it"
        raise DTypeError(f"{name} has dtype {dtype}, wanted one that JAX has: {remedy}.")
    return array


def require_split_of_leading(name: str, array: Array, num_leading: int) -> None:
    """Raises `ShardingError` where the array's type splits other dimensions than the first so many."""
    spec = tuple(jax.typeof(array).sharding.spec)
    if any(axes is not None for axes in spec[num_leading:]):
        raise ShardingError(
            f"{name} is {jax.typeof(array)}, wanted its matrices whole on each device: reshard it with "
            "jax.sharding.reshard, split over experts only."
        )


def require_same_split(name: str, array: Array, first_name: str, first: Array) -> None:
    """Raises `ShardingError` where explicit types do not split two arrays over the same axes of the same mesh."""
    one, other = (jax.typeof(value).sharding for value in (array, first))
    if (one.mesh, tuple(one.spec)[:1]) != (other.mesh, tuple(other.spec)[:1]):
        # Types do not show a mesh of automatic axes.
        on = [f" on {value.mesh.shape_tuple or 'no mesh'}" if one.mesh != other.mesh else "" for value in (one, other)]
        raise ShardingError(
            f"{name} is {jax.typeof(array)}{on[0]} and {first_name} {jax.typeof(first)}{on[1]}, wanted the same split "
            "of the same mesh: put both there with jax.device_put or jax.sharding.reshard."
        )


def check_flag(name: str, value: object) -> None:
    """Raises `ArgumentError` for what is no bool known while tracing; 0 and 1 are taken for one."""
    if not (isinstance(value, bool | np.bool_) or (isinstance(value, int) and value in (0, 1))):
        raise ArgumentError(
            f"{name} is {text_of(value)}, wanted True or False, known while tracing: pass a Python bool."
        )


def require_device_memory(name: str, array: Array, move: str | None = None) -> None:
    """Raises `ShardingError` for an array of JAX in host memory, and says to move it, or what `move` names.

    Raises `ArgumentError` for one that is deleted, as those are that a program was given to overwrite.
    """
    if not isinstance(array, jax.core.Tracer) and isinstance(array, jax.Array) and array.is_deleted():
        raise ArgumentError(
            f"{name} is deleted, as donated arrays are, wanted one that lives: pass what took its place."
        )
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
    is_array = isinstance(value, jax.Array | np.ndarray) and not isinstance(value, np.ma.MaskedArray)
    name = "array" if is_array else type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def text_of(value: object, most: int = 200) -> str:
    """A value that a caller passed, as messages show it: in one line, of at most so many characters."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # of somebody else's class; an int of thousands of digits has no text either
        return f"{type_of(value)} that has no text"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def require_same_devices(arrays: Mapping[str, object]) -> None:
    """Raises `ShardingError` unless arrays that are not traced have their meshes' devices in one order.

    Of traced ones JAX sees to it, and what nobody has put anywhere goes along.
    """
    if any(isinstance(array, jax.core.Tracer) for array in arrays.values()):
        return
    first: tuple[str, list[int]] | None = None
    for name, array in arrays.items():
        if (ids := devices_of(array)) is None:
            continue
        first = first or (name, ids)
        if ids != first[1]:
            raise ShardingError(
                f"{name} is on the devices {ids}, in this order, wanted {first[1]} like {first[0]}: "
                "put all arguments on one mesh with jax.device_put."
            )


def devices_of(array: object) -> list[int] | None:
    """The numbers of the devices on which somebody has put an array, in its mesh's order; None for all else."""
    if isinstance(array, jax.core.Tracer) or not isinstance(array, jax.Array) or not array.committed:
        return None
    sharding = array.sharding
    devices = sharding.mesh.devices.flat if isinstance(sharding, NamedSharding) else sharding.device_set
    return [device.id for device in devices]


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


def as_float(value: object) -> float:
    """A number, of Python or NumPy, infinite beyond FP32; NaN for what is none, bools and jax arrays among it."""
    if isinstance(value, np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return math.nan
    try:
        number = float(value)
    except OverflowError:  # an int, or a fraction, beyond all floats
        return math.nan
    return math.copysign(math.inf, number) if abs(number) > MAX_FLOAT32 else number
