"""Headers of safetensors files, parsed with bounds, and their tensors as views of the mapped file.

The library `safetensors` is not used: without torch it reads neither FP8 nor E8M0 nor F4 (0.8.0; its issues 598, 682
and 683), and it does not tell where a tensor lies, which is what reading the bytes of some experts needs.

A file is 8 bytes with the length of the header (little-endian); the header, JSON of {name: {dtype, shape,
data_offsets}} and possibly "__metadata__" of strings; and the bytes of the tensors, one after the other without gaps.
Nothing here trusts it: whatever a header says is compared with the size of the file before anything is allocated or
mapped by it. What a header itself takes is bounded: it has at most 100 MB, and no more than the file.
"""

import json
import math
import mmap
import os
import reprlib
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from jax_megamoe.errors import CheckpointError

# The limit of the library that defined the format.
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 8
# A header is an object of objects with lists in them.
_MAX_DEPTH = 3
_LENGTH_BYTES = 8

# Bits of an element. F4, F6 and F8 are those of the library since 0.6.
DTYPE_BITS: Mapping[str, int] = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
# What arrays of tensors are. Those of one byte, and of less, come as bytes: devices are told what they mean.
_NUMPY_DTYPES: Mapping[str, Any] = {
    "U16": np.uint16,
    "I16": np.int16,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "U32": np.uint32,
    "I32": np.int32,
    "F32": np.float32,
    "U64": np.uint64,
    "I64": np.int64,
    "F64": np.float64,
}

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where a tensor lies: `nbytes` from `offset` in the file, rows first."""

    file: "File"
    name: str
    dtype: str  # as the header names it, a key of `DTYPE_BITS`
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def error(self, problem: str) -> CheckpointError:
        """An error that names the file and this tensor; the problem goes on from there."""
        return CheckpointError(self.file.path, self.name, problem)

    def place(self, index: int | None = None) -> tuple[int, int]:
        """Where the tensor, or one of its parts along the first dimension, begins in the file, and its bytes."""
        if index is None:
            return self.offset, self.nbytes
        nbytes = self.nbytes // self.shape[0]
        return self.offset + index * nbytes, nbytes

    def array(self, index: int | None = None) -> Array:
        """The tensor, or one of its parts along the first dimension, as a read-only view of the mapped file.

        Types of one byte are uint8 of the tensor's shape, F4 is uint8 with half as many columns.
        """
        shape = self.shape if self.dtype != "F4" else (*self.shape[:-1], self.shape[-1] // 2)
        dtype = np.dtype(_NUMPY_DTYPES.get(self.dtype, np.uint8))
        shape = shape if index is None else shape[1:]
        offset, nbytes = self.place(index)
        octets = np.frombuffer(self.file.mapped(), np.uint8, nbytes, offset)
        if offset % dtype.itemsize:
            octets = octets.copy()  # The format does not align: that is the header's length.
        array: Array = octets.view(dtype).reshape(shape)
        return array


class File:
    """A safetensors file: its tensors and metadata by name, from the header alone.

    Raises `CheckpointError` for files that cannot be read, and for headers that are not those of such a file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            # What is no file, as a pipe, could keep whoever opens it waiting.
            if not stat.S_ISREG(self.path.stat().st_mode):
                self._fail("is no regular file: download it again.")
            with self.path.open("rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                header = self._read_header(file.read(_LENGTH_BYTES), file.read)
        except OSError as error:
            raise CheckpointError(
                self.path, None, f"cannot be read, {error.strerror or error}: download it again."
            ) from error
        self._start = _LENGTH_BYTES + len(header)
        self._map: mmap.mmap | None = None
        self.metadata, self.tensors = self._parse(header)
        self._check_order()

    def mapped(self) -> mmap.mmap:
        """The whole file, mapped when it is first needed. Raises `CheckpointError` where it has changed its size.

        Asked before each read: a map of a file that got shorter ends the process when it is read.
        """
        if self._map is not None:
            try:
                size = self.path.stat().st_size
            except OSError:  # What was removed, the map still has.
                size = self.size
            if size < self.size:
                self._fail(f"has {size} bytes and had {self.size} when its header was read: read it again.")
        if self._map is None:
            try:
                with self.path.open("rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    if size != self.size:
                        self._fail(f"has {size} bytes and had {self.size} when its header was read: read it again.")
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:
                raise CheckpointError(
                    self.path, None, f"cannot be mapped, {error.strerror or error}: read the checkpoint again."
                ) from error
        return self._map

    def release_pages(self) -> None:
        """Lets go of what has been read, which otherwise counts as memory of this process until others need it."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)

    def prefetch(self, offset: int, nbytes: int) -> None:
        """Asks the kernel to read these bytes soon, while this process does something else."""
        start = offset - offset % mmap.PAGESIZE
        self.mapped().madvise(mmap.MADV_WILLNEED, start, offset + nbytes - start)

    def _read_header(self, length_bytes: bytes, read: Any) -> bytes:
        if len(length_bytes) < _LENGTH_BYTES:
            self._fail(f"has {self.size} bytes, wanted 8 with the length of its header: download it again.")
        length = int.from_bytes(length_bytes, "little")
        limit = min(self.size - _LENGTH_BYTES, MAX_HEADER_BYTES)
        if not 2 <= length <= limit:
            self._fail(
                f"says that its header has {length} bytes, wanted 2 to {limit} in a file of {self.size}: "
                "download it again, it is no safetensors file or not all of one."
            )
        header: bytes = read(length)
        if len(header) != length:
            self._fail(f"ends after {len(header)} of the {length} bytes of its header: download it again.")
        return header

    def _parse(self, header: bytes) -> tuple[dict[str, str], dict[str, Tensor]]:
        if not header.startswith(b"{"):
            self._fail("has a header that does not begin with {: it is no safetensors file.")
        if _depth(header) > _MAX_DEPTH:
            self._fail(f"has a header with more than {_MAX_DEPTH} levels of brackets: it is no safetensors file.")
        try:
            fields = json.loads(header, object_pairs_hook=self._unique, parse_constant=self._fail_constant)
        except CheckpointError:
            raise
        except (ValueError, RecursionError) as error:  # Text that is no UTF-8 is a ValueError, too.
            raise CheckpointError(self.path, None, "has a header that is no JSON: download it again.") from error
        metadata = fields.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            self._fail("has a header whose __metadata__ is no object of strings: it is no safetensors file.")
        return metadata, {name: self._tensor(name, entry) for name, entry in fields.items()}

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            known: set[str] = set()
            for name, _ in pairs:
                if name in known:
                    raise CheckpointError(
                        self.path, name, "is twice in the header, wanted once: take the file from its source."
                    )
                known.add(name)
        return fields

    def _tensor(self, name: str, entry: object) -> Tensor:
        def fail(problem: str) -> NoReturn:
            raise CheckpointError(self.path, name, problem)

        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            fail("has other fields than dtype, shape and data_offsets in the header: it is no safetensors file.")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            fail(f"has dtype {_short(dtype)}, wanted one of {', '.join(DTYPE_BITS)}: convert it.")
        if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
            fail(f"has shape {_short(shape)}, wanted up to {MAX_DIMENSIONS} sizes: take the file from its source.")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
            fail(f"has data_offsets {_short(offsets)}, wanted two positions: take the file from its source.")
        begin, end = offsets
        available = self.size - self._start
        if not begin <= end <= available:
            fail(
                f"lies from {_short(begin)} to {_short(end)} in the file's {available} bytes of data, wanted it inside "
                "them: download it again, it is not all there."
            )
        if 8 * (end - begin) != math.prod(shape) * DTYPE_BITS[dtype] or (
            dtype == "F4" and shape[-1:] and shape[-1] % 2
        ):
            fail(f"has {end - begin} bytes, wanted those of {dtype} {_short(shape)}: take the file from its source.")
        return Tensor(self, name, dtype, tuple(shape), self._start + begin, end - begin)

    def _check_order(self) -> None:
        """The tensors fill the rest of the file and overlap nowhere: else the header is not that of these bytes."""
        position = self._start
        for tensor in sorted(self.tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
            if tensor.offset != position:
                raise tensor.error(
                    f"begins at byte {tensor.offset} of the file, wanted {position}, where the one before ends: "
                    "take the file from its source."
                )
            position += tensor.nbytes
        if position != self.size:
            self._fail(f"has {self.size} bytes, wanted {position}, where its tensors end: download it again.")

    def _fail(self, problem: str) -> NoReturn:
        raise CheckpointError(self.path, None, problem)

    def _fail_constant(self, constant: str) -> NoReturn:
        self._fail(f"has a header with {constant} in it: it is no safetensors file.")


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _short(value: object) -> str:
    """What a header says, in a message: a part of it only, and never more memory for it than that."""
    return reprlib.repr(value) if not isinstance(value, int) or _is_size(value) else "a number out of range"


# All bytes but those that nest, or hide what nests.
_IGNORED = bytes(set(range(256)) - set(b'[]{}"'))


def _depth(text: bytes) -> int:
    """How deep brackets of JSON are nested; strings may hold any. Parsers recurse, and build what nobody needs."""
    depth = deepest = 0
    in_string = False
    for byte in text.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _IGNORED):
        if byte == ord('"'):
            in_string = not in_string
        elif not in_string:
            depth += 1 if byte in b"[{" else -1
            deepest = max(deepest, depth)
    return deepest
