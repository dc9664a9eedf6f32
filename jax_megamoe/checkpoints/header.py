"""Headers of safetensors files: checked entry by entry, and kept in less memory than they have bytes.

A header is JSON of {name: {dtype, shape, data_offsets}} and possibly "__metadata__" of strings. Nothing here trusts it:
whatever it says is compared with the size of the file before anything is allocated or mapped by it.
"""

import json
import math
import reprlib
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from jax_megamoe.checkpoints.json_entries import MAX_ENTRY, JsonEntries
from jax_megamoe.checkpoints.tensor_table import TensorTable
from jax_megamoe.errors import CheckpointError

MAX_DIMENSIONS = 8
# A header is an object of objects with lists in them.
_MAX_DEPTH = 3
_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_BLOCK = 1 << 12  # tensors whose order is looked at in one go

# Bits of an element. F4, F6 and F8 are those of the library since 0.6.
DTYPE_BITS: Mapping[str, int] = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


class Header:
    """The metadata and the tensors of a header of `length` bytes, followed by `available` bytes of data.

    `read` gives up to so many bytes of the file, which is at the header's first. Raises `CheckpointError`.
    """

    def __init__(self, path: Path, length: int, available: int, read: Callable[[int], bytes]) -> None:
        self._path, self._length, self._available = path, length, available
        self._read, self._left = read, length
        self.metadata: dict[str, str] = {}
        self.tensors = TensorTable()
        self._begins, self._sizes = array("q"), array("q")
        self._parse()
        self.tensors.close()
        if (name := self.tensors.repeated()) is not None:
            self._fail_twice(name)
        self._check_order()
        del self._begins, self._sizes, self._read

    def _parse(self) -> None:
        decoder = json.JSONDecoder(object_pairs_hook=self._unique, parse_constant=self._fail_constant)
        header = JsonEntries(self._piece, decoder=decoder)
        has_metadata = False
        try:
            for name, entry in header.entries():
                if name != _METADATA:
                    self._add(name, entry)
                    continue
                if has_metadata:
                    self._fail_twice(name)
                if not isinstance(entry, dict) or not all(isinstance(text, str) for text in entry.values()):
                    problem = "has a header whose __metadata__ is no object of strings: it is no safetensors file."
                    raise self._error(entry, None, problem)
                self.metadata, has_metadata = entry, True
            header.check_end()
        except CheckpointError:
            raise
        except RecursionError as error:
            raise self._too_deep() from error
        except ValueError as error:  # Text that is no UTF-8 is a ValueError, too.
            raise CheckpointError(
                self._path,
                None,
                f"has a header that is no JSON, or has an entry of more than {MAX_ENTRY} characters: "
                "download it again.",
            ) from error

    def _piece(self, count: int) -> bytes:
        wanted = min(count, self._left)
        octets = self._read(wanted)
        if len(octets) != wanted:
            found = self._length - self._left + len(octets)
            self._fail(f"ends after {found} of the {self._length} bytes of its header: download it again.")
        if self._left == self._length and not octets.startswith(b"{"):
            self._fail("has a header that does not begin with {: it is no safetensors file.")
        self._left -= wanted
        return octets

    def _add(self, name: str, entry: object) -> None:
        def fail(problem: str) -> NoReturn:
            raise self._error(entry, name, problem)

        if not isinstance(entry, dict) or entry.keys() != _FIELDS:
            fail("has other fields than dtype, shape and data_offsets in the header: it is no safetensors file.")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            fail(f"has dtype {_short(dtype)}, wanted one of {', '.join(DTYPE_BITS)}: convert it.")
        if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
            fail(f"has shape {_short(shape)}, wanted up to {MAX_DIMENSIONS} sizes: take the file from its source.")
        # No bytes, and still beyond what an array may be.
        if 0 in shape and math.prod(size or 1 for size in shape) * DTYPE_BITS[dtype] >= 1 << 63:
            fail(f"has shape {_short(shape)}, wanted that of an array: take the file from its source.")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
            fail(f"has data_offsets {_short(offsets)}, wanted two positions: take the file from its source.")
        begin, end = offsets
        if not begin <= end <= self._available:
            fail(
                f"lies from {_short(begin)} to {_short(end)} in the file's {self._available} bytes of data, wanted it "
                "inside them: download it again, it is not all there."
            )
        if 8 * (end - begin) != math.prod(shape) * DTYPE_BITS[dtype] or (
            dtype == "F4" and shape[-1:] and shape[-1] % 2
        ):
            fail(f"has {end - begin} bytes, wanted those of {dtype} {_short(shape)}: take the file from its source.")
        self.tensors.add(dtype, shape, begin, name)
        self._begins.append(begin)
        self._sizes.append(end - begin)

    def _check_order(self) -> None:
        """The tensors fill the rest of the file and overlap nowhere: else the header is not that of these bytes."""
        start, position = 8 + self._length, 0
        begins, sizes = np.frombuffer(self._begins, np.int64), np.frombuffer(self._sizes, np.int64)
        order = np.lexsort((sizes, begins))
        for first in range(0, len(order), _BLOCK):
            numbers = order[first : first + _BLOCK]
            found = begins[numbers]
            ends = found + sizes[numbers]
            wanted = np.concatenate(([position], ends[:-1]))
            if (wrong := np.flatnonzero(found != wanted)).size:
                at = wrong[0]
                raise CheckpointError(
                    self._path,
                    self.tensors.name(numbers[at]),
                    f"begins at byte {start + found[at]} of the file, wanted {start + wanted[at]}, where the one "
                    "before ends: take the file from its source.",
                )
            position = int(ends[-1])
        if position != self._available:
            self._fail(
                f"has {start + self._available} bytes, wanted {start + position}, where its tensors end: "
                "download it again."
            )

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            known: set[str] = set()
            for name, _ in pairs:
                if name in known:
                    self._fail_twice(name)
                known.add(name)
        return fields

    def _fail_twice(self, name: str) -> NoReturn:
        raise CheckpointError(self._path, name, "is twice in the header, wanted once: take the file from its source.")

    def _error(self, entry: object, name: str | None, problem: str) -> CheckpointError:
        """What is wrong with an entry; where it is nested, that."""
        return self._too_deep() if _nests(entry, _MAX_DEPTH - 1) else CheckpointError(self._path, name, problem)

    def _too_deep(self) -> CheckpointError:
        problem = f"has a header with more than {_MAX_DEPTH} levels of brackets: it is no safetensors file."
        return CheckpointError(self._path, None, problem)

    def _fail(self, problem: str) -> NoReturn:
        raise CheckpointError(self._path, None, problem)

    def _fail_constant(self, constant: str) -> NoReturn:
        self._fail(f"has a header with {constant} in it: it is no safetensors file.")


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _short(value: object) -> str:
    """What a header says, in a message: a part of it only, and never more memory for it than that."""
    return reprlib.repr(value) if not isinstance(value, int) or _is_size(value) else "a number out of range"


def _nests(value: object, levels: int) -> bool:
    """Whether brackets are nested deeper than that."""
    if not isinstance(value, dict | list):
        return False
    held = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_nests(one, levels - 1) for one in held)
