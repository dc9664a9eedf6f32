"""How checkpoints hold the matrices of experts: a table of what is read, and of what is known and refused by name.

To serve another encoding, add a row to `ENCODINGS`, and, if it is none of the formats of `ExpertWeights`, what makes
one of it to `packed.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from jax_megamoe.checkpoints.folder import Tensors
from jax_megamoe.checkpoints.safetensors import Tensor
from jax_megamoe.errors import CheckpointError
from jax_megamoe.weight_layout import BLOCK, Format

# Columns, or rows, of a matrix that share a scale: so many, or ALL.
ALL = 0
Block = tuple[int, int]

_FLOATS = frozenset({"BF16", "F16", "F32"})
_SCALES = _FLOATS
_CODES = frozenset({"U8", "I8", "F4"})
_E8M0 = frozenset({"F8_E8M0", "U8"})
_BLOCK_BYTES = 16  # of the 32 codes that share a scale


@dataclass(frozen=True)
class Encoding:
    """A way to hold a matrix [N, K]: the safetensors dtypes of its weight and scale, and what shares a scale.

    `format` is that of `ExpertWeights` that holds it exactly, None for what is quantised: floats, and FP8 that is
    dequantised first. `refusal` says why it cannot be loaded.
    """

    title: str
    weight: frozenset[str]
    scale: frozenset[str] = frozenset()  # empty: there is none
    block: Block | None = None  # rows and columns; None: any
    format: Format | None = None
    refusal: str | None = None


_DEQUANTIZE = "dequantise the checkpoint to bfloat16 and load that"

# The first row that fits is taken.
ENCODINGS = (
    Encoding("floats", _FLOATS),
    # DeepSeek, Qwen, GLM-5, MiniMax, MiMo: `weight_scale_inv`, which despite its name multiplies; DeepSeek-V4: `scale`.
    Encoding(
        "FP8 with a scale for each 128x128 block",
        frozenset({"F8_E4M3"}),
        _SCALES | _E8M0,
        (BLOCK, BLOCK),
        "fp8_block",
    ),
    # compressed-tensors with strategy "channel", as GLM-4.5-FP8.
    Encoding("FP8 with a scale for each row", frozenset({"F8_E4M3"}), _SCALES, (1, ALL), "fp8_channel"),
    # Hy3-FP8. Its static scales of activations (`input_scale`) are of no use here: tokens are quantised as they come.
    Encoding(
        "FP8 with a scale for each matrix",
        frozenset({"F8_E4M3"}),
        _SCALES,
        (ALL, ALL),
        "fp8_channel",
    ),
    # DeepSeek-V4: I8 and F8_E8M0; MiMo-V2.6: U8 both; Kimi-K3: `weight_packed`, the "mxfp4-pack-quantized" of
    # compressed-tensors; gpt-oss: `_blocks` and `_scales`, both U8.
    Encoding("MXFP4", _CODES, _E8M0, (1, 32), "mxfp4"),
    # What is no expert of DeepSeek-V4.1, so also its shared ones. No format has such scales: it is dequantised, which
    # bfloat16 holds exactly, and quantised like floats.
    Encoding("FP8 with a power of two for each 32x32 block", frozenset({"F8_E4M3"}), _E8M0, (32, 32)),
    Encoding(
        "NVFP4",
        _CODES,
        frozenset({"F8_E4M3"}),
        refusal=f"scales of E4M3 for 16 columns fit none of the kernel's formats: {_DEQUANTIZE}",
    ),
    Encoding(
        "MXFP8",
        frozenset({"F8_E4M3"}),
        _E8M0,
        (1, 32),
        refusal=f"the kernel has no scales for 32 columns: {_DEQUANTIZE}",
    ),
    Encoding(
        "INT4",
        frozenset({"I32"}),
        _SCALES,
        refusal=f"the kernel multiplies no integers: {_DEQUANTIZE}",
    ),
    Encoding(
        "INT8",
        frozenset({"I8"}),
        _SCALES,
        refusal=f"the kernel multiplies no integers: {_DEQUANTIZE}",
    ),
)

# After the name of a projection of one expert (gate_proj), and of all (gate_up_proj).
_BLOCKS, _SCALES_OF_BLOCKS = "_blocks", "_scales"
WEIGHT_NAMES = (".weight", ".weight_packed", "", _BLOCKS)
_SCALE_NAMES = (".weight_scale_inv", ".weight_scale", ".scale", "_scale_inv", "_scale", _SCALES_OF_BLOCKS)
_BIAS_NAMES = ("_bias", ".bias")
# Other packages' 4-bit integers, GPTQ and AWQ, and what comes with any encoding that is not served.
_REFUSED_NAMES: Mapping[str, str] = {
    ".qweight": f"is of GPTQ or AWQ, 4-bit integers, which the kernel does not multiply: {_DEQUANTIZE}",
    ".weight_global_scale": f"is of NVFP4, whose scales fit none of the kernel's formats: {_DEQUANTIZE}",
    ".weight_scale_2": f"is of NVFP4, whose scales fit none of the kernel's formats: {_DEQUANTIZE}",
    ".weight_zero_point": f"belongs to integers, which the kernel does not multiply: {_DEQUANTIZE}",
}


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix [rows, columns] of a checkpoint, or one for each expert, and how it is held."""

    weight: Tensor
    scale: Tensor | None
    encoding: Encoding
    rows: int
    columns: int

    @property
    def is_like(self) -> tuple[object, ...]:
        """What has to be the same for all experts of a layer."""
        scale = None if self.scale is None else (self.scale.dtype, self.scale.shape)
        return self.encoding.title, self.weight.dtype, self.weight.shape, scale


