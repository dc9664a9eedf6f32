"""Writing files that are whole or not there: safetensors files piece by piece, and others."""

import fcntl
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from jax_megamoe.checkpoints.safetensors import DTYPE_BITS, Array
from jax_megamoe.errors import CheckpointError

_LOCK = ".lock"
_UNFINISHED = ".unfinished"
# The bytes of tensors begin at a multiple of it, so that arrays of any type may be views of a mapped file.
_ALIGNMENT = 64


@dataclass(frozen=True)
class Group:
    """Tensors that are written together: `parts` gives a piece of each, again and again, until they are complete."""

    names: Sequence[str]
    dtypes: Sequence[str]  # of safetensors
    shapes: Sequence[tuple[int, ...]]
    parts: Callable[[], Iterable[Sequence[Array]]]


@contextmanager
def replacement(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the path's name once it is written and flushed; if that fails, or is killed, nothing does."""
    unfinished = path.with_name(f"{path.name}{_UNFINISHED}")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        # The name, too, has to reach the disk before anything that says that it is there.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """While this process writes to the folder no other one does. Makes it, and removes what a killed one left."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as lock:
        try:
            # The kernel lets go of it when the process ends, however it does.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(folder, None, "is being written by another process: wait for it to end.") from error
        for left in folder.glob(f"*{_UNFINISHED}"):
            left.unlink()
        yield


def write_safetensors(path: Path, groups: Sequence[Group], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file of tensors that need not be in memory all at once."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    starts: dict[str, int] = {}
    for group in groups:
        for name, dtype, shape in zip(group.names, group.dtypes, group.shapes, strict=True):
            nbytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
            starts[name] = position
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
            position += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    with replacement(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        begin = file.tell()
        file.truncate(begin + position)  # A disk that is too full says so now.
        for group in groups:
            written = [0] * len(group.names)
            for parts in group.parts():
                for number, part in enumerate(parts):
                    file.seek(begin + starts[group.names[number]] + written[number])
                    written[number] += file.write(memoryview(part).cast("B"))
