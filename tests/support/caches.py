"""Checkpoints with a cache beside them."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

import jax_megamoe as mm
from tests.support.checkpoints import build, octets, write
from tests.support.families import PLANS


def stock_folder(folder: Path, name: str) -> Path:
    """A small checkpoint of a family below a folder; returns its own."""
    stock = build(PLANS[name])
    return write(folder / name, stock.config, stock.tensors)


def assert_alike(found: mm.ExpertWeights | None, wanted: mm.ExpertWeights | None) -> None:
    """Of the same experts, layout and bytes, or both none."""
    if wanted is None or found is None:
        assert found is wanted
        return
    assert (found.num_experts, found.layout, repr(found)) == (wanted.num_experts, wanted.layout, repr(wanted))
    for one, other in zip(found.leaves, wanted.leaves, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(octets(one), octets(other))


def edit(path: Path, **fields: Any) -> None:
    """Puts fields into a file of JSON."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def listing(folder: Path) -> dict[str, Any]:
    """All that is in a folder, with what is in it."""
    return {p.name: os.readlink(p) if p.is_symlink() else p.is_dir() or p.read_bytes() for p in folder.iterdir()}
