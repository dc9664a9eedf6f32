"""Checkpoints of the plans in `families.py` with a change: to their tensors, or to config.json."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import jax_megamoe as mm
from tests.support.checkpoints import Named, build, write
from tests.support.families import PLANS

Change = Callable[[dict[str, Any], Named], None]


def make(folder: Path, name: str, change: Change) -> mm.checkpoints.Checkpoint:
    stock = build(PLANS[name])
    change(stock.config, stock.tensors)
    return mm.read_checkpoint(write(folder, stock.config, stock.tensors))


def replace(suffix: str, *tensors: tuple[str, np.ndarray[Any, Any]]) -> Change:
    """Every expert's tensors with this suffix become these."""

    def change(_: dict[str, Any], held: Named) -> None:
        for key in [key for key in held if ".experts." in key and key.endswith(suffix)]:
            del held[key]
            held.update({key.removesuffix(suffix) + name: array for name, array in tensors})

    return change


def without(*names: str) -> Change:
    def change(_: dict[str, Any], held: Named) -> None:
        for name in names:
            del held[name]

    return change


def with_config(**fields: Any) -> Change:
    def change(config: dict[str, Any], _: Named) -> None:
        config.update(fields)

    return change


def with_tensor(name: str, array: np.ndarray[Any, Any]) -> Change:
    def change(_: dict[str, Any], held: Named) -> None:
        held[name] = array

    return change


def all_of(*changes: Change) -> Change:
    def change(config: dict[str, Any], held: Named) -> None:
        for one in changes:
            one(config, held)

    return change
