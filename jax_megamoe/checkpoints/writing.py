"""Writing files that are whole or not there: safetensors files piece by piece, and others."""

import fcntl
import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from jax_megamoe.checkpoints.header import DTYPE_BITS
from jax_megamoe.checkpoints.safetensors import Array
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
def writing_to(path: Path) -> Iterator[None]:
    """What the system refuses meanwhile is a `CheckpointError` that names the file."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            path,
            None,
            f"cannot be written, {error.strerror or error}: make room there, or pass a folder that may be written to.",
        ) from error


def write_all(path: Path, file: FileIO, content: Any) -> None:
    """Writes bytes, or an array's, to the file that is going to have this path."""
    with writing_to(path):
        view = memoryview(content)
        rest = view.cast("B") if view.nbytes else b""
        while rest:
            rest = rest[file.write(rest) :]


@contextmanager
def replacement(path: Path) -> Iterator[FileIO]:
    """A file that takes the path's name once it is written and flushed; if that fails, or is killed, nothing does.

    Not buffered, so that what does not fit on the disk is known where it is written: by `write_all`.
    """
    unfinished = path.with_name(f"{path.name}{_UNFINISHED}")
    with writing_to(path):
        file = unfinished.open("xb", buffering=0)  # A new one: never what a link leads to.
    try:
        with file:
            yield file
            with writing_to(path):
                os.fsync(file.fileno())
        with writing_to(path):
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


def write_file(path: Path, content: bytes) -> None:
    """A file with this content, whole or not there."""
    with replacement(path) as file:
        write_all(path, file, content)


def check_folder(folder: Path, names: Iterable[str]) -> None:
    """Raises `CheckpointError` unless a folder is new, or holds nothing but what a killed writer of `names` left."""
    ours = {_LOCK, *(f"{name}{_UNFINISHED}" for name in names)}
    for name in _entries(folder):
        if name not in ours:
            raise CheckpointError(
                folder,
                None,
                f"holds files of something else, as {name[:80]!r}, wanted an empty folder: pass another one.",
            )


@contextmanager
def only_writer(folder: Path, names: Iterable[str]) -> Iterator[None]:
    """While this process writes files of these names to the folder no other one does.

    Makes the folder, and removes what a killed writer left of such files. Raises `CheckpointError` where that, or the
    lock, is anything but a file.
    """
    lock = folder / _LOCK
    left = [folder / f"{name}{_UNFINISHED}" for name in names]
    for path in (lock, *left):
        with writing_to(path):
            if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
                raise CheckpointError(path, None, "is no regular file: remove it, or pass another folder.")
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with writing_to(lock):
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        try:
            # The kernel lets go of it when the process ends, however it does.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(folder, None, "is being written by another process: wait for it to end.") from error
        except OSError as error:
            raise CheckpointError(
                lock, None, f"cannot be locked, {error.strerror or error}: pass a folder of another file system."
            ) from error
        for path in left:
            with writing_to(path):
                path.unlink(missing_ok=True)
        yield
    finally:
        os.close(descriptor)


def _entries(folder: Path) -> list[str]:
    """The names in a folder, none if it is not there."""
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(
            folder, None, f"cannot be read, {error.strerror or error}: pass a new folder, or one of a cache."
        ) from error


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
        write_all(path, file, len(text).to_bytes(8, "little") + text)
        begin = 8 + len(text)
        with writing_to(path):
            file.truncate(begin + position)  # A file that may not be so long fails now, on a full disk it fails later.
        for group in groups:
            written = [0] * len(group.names)
            for parts in group.parts():
                for number, part in enumerate(parts):
                    file.seek(begin + starts[group.names[number]] + written[number])
                    write_all(path, file, part)
                    written[number] += part.nbytes