def find_matrix(tensors: Tensors, stem: str, num_experts: int | None = None, *, has_bias: bool = False) -> Matrix:
    """The matrix whose tensors' names begin with `stem`: [N, K], or [E, N, K] where `num_experts` is given.

    Raises `CheckpointError` for tensors that are missing, for encodings that cannot be loaded, and for a bias unless
    there may be one, for `find_bias`.
    """
    for suffix, problem in _REFUSED_NAMES.items():
        if (refused := tensors.get(stem + suffix)) is not None:
            raise refused.error(f"{problem}.")
    if not has_bias:
        refuse_bias(tensors, stem)
    weight = _first(tensors, stem, WEIGHT_NAMES) or tensors.require(stem + _usual_name(tensors, stem, num_experts))
    if weight.name == stem + _BLOCKS:
        weight = _join_blocks(weight)
    scale = _first(tensors, stem, _SCALE_NAMES)
    if scale is not None and weight.dtype in _FLOATS:
        raise scale.error(
            f"is beside {weight.name!r} of {weight.dtype}, wanted floats alone: remove it if they are dequantised."
        )
    lead = () if num_experts is None else (num_experts,)
    shape = weight.shape
    if len(shape) != len(lead) + 2 or shape[: len(lead)] != lead or 0 in shape:
        wanted = "[N, K]" if num_experts is None else f"[{num_experts}, N, K]"
        raise weight.error(
            f"has shape {shape}, wanted {wanted}: look whether the checkpoint is of this family, and config.json its "
            "own."
        )
    rows, columns = shape[-2:]
    if weight.dtype in ("U8", "I8") and (scale is None or scale.dtype not in ("F32", "BF16", "F16")):
        columns *= 2  # two codes in a byte
    if scale is not None and scale.shape[: len(lead)] != lead:
        raise scale.error(f"has shape {scale.shape}, wanted {num_experts} experts first: take it from its source.")
    blocks = set() if scale is None else _blocks(scale.shape[len(lead) :], rows, columns)
    for encoding in ENCODINGS:
        if _fits(encoding, weight, scale, blocks):
            if encoding.refusal is not None:
                raise weight.error(f"is of {encoding.title}: {encoding.refusal}.")
            return Matrix(weight, scale, encoding, rows, columns)
    raise _unknown(weight, scale)


