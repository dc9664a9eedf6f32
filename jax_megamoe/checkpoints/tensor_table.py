"""Tensors by name in less memory than their entries of a header have bytes: text and numbers in arrays, no objects.

The smallest entry of a header has 54 bytes, `"abc":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},`. Here it is a
record of 10 bytes, "U8 0 0 abc", and 12 for where that ends and for the hash of its name.
"""

from array import array
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

_ALL_BITS = (1 << 64) - 1
_NAMES = "utf-8", "surrogatepass"  # JSON may have half a pair.

Integers = np.ndarray[Any, np.dtype[Any]]


class Record(NamedTuple):
    """A tensor as its header has it: `begin` counts from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    name: str


class Hashes:
    """The places of names in a list, by their hashes. Python's cannot be chosen by who writes a file.

    Sorted numbers of 64 bits, of which the low ones are the place, as many as it needs, and all others of the hash. So
    a name is at none of the other places, and has to be looked up at those that are found.
    """

    def __init__(self, hashes: Integers) -> None:
        """Of uint64, which are used up."""
        self._places = np.uint64((1 << len(hashes).bit_length()) - 1)
        self._sorted = hashes
        self._sorted &= ~self._places
        self._sorted |= np.arange(len(hashes), dtype=np.uint32)
        self._sorted.sort()

    def find(self, name: str) -> Iterator[int]:
        """The places that may have it, in their order."""
        wanted = np.uint64(hash(name) & _ALL_BITS) & ~self._places
        at = int(self._sorted.searchsorted(wanted))
        while at < len(self._sorted) and self._sorted[at] & ~self._places == wanted:
            yield int(self._sorted[at] & self._places)
            at += 1

    def repeated(self) -> Integers:
        """The places whose hash is at a place before, too, in their order."""
        same = (self._sorted[1:] ^ self._sorted[:-1]) <= self._places
        places: Integers = np.sort(self._sorted[1:][same] & self._places)
        return places

    def unsorted(self) -> Integers:
        """The hashes as they came, but for bits that no longer list of names has."""
        hashes = np.empty_like(self._sorted)
        hashes[self._sorted & self._places] = self._sorted & ~self._places
        return hashes


class TensorTable:
    """The tensors of a header, numbered in its order. `add` all of them, then `close`; then they are found by name."""

    def __init__(self) -> None:
        self._records, self._ends = bytearray(), array("I")
        self._hashes = array("q")

    def add(self, dtype: str, shape: Sequence[int], begin: int, name: str) -> None:
        """The next one."""
        self._records += f"{dtype} {','.join(map(str, shape))} {begin} {name}".encode(*_NAMES)
        self._ends.append(len(self._records))
        self._hashes.append(hash(name))

    def close(self) -> None:
        """After the last one."""
        self.hashes = Hashes(np.frombuffer(self._hashes, np.uint64))
        del self._hashes

    def __getstate__(self) -> tuple[bytearray, "array[int]"]:
        """Without hashes, which another process has others of."""
        return self._records, self._ends

    def __setstate__(self, state: tuple[bytearray, "array[int]"]) -> None:
        self._records, self._ends = state
        self._hashes = array("q", map(hash, self.names()))
        self.close()

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> Record:
        dtype, shape, begin, name = self._fields(number)
        return Record(dtype, tuple(map(int, shape.split(","))) if shape else (), int(begin), name)

    def name(self, number: int) -> str:
        """Of one of them."""
        return self._fields(number)[3]

    def names(self) -> Iterator[str]:
        """Of all, in their order."""
        return map(self.name, range(len(self)))

    def find(self, name: str) -> int | None:
        """Its number."""
        return next((number for number in self.hashes.find(name) if self.name(number) == name), None)

    def repeated(self) -> str | None:
        """The first name that was there before."""
        numbers = map(int, self.hashes.repeated())
        return next((name for number in numbers if self.find(name := self.name(number)) != number), None)

    def _fields(self, number: int) -> list[str]:
        begin = self._ends[number - 1] if number else 0
        return self._records[begin : self._ends[number]].decode(*_NAMES).split(" ", 3)
