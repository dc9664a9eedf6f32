"""The experts of a layer in a checkpoint: where their matrices are, by headers alone, and reading one of them."""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from jax_megamoe.checkpoints.encodings import ALL, WEIGHT_NAMES, Encoding, Matrix, find_bias, find_matrix, refuse_bias
from jax_megamoe.checkpoints.families import Family, Projections
from jax_megamoe.checkpoints.folder import Tensors
from jax_megamoe.checkpoints.safetensors import Array, File, Tensor
from jax_megamoe.errors import CheckpointError
from jax_megamoe.weight_checks import Order


class Raw(NamedTuple):
    """The matrices of one expert as the checkpoint holds them; those of several, with a dimension for them in front.

    Weights [I, H], [I, H], [H, I], transposed where `LayerExperts.order` is "in_out"; MXFP4 has half the columns. Types
    of one byte are uint8. Scales as the encoding has them, None for floats. Biases [I], [I], [H], or all None.
    """

    gate: Any
    gate_scale: Any
    up: Any
    up_scale: Any
    down: Any
    down_scale: Any
    gate_bias: Any = None
    up_bias: Any = None
    down_bias: Any = None


@dataclass(frozen=True, slots=True)
class Part:
    """A matrix, or the `place`-th of `count` equal parts along `axis`; of expert `index` where one tensor has all.

    A part has neighbouring rows, or, interleaved, every `count`-th one. `bias` is that of the whole matrix.
    """

    matrix: Matrix
    index: int | None = None
    axis: int = 0
    place: int = 0
    count: int = 1
    bias: Tensor | None = None
    is_interleaved: bool = False

    def read(self) -> tuple[Array, Array | None, Array | None]:
        """Weight, scale and bias, views of the mapped file."""
        scale, bias = self.matrix.scale, self.bias
        return (
            self._cut(self.matrix.weight, self.axis),
            None if scale is None else self._cut(scale, self.axis),
            None if bias is None else self._cut(bias, 0),
        )

    def prefetch(self) -> None:
        """Has the kernel read it in advance."""
        for tensor in self.tensors:
            tensor.file.prefetch(*tensor.place(self.index))

    @property
    def tensors(self) -> list[Tensor]:
        """Where it is read from."""
        return [tensor for tensor in (self.matrix.weight, self.matrix.scale, self.bias) if tensor is not None]

    @property
    def nbytes(self) -> int:
        """Bytes that are read."""
        whole = sum(tensor.nbytes for tensor in self.tensors)
        return whole // self.count // (1 if self.index is None else self.matrix.weight.shape[0])

    def _cut(self, tensor: Tensor, axis: int) -> Array:
        array = tensor.array(self.index)
        # A scale that all of the matrix shares along this axis belongs to each part.
        if self.count == 1 or array.ndim <= axis or array.shape[axis] == 1:
            return array
        size = array.shape[axis] // self.count
        part = [slice(None)] * array.ndim
        part[axis] = slice(self.place * size, (self.place + 1) * size)
        if self.is_interleaved:
            part[axis] = slice(self.place, None, self.count)
        return array[tuple(part)]


Parts = tuple[Part, Part, Part]  # gate, up and down of an expert


class LayerExperts:
    """The experts of a layer, of which `parts(e)` are made when they are asked for: a file may name any number.

    Raises `CheckpointError` unless all are there, of one shape and encoding. `is_one`: they are, being in one tensor.
    """

    def __init__(
        self, num_experts: int, parts: Callable[[int], Parts], order: Order = "out_in", *, is_one: bool = False
    ) -> None:
        self.num_experts = num_experts
        self.parts = parts
        self.order: Order = order
        first = parts(0)
        self.encoding: Encoding = first[0].matrix.encoding
        self.files: set[File] = set()
        for expert in range(1 if is_one else num_experts):
            for part, expected in zip(parts(expert), first, strict=True):
                _require_alike(part.matrix, expected.matrix)
                self.files.update(tensor.file for tensor in part.tensors)
        if any(part.matrix.encoding != self.encoding for part in first):
            titles = [part.matrix.encoding.title for part in first]
            raise first[2].matrix.weight.error(
                f"and those of gate and up are of {' and '.join(dict.fromkeys(titles))}, wanted one: convert them."
            )
        self.hidden_size, self.intermediate_size = self._sizes(first)
        self.nbytes = sum(part.nbytes for part in first)  # of one expert
        self.has_biases = first[0].bias is not None  # added to the projections

    def read(self, expert: int) -> Raw:
        """The matrices of one expert, views of mapped files."""
        weights, scales, biases = zip(*(part.read() for part in self.parts(expert)), strict=True)
        return Raw(weights[0], scales[0], weights[1], scales[1], weights[2], scales[2], *biases)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """E, H and I."""
        return self.num_experts, self.hidden_size, self.intermediate_size

    def error(self, expert: int, problem: str) -> CheckpointError:
        """An error about an expert, which names its gate."""
        return self.parts(expert)[0].matrix.weight.error(problem)

    def _sizes(self, first: Parts) -> tuple[int, int]:
        gate, up, down = (_divided((part.matrix.rows, part.matrix.columns), part) for part in first)
        if self.order == "in_out":
            gate, up, down = gate[::-1], up[::-1], down[::-1]
        for part, size, wanted in ((first[1], up, gate), (first[2], down, gate[::-1])):
            if size != wanted:
                raise part.matrix.weight.error(
                    f"is of a matrix {size}, wanted {wanted} beside gate's {gate}: it is damaged."
                )
        intermediate_size, hidden_size = gate
        return hidden_size, intermediate_size


