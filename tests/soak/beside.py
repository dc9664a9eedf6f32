"""What runs beside the layers of a soak: multiplications, copies and collectives, all of exact numbers."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from tests.support.chain import per_rank
from tests.support.meshes import place

Once = Callable[[int], str]
SIDE, NUMBERS = 256, 1 << 16
PERIOD = 251


def all_work(devices: list[Any], mesh: Mesh | None, in_order: Callable[[int], Any]) -> list[tuple[str, Once]]:
    """By name, functions of a number that do one thing, and say what was wrong with it."""
    work: list[tuple[str, Once]] = [
        ("multiplications", functools.partial(_multiply, devices)),
        ("copies", functools.partial(_copy, devices)),
        ("poisonings", functools.partial(_poison, devices)),
    ]
    if mesh is not None:
        work.append(("collectives", _Collectives(mesh, in_order)))
    return work


@jax.jit
def _product(a: jax.Array) -> jax.Array:
    return a @ a.T


def _multiply(devices: list[Any], number: int) -> str:
    """Whole numbers whose products FP32 holds, also where they are rounded to TF32 before."""
    a = ((np.arange(SIDE * SIDE) * (number + 1)) % 7).astype(np.float32).reshape(SIDE, SIDE)
    found = _product(jax.device_put(a, devices[number % len(devices)]))
    return "" if np.array_equal(found, a @ a.T) else "a product is wrong"


def _copy(devices: list[Any], number: int) -> str:
    host = np.arange(number, number + NUMBERS, dtype=np.float32)
    back = np.asarray(jax.device_put(host, devices[number % len(devices)]))
    return "" if np.array_equal(back, host) else "a copy is wrong"


def _poison(devices: list[Any], number: int) -> str:
    """Memory full of NaN, given back at once: what programs get next holds no numbers that happen to be right."""
    words = jax.device_put(np.full(1 << (8 + number % 13), np.nan, np.float32), devices[number % len(devices)])
    return "" if np.isnan(words[-1]) else "a NaN is wrong"


class _Collectives:
    """Sums, gathers and rotations over all ranks, in turn."""

    def __init__(self, mesh: Mesh, in_order: Callable[[int], Any]) -> None:
        self._ranks, self._in_order = mesh.size, in_order
        ranks = mesh.size
        self._host = (np.arange(ranks * NUMBERS) % PERIOD).astype(np.float32).reshape(ranks, NUMBERS)
        self._placed = place(mesh, self._host, "expert")
        ring = [(rank, (rank + 1) % ranks) for rank in range(ranks)]
        kinds: dict[str, tuple[Callable[[jax.Array], jax.Array], np.ndarray[Any, Any]]] = {
            "psum": (lambda b: jax.lax.psum(b, "expert"), np.tile(self._host.sum(0), (ranks, 1))),
            "all_gather": (lambda b: jax.lax.all_gather(b[0], "expert"), np.tile(self._host, (ranks, 1))),
            "ppermute": (lambda b: jax.lax.ppermute(b, "expert", ring), np.roll(self._host, 1, 0)),
        }
        self._programs = [
            (name, jax.jit(self._scaled(per_rank(function, mesh, P("expert"), P("expert")))), wanted)
            for name, (function, wanted) in kinds.items()
        ]

    @staticmethod
    def _scaled(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """With a factor, so that what an earlier run has left is wrong."""
        return lambda b, factor: function(b * factor)

    def __call__(self, number: int) -> str:
        name, program, wanted = self._programs[number % len(self._programs)]
        factor = jnp.float32(1 + number % 16)
        with self._in_order(self._ranks):
            found = program(self._placed, factor)
        return "" if np.array_equal(found, wanted * np.asarray(factor)) else f"{name} is wrong"