def find_bias(tensors: Tensors, stem: str, num_experts: int, num_rows: int) -> Tensor:
    """The biases [E, N] of the matrices that `find_matrix` finds. Raises `CheckpointError` where there are none."""
    bias = _first(tensors, stem, _BIAS_NAMES) or tensors.require(stem + _BIAS_NAMES[0])
    if bias.dtype not in _FLOATS or bias.shape != (num_experts, num_rows):
        raise bias.error(
            f"is {bias.dtype} {bias.shape}, wanted floats [{num_experts}, {num_rows}], one for each row of the "
            "projection: take it from its source."
        )
    return bias


def _usual_name(tensors: Tensors, stem: str, num_experts: int | None) -> str:
    """What is missed where there is no weight."""
    if num_experts is None:
        return ".weight"
    return _BLOCKS if stem + _SCALES_OF_BLOCKS in tensors else ""


def _join_blocks(weight: Tensor) -> Tensor:
    """gpt-oss' [..., N, K/32, 16] bytes, in which a scale's columns have a dimension of their own, as [..., N, K/2]."""
    if weight.dtype != "U8" or len(weight.shape) < 2 or weight.shape[-1] != _BLOCK_BYTES:
        raise weight.error(
            f"is {weight.dtype} {weight.shape}, wanted U8 [..., {_BLOCK_BYTES}], 32 codes of MXFP4 at the end: "
            "take it from its source."
        )
    *lead, groups, octets = weight.shape
    return replace(weight, shape=(*lead, groups * octets))


def _first(tensors: Tensors, stem: str, suffixes: tuple[str, ...]) -> Tensor | None:
    """The one that there is. Raises `CheckpointError` where there are several."""
    found = [tensors[stem + suffix] for suffix in suffixes if stem + suffix in tensors]
    if len(found) > 1:
        raise found[1].error(f"is beside {found[0].name!r}, wanted one of them: remove the one that is not meant.")
    return found[0] if found else None


def refuse_bias(tensors: Tensors, stem: str) -> None:
    """Raises `CheckpointError` where there are biases of the projection, in families that have none."""
    if (bias := _first(tensors, stem, _BIAS_NAMES)) is not None:
        raise bias.error(
            "is added to the projection, which experts of this family do without: look whether config.json is its own."
        )


def _fits(encoding: Encoding, weight: Tensor, scale: Tensor | None, blocks: set[Block]) -> bool:
    if weight.dtype not in encoding.weight:
        return False
    if scale is None:
        return not encoding.scale
    return scale.dtype in encoding.scale and (encoding.block is None or encoding.block in blocks)


def _blocks(shape: tuple[int, ...], rows: int, columns: int) -> set[Block]:
    """What may share a scale of this shape, of a matrix [rows, columns]: of small matrices several things."""
    blocks: set[Block] = set()
    if shape in ((), (1,), (1, 1)):
        blocks.add((ALL, ALL))
    if shape in ((rows,), (rows, 1)):
        blocks.add((1, ALL))
    if shape == (-(-rows // BLOCK), -(-columns // BLOCK)):
        blocks.add((BLOCK, BLOCK))  # Those at the ends may be smaller.
    if len(shape) == 2 and 0 not in shape and rows % shape[0] == columns % shape[1] == 0:
        blocks.add((rows // shape[0], columns // shape[1]))
    return blocks


def _unknown(weight: Tensor, scale: Tensor | None) -> CheckpointError:
    known = ", ".join(encoding.title for encoding in ENCODINGS if encoding.refusal is None)
    with_scale, remedy = "without a scale beside it", _DEQUANTIZE
    if scale is not None:
        with_scale = f"with a scale {scale.dtype} {scale.shape} ({scale.name.removeprefix(weight.name)!r})"
    elif any(weight.dtype in encoding.weight for encoding in ENCODINGS if encoding.scale):
        remedy = f"download all files of the checkpoint, or {remedy}"
    return weight.error(f"is {weight.dtype} {weight.shape} {with_scale}, wanted one of: {known}: {remedy}.")