def _divided(size: tuple[int, int], part: Part) -> tuple[int, int]:
    rows, columns = size
    return (rows // part.count, columns) if part.axis == 0 else (rows, columns // part.count)


def _require_alike(matrix: Matrix, expected: Matrix) -> None:
    if matrix.is_like != expected.is_like:
        raise matrix.weight.error(
            f"is {_text(matrix)}, wanted {_text(expected)} like {expected.weight.name!r}: it is damaged, or not all "
            "of the checkpoint was converted."
        )


def _text(matrix: Matrix) -> str:
    scale = "" if matrix.scale is None else f", scale {matrix.scale.dtype} {matrix.scale.shape}"
    return f"{matrix.weight.dtype} {matrix.weight.shape}{scale}"


def find_experts(tensors: Tensors, stem: str, family: Family, num_experts: int, hidden_size: int) -> LayerExperts:
    """The experts below `{stem}.`: a tensor for each expert's matrices, or for those of all experts."""
    fused = [f"{stem}.gate_up_proj", f"{stem}.down_proj"]
    if family.is_interleaved or any(name + suffix in tensors for name in fused for suffix in WEIGHT_NAMES):
        single = next((name for name in tensors if re.match(rf"{re.escape(stem)}\.\d+\.", name)), None)
        if single is not None:
            raise tensors[single].error(
                f"is of one expert beside {fused[0]!r} of all, wanted either: remove those that are not meant."
            )
        return _find_fused(tensors, fused, family, num_experts, hidden_size)
    for name in fused:
        refuse_bias(tensors, name)

    @functools.lru_cache(maxsize=32)  # An expert that is read was prefetched before, one for each device.
    def parts(expert: int) -> Parts:
        gate, up, down = (Part(find_matrix(tensors, f"{stem}.{expert}.{projection}")) for projection in family.expert)
        return gate, up, down

    first = parts(0)[0].matrix
    _require_hidden_size(first, first.columns, hidden_size)
    return LayerExperts(num_experts, parts)


def find_shared(tensors: Tensors, stem: str, projections: Projections, intermediate_size: int) -> LayerExperts:
    """One shared network, as so many experts as have this intermediate size together, or as one of another size.

    The sum of S experts is what a network of S times the intermediate size computes: rows of gate and up, and columns
    of down, may be shared out as one likes.
    """
    gate, up, down = (find_matrix(tensors, f"{stem}.{projection}") for projection in projections)
    count = gate.rows // intermediate_size if gate.rows % intermediate_size == 0 else 1
    if not all(_is_cut_evenly(matrix, axis, count) for matrix, axis in ((gate, 0), (up, 0), (down, 1))):
        count = 1

    def parts(place: int) -> Parts:
        return Part(gate, None, 0, place, count), Part(up, None, 0, place, count), Part(down, None, 1, place, count)

    return LayerExperts(count, parts, is_one=True)


def _is_cut_evenly(matrix: Matrix, axis: int, count: int) -> bool:
    """Whether each scale belongs to one of so many parts along an axis, or to all of them."""
    block = ALL if matrix.encoding.block is None else matrix.encoding.block[axis]
    size = (matrix.rows, matrix.columns)[axis] // count
    return block == ALL or size % block == 0 or (matrix.scale is not None and matrix.scale.shape[-2:][axis] == 1)


def _find_fused(tensors: Tensors, names: list[str], family: Family, num_experts: int, hidden_size: int) -> LayerExperts:
    """Experts in two tensors, [E, 2I, H] and [E, H, I], or both transposed; gate rows first, or in turn with up's."""
    gate_up, down = (find_matrix(tensors, name, num_experts, has_bias=family.has_expert_bias) for name in names)
    sizes = (gate_up.rows, gate_up.columns), (down.rows, down.columns)
    # One of the two matrices at least is not square.
    is_transposed = gate_up.rows == hidden_size == down.columns
    order: Order = "in_out" if is_transposed else "out_in"
    if is_transposed and gate_up.scale is not None:
        raise gate_up.weight.error(
            f"is transposed, {sizes[0]}, and has scales, wanted [2I, H]: dequantise the checkpoint to bfloat16."
        )
    axis = 1 if is_transposed else 0
    _require_hidden_size(gate_up, sizes[0][1 - axis], hidden_size)
    if sizes[0][axis] % 2:
        raise gate_up.weight.error(f"is of matrices {sizes[0]}, wanted gate and up of one size: it is damaged.")
    share = family.is_interleaved and (gate_up.encoding.block or (1, 1))[0] not in (1, ALL)
    if share or not _is_cut_evenly(gate_up, axis, 2):
        raise gate_up.weight.error(
            "has scales that rows of gate share with rows of up, wanted scales of their own: dequantise the checkpoint "
            "to bfloat16."
        )
    gate_up_bias = down_bias = None
    if family.has_expert_bias:
        gate_up_bias, down_bias = (
            find_bias(tensors, name, num_experts, size[axis]) for name, size in zip(names, sizes, strict=True)
        )

    def parts(expert: int) -> Parts:
        return (
            Part(gate_up, expert, axis, 0, 2, gate_up_bias, family.is_interleaved),
            Part(gate_up, expert, axis, 1, 2, gate_up_bias, family.is_interleaved),
            Part(down, expert, bias=down_bias),
        )

    return LayerExperts(num_experts, parts, order, is_one=True)


def _require_hidden_size(matrix: Matrix, found: int, hidden_size: int) -> None:
    if found != hidden_size:
        raise matrix.weight.error(
            f"is of matrices [{matrix.rows}, {matrix.columns}], wanted the hidden size {hidden_size} of config.json: "
            "look whether they belong together."
        )
