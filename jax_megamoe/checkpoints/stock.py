"""A stock checkpoint: the layers, routers and shared experts of a model that a table of families knows."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jax_megamoe.checkpoints import agreement, experts, router
from jax_megamoe.checkpoints.families import Config, Family, families_of
from jax_megamoe.checkpoints.folder import CONFIG, Tensors, read_json
from jax_megamoe.checkpoints.layers import StockLayer
from jax_megamoe.checkpoints.router import Router
from jax_megamoe.errors import CheckpointError

# In front of "layers.{layer}."; the first that is there, and no other with experts of the same layer. Multi-token
# prediction (`mtp.layers.`) is none of them.
_PREFIXES = ("model.", "model.language_model.", "language_model.model.", "language_model.", "")


class StockModel:
    """A model as its owner publishes it. Raises `CheckpointError` unless it is of a family that can be served."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        fields = read_json(folder / CONFIG)
        self.config = Config(fields, str(folder / CONFIG))
        rows = families_of(self.config)
        self.tensors = Tensors(folder)
        self.family, self.prefix, held = _find(rows, self.tensors)
        self._num_experts = self.config.count("num_experts")
        # Layers after the last are those of multi-token prediction. What should have experts and has none is missed
        # when it is read.
        agreement.check_layers(self.config, self.family, sorted(held))
        self.moe_layers = self.config.moe_layers()
        for layer, found in held.items():
            if found > self._num_experts:
                raise self.config.error(
                    f"has {self._num_experts} experts, and layer {layer} of the files has number {found - 1}: "
                    "look whether they belong together."
                )

    @property
    def name(self) -> str:
        return self.family.name

    def layer(self, layer: int) -> StockLayer:
        """The experts of a layer, after checking all of their headers."""
        hidden_size, stem = self.config.count("hidden_size"), f"{self._stem(layer)}.experts"
        found = experts.find_experts(self.tensors, stem, self.family, self._num_experts, hidden_size)
        agreement.check_experts(self.config, self.family, found)
        return StockLayer(found)

    def shared(self, layer: int, routed: StockLayer | None = None) -> StockLayer | None:
        """The shared experts of a layer, None where it has none; `routed` is `self.layer(layer)`, if that is known."""
        if self.family.shared is None:
            return None
        stem = f"{self._stem(layer)}.{self.family.shared}"
        suffixes = (".weight", ".weight_packed")
        names = (f"{stem}.{part}{suffix}" for part in self.family.shared_expert for suffix in suffixes)
        # What the configuration has and the files lack is missed when it is read.
        is_said = self.config.get("num_shared_experts", int) or self.config.get("shared_size", int)
        if not (is_said or any(name in self.tensors for name in names)):
            return None
        routed = routed or self.layer(layer)
        found = experts.find_shared(self.tensors, stem, self.family.shared_expert, routed.intermediate_size)
        agreement.check_shared(self.config, found, routed.experts)
        return StockLayer(found)

    def router(self, layer: int) -> Router:
        """The router of a layer."""
        found = router.read_router(self.tensors, self._stem(layer), self.family, self.config, layer)
        # A gate of all shared experts is that of each of them.
        if found.shared_gate is None or (shared := self.shared(layer)) is None:
            return found
        return replace(found, shared_gate=jnp.repeat(found.shared_gate, shared.num_experts, axis=0))

    def moe_options(self, layer: int) -> dict[str, Any]:
        """Keywords of `moe` for a layer."""
        return router.moe_options(self.family, self.config)

    def _stem(self, layer: int) -> str:
        return f"{self.prefix}layers.{layer}.{self.family.block}"


def _find(rows: Sequence[Family], tensors: Tensors) -> tuple[Family, str, dict[int, int]]:
    """The row and the prefix that the tensors' names go by, and by layer, how many experts they count."""
    counted = _count_experts(rows, tensors)
    found: list[tuple[Family, str, dict[int, int]]] = []
    for row, family in enumerate(rows):
        held_by = {prefix: held for prefix in _PREFIXES if (held := counted.get((row, prefix)))}
        for (one, first), (other, second) in itertools.pairwise(held_by.items()):
            if twice := sorted(first.keys() & second.keys()):
                raise CheckpointError(
                    tensors.folder,
                    None,
                    f"has experts of layer {twice[0]} with names that begin with {one + 'layers'!r} and with "
                    f"{other + 'layers'!r}, wanted them once: remove the files that are not of the model.",
                )
        if held_by:
            found.append((family, *next(iter(held_by.items()))))
    # Rows may differ in their routers alone.
    for family, prefix, held in found:
        if any(f"{prefix}layers.{layer}.{family.block}.{family.router}" in tensors for layer in held):
            return family, prefix, held
    # Else what is missed is named as the first row has it.
    return found[0] if found else (rows[0], _PREFIXES[0], {})


def _count_experts(rows: Sequence[Family], tensors: Tensors) -> dict[tuple[int, str], dict[int, int]]:
    """By number of the row and prefix, how many experts a layer has, 0 where they are in one tensor.

    Layers of more than four digits are none: what is kept of them would be more than their names.
    """
    prefixes = "|".join(map(re.escape, _PREFIXES))
    pattern = re.compile(rf"({prefixes})layers\.(\d{{1,4}})\.(\w+)\.experts\.(?:(\d{{1,6}})\.)?(\w+)")
    counted: dict[tuple[int, str], dict[int, int]] = {}
    for name in tensors:
        if (match := pattern.match(name)) is None:
            continue
        prefix, layer, block, expert, projection = match.groups()
        for row, family in enumerate(rows):
            if family.block != block:
                continue
            if expert is not None and projection in family.expert:
                held = counted.setdefault((row, prefix), {})
                held[int(layer)] = max(held.get(int(layer), 0), int(expert) + 1)
            elif expert is None and projection.startswith(("gate_up_proj", "down_proj")):
                counted.setdefault((row, prefix), {}).setdefault(int(layer), 0)
    return counted
