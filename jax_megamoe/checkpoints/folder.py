"""A checkpoint's folder: its configuration, and the tensors of all its files by name."""

import contextlib
import itertools
import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from jax_megamoe.checkpoints.json_entries import MAX_ENTRY, JsonEntries
from jax_megamoe.checkpoints.safetensors import File, Tensor
from jax_megamoe.checkpoints.tensor_table import Hashes
from jax_megamoe.errors import CheckpointError

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
MANIFEST = "jax_megamoe.json"  # of a cache (cache.py), which is none of a stock checkpoint's files
METADATA = "jax_megamoe"  # in the header of a layer's file of a cache: what it is of, as JSON
# Of a configuration and of a manifest, which become objects of 25 times the size. Those of models have some 10 KB, and
# some 100 KB where they list modules that are not quantised.
MAX_JSON_BYTES = 1_000_000
# Of an index, which is read entry by entry: that of a model with 100,000 tensors has 10 MB.
_MAX_INDEX_BYTES = 200_000_000
_WEIGHT_MAP = "weight_map"
_MAX_NAME_BYTES = 255  # of file systems


class Tensors(Mapping[str, Tensor]):
    """The tensors of a folder by name, from the headers of its files; each is made when it is asked for.

    With an index those that it lists, in the files that it says; without one all of all `*.safetensors` files there.
    Raises `CheckpointError` for a cache, for files that are missing or no safetensors files, for tensors that are
    missing or twice, and for an index that leads out of the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if os.path.exists(folder / MANIFEST):
            raise CheckpointError(
                folder / MANIFEST,
                None,
                "is of experts that are packed already: pass the checkpoint that they were made of.",
            )
        if os.path.lexists(folder / INDEX):  # A link that leads nowhere is an index that is missing.
            self.files = _read_files(folder / INDEX)
        else:
            self.files = {path.name: File(path) for path in sorted(folder.glob("*.safetensors"))}
            if not self.files:
                raise CheckpointError(
                    folder, None, f"has neither {INDEX} nor *.safetensors files: download them there."
                )
        self._held = list(self.files.values())
        if any(METADATA in file.metadata for file in self._held):
            raise CheckpointError(folder, None, f"has files of a cache, and no {MANIFEST}: make the cache anew.")
        # Tensors are numbered from file to file.
        *self._firsts, self._count = itertools.accumulate((len(file.table) for file in self._held), initial=0)
        self._hashes = self._join_hashes()
        for number in map(int, self._hashes.repeated()):
            tensor = self._tensor(number)
            if (other := self[tensor.name]).file is not tensor.file:
                raise tensor.error(f"is in {other.file.path.name} too, wanted once: remove one of the files.")

    def __getstate__(self) -> dict[str, Any]:
        """Without hashes, which another process has others of."""
        return {key: value for key, value in self.__dict__.items() if key != "_hashes"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._hashes = self._join_hashes()

    def __getitem__(self, name: str) -> Tensor:
        if (number := self._find(name)) is None:
            raise KeyError(name)
        return self._tensor(number)

    def __iter__(self) -> Iterator[str]:
        return itertools.chain.from_iterable(file.table.names() for file in self._held)

    def __len__(self) -> int:
        return self._count

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._find(name) is not None

    def require(self, name: str) -> Tensor:
        """The tensor. Raises `CheckpointError` where there is none."""
        if (number := self._find(name)) is None:
            raise CheckpointError(self.folder, name, "is missing: download all files of the checkpoint.")
        return self._tensor(number)

    def _join_hashes(self) -> Hashes:
        hashes = [file.table.hashes for file in self._held]
        return hashes[0] if len(hashes) == 1 else Hashes(np.concatenate([each.unsorted() for each in hashes]))

    def _find(self, name: str) -> int | None:
        for number in self._hashes.find(name):
            file, place = self._place(number)
            if file.table.name(place) == name:
                return number
        return None

    def _tensor(self, number: int) -> Tensor:
        file, place = self._place(number)
        return file.tensor(place)

    def _place(self, number: int) -> tuple[File, int]:
        at = bisect_right(self._firsts, number) - 1
        return self._held[at], number - self._firsts[at]


def read_json(path: Path, remedy: str = "download it again") -> dict[str, Any]:
    """The object in a small file. Raises `CheckpointError`, with the remedy, where there is none."""
    try:
        with _open(path, MAX_JSON_BYTES) as (file, size):
            fields = json.loads(file.read(size))  # a larger number would be allocated, whatever the file has
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(path, None, f"is no JSON: {remedy}.") from error
    if not isinstance(fields, dict):
        raise CheckpointError(path, None, f"is no object of JSON: {remedy}.")
    return fields


@contextlib.contextmanager
def _open(path: Path, limit: int) -> Iterator[tuple[IO[bytes], int]]:
    """A file and its size. Raises `CheckpointError` where it cannot be read, then and later, and for a larger one."""
    try:
        # What is no file, as a pipe, could keep whoever opens it waiting.
        if path.exists() and not path.is_file():
            raise CheckpointError(path, None, "is no regular file: download it again.")
        with path.open("rb") as file:
            if (size := os.fstat(file.fileno()).st_size) > limit:
                raise CheckpointError(path, None, f"has {size} bytes, wanted up to {limit}: look what it is.")
            yield file, size
    except OSError as error:
        raise CheckpointError(
            path, None, f"cannot be read, {error.strerror or error}: pass the folder of a downloaded model."
        ) from error


def _read_files(index: Path) -> dict[str, File]:
    """The files of an index by their names, with all tensors that it lists."""
    files: dict[str, File] = {}
    has_map = False
    try:
        with _open(index, _MAX_INDEX_BYTES) as (file, _):
            entries = JsonEntries(file.read, "utf-8-sig")
            if entries.next() != "{":
                raise CheckpointError(index, None, "is no JSON, or no object of JSON: download it again.")
            for field, value in entries.entries(inner=_WEIGHT_MAP):
                if field != _WEIGHT_MAP:
                    del value  # before the next one is made
                    continue
                if has_map or not isinstance(value, Iterator):
                    raise CheckpointError(index, None, f"has no {_WEIGHT_MAP} of names: download it again.")
                has_map = True
                _open_files(index, value, files)
            entries.check_end()
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            index, None, f"is no JSON, or has an entry of more than {MAX_ENTRY} characters: download it again."
        ) from error
    if not files:
        raise CheckpointError(index, None, f"has no {_WEIGHT_MAP} of names: download it again.")
    return dict(sorted(files.items()))


def _open_files(index: Path, weight_map: Iterator[tuple[str, Any]], files: dict[str, File]) -> None:
    """Adds the files of names of tensors and of files, each when it is met: one that is missing ends it."""
    for name, file_name in weight_map:
        file = files.get(file_name) if isinstance(file_name, str) else None
        if file is None:
            _check_name(index, name, file_name)
            file = files[file_name] = File(index.parent / file_name)
        if file.table.find(name) is None:
            raise CheckpointError(file.path, name, f"is missing, though {INDEX} lists it: download it again.")


def _check_name(index: Path, name: str, file_name: object) -> None:
    # A plain name: a path could lead anywhere.
    if not isinstance(file_name, str) or file_name in ("", ".", "..") or Path(file_name).name != file_name:
        raise CheckpointError(
            index,
            name,
            f"is said to be in {str(file_name)[:80]!r}, wanted the name of a file of the folder: "
            "take the index from its source.",
        )
    if "\\" in file_name or "\0" in file_name or not _can_be_named(file_name):
        raise CheckpointError(index, name, "is said to be in a file with a strange name: take it from its source.")


def _can_be_named(file_name: str) -> bool:
    """Whether a file can have this name: JSON may have half a pair, and any length."""
    try:
        return len(os.fsencode(file_name)) <= _MAX_NAME_BYTES
    except UnicodeEncodeError:
        return False
