"""The experts of a layer in a checkpoint: where their matrices are, by headers alone, and reading one of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jax_megamoe.checkpoints.encodings import Encoding, Matrix, find_matrix
from jax_megamoe.checkpoints.families import Projections
from jax_megamoe.checkpoints.folder import Tensors
from jax_megamoe.checkpoints.safetensors import Array, Tensor
from jax_megamoe.errors import CheckpointError
from jax_megamoe.weight_checks import Order
from jax_megamoe.weight_layout import BLOCK


class Raw(NamedTuple):
    """The matrices of one expert as the checkpoint holds them; those of several, with a dimension for them in front.

    Weights [I, H], [I, H], [H, I], transposed where `LayerExperts.order` is "in_out"; MXFP4 has half the columns. Types
    of one byte are uint8. Scales as the encoding has them, None for floats.
    """

    gate: Any
    gate_scale: Any
    up: Any
    up_scale: Any
    down: Any
    down_scale: Any


@dataclass(frozen=True, slots=True)
class Part:
    """A matrix, or the `place`-th of `count` equal parts along `axis`; of expert `index` where one tensor has all."""

    matrix: Matrix
    index: int | None = None
    axis: int = 0
    place: int = 0
    count: int = 1

    def read(self) -> tuple[Array, Array | None]:
        """Weight and scale, views of the mapped file."""
        scale = self.matrix.scale
        return self._cut(self.matrix.weight), None if scale is None else self._cut(scale)

    def prefetch(self) -> None:
        """Has the kernel read it in advance."""
        for tensor in (self.matrix.weight, self.matrix.scale):
            if tensor is not None:
                tensor.file.prefetch(*tensor.place(self.index))

    @property
    def nbytes(self) -> int:
        """Bytes that are read."""
        weight, scale = self.matrix.weight, self.matrix.scale
        whole = weight.nbytes + (0 if scale is None else scale.nbytes)
        return whole // self.count // (1 if self.index is None else weight.shape[0])

    def _cut(self, tensor: Tensor) -> Array:
        array = tensor.array(self.index)
        # A scale that all of the matrix shares along this axis belongs to each part.
        if self.count == 1 or array.ndim <= self.axis or array.shape[self.axis] == 1:
            return array
        size = array.shape[self.axis] // self.count
        part = [slice(None)] * array.ndim
        part[self.axis] = slice(self.place * size, (self.place + 1) * size)
        return array[tuple(part)]


class LayerExperts:
    """The experts of a layer: `parts[e]` are gate, up and down of expert e.

    Raises `CheckpointError` unless all are there, of one shape and encoding, with sizes that the kernel serves.
    """

    def __init__(self, parts: Sequence[tuple[Part, Part, Part]], order: Order = "out_in") -> None:
        self.parts = parts
        self.order: Order = order
        self.num_experts = len(parts)
        first = parts[0]
        self.encoding: Encoding = first[0].matrix.encoding
        for one in parts:
            for part, expected in zip(one, first, strict=True):
                _require_alike(part.matrix, expected.matrix)
        if any(part.matrix.encoding != self.encoding for part in first):
            titles = [part.matrix.encoding.title for part in first]
            raise first[2].matrix.weight.error(
                f"and those of gate and up are of {' and '.join(dict.fromkeys(titles))}, wanted one: convert them."
            )
        self.hidden_size, self.intermediate_size = self._sizes()
        self.nbytes = sum(part.nbytes for part in first)  # of one expert

    def read(self, expert: int) -> Raw:
        """The matrices of one expert, views of mapped files."""
        (gate, gate_scale), (up, up_scale), (down, down_scale) = (part.read() for part in self.parts[expert])
        return Raw(gate, gate_scale, up, up_scale, down, down_scale)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """E, H and I."""
        return self.num_experts, self.hidden_size, self.intermediate_size

    def error(self, expert: int, problem: str) -> CheckpointError:
        """An error about an expert, which names its gate."""
        return self.parts[expert][0].matrix.weight.error(problem)

    def _sizes(self) -> tuple[int, int]:
        gate, up, down = ((part.matrix.rows, part.matrix.columns) for part in self.parts[0])
        gate, up, down = (_divided(size, part) for size, part in zip((gate, up, down), self.parts[0], strict=True))
        if self.order == "in_out":
            gate, up, down = gate[::-1], up[::-1], down[::-1]
        for part, size, wanted in ((self.parts[0][1], up, gate), (self.parts[0][2], down, gate[::-1])):
            if size != wanted:
                raise part.matrix.weight.error(
                    f"is of a matrix {size}, wanted {wanted} beside gate's {gate}: it is damaged."
                )
        intermediate_size, hidden_size = gate
        for name, number in (("hidden", hidden_size), ("intermediate", intermediate_size)):
            if number % BLOCK:
                raise self.error(
                    0,
                    f"says that the {name} size is {number}, wanted a multiple of {BLOCK}: the kernel has no other.",
                )
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


def find_experts(
    tensors: Tensors, stem: str, projections: Projections, num_experts: int, hidden_size: int
) -> LayerExperts:
    """The experts below `{stem}.`: a tensor for each expert's matrices, or for those of all experts."""
    fused = [f"{stem}.gate_up_proj", f"{stem}.down_proj"]
    if any(name in tensors or f"{name}.weight" in tensors for name in fused):
        single = next((name for name in tensors if name.startswith(f"{stem}.0.")), None)
        if single is not None:
            raise tensors[single].error(
                f"is of one expert beside {fused[0]!r} of all, wanted either: remove those that are not meant."
            )
        return _find_fused(tensors, fused, num_experts, hidden_size)
    parts = []
    for expert in range(num_experts):
        gate, up, down = (Part(find_matrix(tensors, f"{stem}.{expert}.{projection}")) for projection in projections)
        parts.append((gate, up, down))
    _require_hidden_size(parts[0][0].matrix, parts[0][0].matrix.columns, hidden_size)
    return LayerExperts(parts)


def find_shared(tensors: Tensors, stem: str, projections: Projections, intermediate_size: int) -> LayerExperts:
    """One shared network, as so many experts as have this intermediate size together, or as one of another size.

    The sum of S experts is what a network of S times the intermediate size computes: rows of gate and up, and columns
    of down, may be shared out as one likes.
    """
    gate, up, down = (find_matrix(tensors, f"{stem}.{projection}") for projection in projections)
    count = gate.rows // intermediate_size if gate.rows % intermediate_size == 0 else 1
    parts = [
        (Part(gate, None, 0, place, count), Part(up, None, 0, place, count), Part(down, None, 1, place, count))
        for place in range(count)
    ]
    return LayerExperts(parts)


def _find_fused(tensors: Tensors, names: list[str], num_experts: int, hidden_size: int) -> LayerExperts:
    """Experts in two tensors, [E, 2I, H] with gate rows first and [E, H, I], or both transposed."""
    gate_up, down = (find_matrix(tensors, name, num_experts) for name in names)
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

    def parts_of(count: int) -> list[tuple[Part, Part, Part]]:
        return [
            (Part(gate_up, expert, axis, 0, 2), Part(gate_up, expert, axis, 1, 2), Part(down, expert))
            for expert in range(count)
        ]

    LayerExperts(parts_of(1), order)  # Their sizes are looked at before a number of experts that no file can hold.
    return LayerExperts(parts_of(num_experts), order)


def _require_hidden_size(matrix: Matrix, found: int, hidden_size: int) -> None:
    if found != hidden_size:
        raise matrix.weight.error(
            f"is of matrices [{matrix.rows}, {matrix.columns}], wanted the hidden size {hidden_size} of config.json: "
            "look whether they belong together."
        )
