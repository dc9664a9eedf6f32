"""Headers of safetensors files, parsed with bounds, and their tensors as views of the mapped file.

The library `safetensors` is not used: without torch it reads neither FP8 nor E8M0 nor F4 (0.8.0; its issues 598, 682
and 683), and it does not tell where a tensor lies, which is what reading the bytes of some experts needs.

A file is 8 bytes with the length of the header (little-endian), the header (header.py), and the bytes of the tensors,
one after the other without gaps. Nothing here trusts it: a header has at most 100 MB, and no more than the file.
"""

import math
import mmap
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from jax_megamoe.checkpoints.header import DTYPE_BITS, Header
from jax_megamoe.errors import CheckpointError

# The limit of the library that defined the format.
MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8

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
# What no array is made of: nobody asks for it but by hand.
_NO_ARRAYS = ("F6_E2M3", "F6_E3M2", "C64")

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
        if self.dtype in _NO_ARRAYS:
            raise self.error(f"is of {self.dtype}, wanted a type that arrays have: convert it.")
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
                length = self._read_length(file.read(_LENGTH_BYTES))
                self._start = _LENGTH_BYTES + length
                header = Header(self.path, length, self.size - self._start, file.read)
        except OSError as error:
            raise CheckpointError(
                self.path, None, f"cannot be read, {error.strerror or error}: download it again."
            ) from error
        self.metadata, self.table = header.metadata, header.tensors
        self._map: mmap.mmap | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy, perhaps in another process, maps the file again.
        return {**self.__dict__, "_map": None}

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """By name; each is made when it is asked for."""
        return _TensorsByName(self)

    def tensor(self, number: int) -> Tensor:
        """One of them, by its number in the header's order."""
        dtype, shape, begin, name = self.table[number]
        nbytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
        return Tensor(self, name, dtype, shape, self._start + begin, nbytes)

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

    def _read_length(self, octets: bytes) -> int:
        if len(octets) < _LENGTH_BYTES:
            self._fail(f"has {self.size} bytes, wanted 8 with the length of its header: download it again.")
        length = int.from_bytes(octets, "little")
        limit = min(self.size - _LENGTH_BYTES, MAX_HEADER_BYTES)
        if not 2 <= length <= limit:
            self._fail(
                f"says that its header has {length} bytes, wanted 2 to {limit} in a file of {self.size}: "
                "download it again, it is no safetensors file or not all of one."
            )
        return length

    def _fail(self, problem: str) -> NoReturn:
        raise CheckpointError(self.path, None, problem)


class _TensorsByName(Mapping[str, Tensor]):
    """The tensors of a file."""

    def __init__(self, file: File) -> None:
        self._file = file

    def __getitem__(self, name: str) -> Tensor:
        if (number := self._file.table.find(name)) is None:
            raise KeyError(name)
        return self._file.tensor(number)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._file.table.find(name) is not None

    def __iter__(self) -> Iterator[str]:
        return self._file.table.names()

    def __len__(self) -> int:
        return len(self._file.table)
