"""What can be loaded: a layer's experts as a checkpoint has them, and how they become packed leaves."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from jax_megamoe import mxfp4
from jax_megamoe.checkpoints import conversion
from jax_megamoe.checkpoints.encodings import Encoding
from jax_megamoe.checkpoints.experts import LayerExperts, Raw
from jax_megamoe.errors import ArgumentError
from jax_megamoe.operands import Leaves
from jax_megamoe.quantized_packing import quantize_and_pack
from jax_megamoe.weight_checks import Order, check_spreads
from jax_megamoe.weight_layout import Format


class Recipe(Hashable, Protocol):
    """On a device, of what `Layer.read` gives: the packed leaves, and bool[1], whether one of the experts is wrong."""

    def __call__(self, arrays: Any) -> tuple[Leaves, jax.Array]: ...


class Layer(Protocol):
    """A layer's experts: as a checkpoint has them, or packed already in a cache."""

    num_experts: int
    hidden_size: int
    intermediate_size: int
    nbytes: int  # of one expert, as it is read

    @property
    def is_packed(self) -> bool:
        """Whether it needs no packing, and many experts may be read at once."""

    @property
    def format(self) -> Format:
        """What it becomes if nobody says otherwise: what it holds; for floats one of FP8."""

    def recipe(self, format: Format) -> Recipe:
        """How to make this format. Raises `CheckpointError` where that would round what some format holds exactly."""

    def read(self, first: int, count: int) -> Any:
        """Arrays of these experts, with a dimension for them in front; a packed layer may be asked for many."""

    def prefetch(self, first: int, count: int) -> None:
        """Has these experts read in advance, by the kernel and from the disk."""

    def release_pages(self) -> None:
        """Lets go of what has been read: pages of mapped files count as memory of the process else."""

    def explain(self, expert: int, format: Format) -> None:
        """Raises the error about an expert that a recipe found wrong, if it is one."""


def sizes_of(layer: Layer) -> tuple[int, int, int]:
    """E, H and I."""
    return layer.num_experts, layer.hidden_size, layer.intermediate_size


def choose_format(layers: Sequence[Layer], wanted: Format | None) -> Format:
    """What to make of layers: what is wanted, else what all of them hold; floats count as what they become.

    Raises `ArgumentError` where they hold several: what is rounded to the format of another layer has to be asked for.
    """
    if wanted is not None:
        return wanted
    first, *others = dict.fromkeys(layer.format for layer in layers)
    if others:
        raise ArgumentError(
            f"format is None and the layers hold {' and '.join([first, *others])} (or floats, which become FP8), "
            "wanted one format for all: pass format=, or load them apart."
        )
    return first


@dataclass(frozen=True)
class PackRecipe:
    """Packs, and quantises floats."""

    encoding: Encoding
    order: Order
    format: Format

    def __call__(self, arrays: Raw) -> tuple[Leaves, jax.Array]:
        return conversion.pack(arrays, encoding=self.encoding, order=self.order, format=self.format)


class StockLayer:
    """Experts as a checkpoint has them."""

    def __init__(self, experts: LayerExperts) -> None:
        self.experts = experts
        self.num_experts, self.hidden_size, self.intermediate_size = experts.sizes
        self.nbytes = experts.nbytes

    @property
    def is_packed(self) -> bool:
        return False

    @property
    def format(self) -> Format:
        return self.experts.encoding.format or ("fp8_channel" if self.experts.has_biases else "fp8_block")

    def recipe(self, format: Format) -> PackRecipe:
        encoding = self.experts.encoding
        bias = self.experts.parts(0)[0].bias
        if bias is not None and format == "fp8_block":
            raise bias.error(
                f"is a bias, which {format} has no place for, wanted mxfp4 or fp8_channel: load it with "
                f"format={self.format!r}."
            )
        if not conversion.can_become(encoding, format):
            raise self.experts.error(
                0,
                f"is of {encoding.title}, wanted what {format} holds without rounding: load it with "
                f"format={encoding.format!r}.",
            )
        for name, size in (("hidden", self.hidden_size), ("intermediate", self.intermediate_size)):
            if format == "mxfp4" and size % mxfp4.GROUP:
                raise self.experts.error(
                    0,
                    f"says that the {name} size is {size}, wanted a multiple of {mxfp4.GROUP} for mxfp4: load it with "
                    f"format={self.format!r}.",
                )
        return PackRecipe(encoding, self.experts.order, format)

    def read(self, first: int, count: int) -> Raw:
        arrays = [self.experts.read(expert) for expert in range(first, first + count)]
        if count == 1:
            return Raw(*(None if array is None else array[None] for array in arrays[0]))
        return Raw(*(None if parts[0] is None else np.stack(parts) for parts in zip(*arrays, strict=True)))

    def prefetch(self, first: int, count: int) -> None:
        for expert in range(first, min(first + count, self.num_experts)):
            for part in self.experts.parts(expert):
                part.prefetch()

    def release_pages(self) -> None:
        for file in self.experts.files:
            file.release_pages()

    def explain(self, expert: int, format: Format) -> None:
        if self.experts.encoding.format == "mxfp4":
            for name, part in zip(("gate", "up", "down"), self.experts.parts(expert), strict=True):
                codes, exponents, _ = part.read()
                of = "" if part.index is None else f" of expert {part.index}'s {name}"
                if (problem := conversion.explain_exponents(codes.view(np.uint8), exponents, format, of)) is not None:
                    raise part.matrix.weight.error(problem)
            return
        raw = self.read(expert, 1)
        if raw.gate_scale is not None:
            raise self.experts.error(
                expert, f'is of an expert that {format} cannot hold: load it with format="fp8_block".'
            )
        try:
            # Where a float was NaN, NaN is right, and this raises nothing.
            leaves = quantize_and_pack(raw.gate, raw.up, raw.down, order=self.experts.order, format=format)
            check_spreads(leaves, self.intermediate_size, are_floats=True, first_expert=expert)
        except ArgumentError as error:
            raise self.experts.error(expert, f"is of an expert that {format} cannot hold: {error}") from error
