"""A checkpoint's folder: its configuration, and the tensors of all its files by name."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jax_megamoe.checkpoints.safetensors import File, Tensor
from jax_megamoe.errors import CheckpointError

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
MANIFEST = "jax_megamoe.json"  # of a cache (cache.py), which is none of a stock checkpoint's files
# Of JSON beside the weights: the index of a model with 100,000 tensors has 10 MB.
_MAX_JSON_BYTES = 200_000_000


class Tensors(Mapping[str, Tensor]):
    """The tensors of a folder by name, from the headers of its files.

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
        index = folder / INDEX
        if index.exists():
            file_of = _read_index(index)
            self.files = {name: File(folder / name) for name in sorted(set(file_of.values()))}
        else:
            file_of = {}
            self.files = {path.name: File(path) for path in sorted(folder.glob("*.safetensors"))}
            if not self.files:
                raise CheckpointError(
                    folder, None, f"has neither {INDEX} nor *.safetensors files: download them there."
                )
        self._tensors: dict[str, Tensor] = {}
        for file in self.files.values():
            for name, tensor in file.tensors.items():
                if (other := self._tensors.get(name)) is not None:
                    raise tensor.error(f"is in {other.file.path.name} too, wanted once: remove one of the files.")
                self._tensors[name] = tensor
        for name, file_name in file_of.items():
            if name not in self._tensors or self._tensors[name].file is not self.files[file_name]:
                raise CheckpointError(
                    folder / file_name, name, f"is missing, though {INDEX} lists it: download it again."
                )

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def require(self, name: str) -> Tensor:
        """The tensor. Raises `CheckpointError` where there is none."""
        if (tensor := self._tensors.get(name)) is None:
            raise CheckpointError(self.folder, name, "is missing: download all files of the checkpoint.")
        return tensor


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file. Raises `CheckpointError` where there is none."""
    try:
        # What is no file, as a pipe, could keep whoever opens it waiting.
        if path.exists() and not path.is_file():
            raise CheckpointError(path, None, "is no regular file: download it again.")
        with path.open("rb") as file:
            if (size := os.fstat(file.fileno()).st_size) > _MAX_JSON_BYTES:
                raise CheckpointError(path, None, f"has {size} bytes, wanted up to {_MAX_JSON_BYTES}: look what it is.")
            fields = json.loads(file.read(size))  # a larger number would be allocated, whatever the file has
    except OSError as error:
        raise CheckpointError(
            path, None, f"cannot be read, {error.strerror or error}: pass the folder of a downloaded model."
        ) from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(path, None, "is no JSON: download it again.") from error
    if not isinstance(fields, dict):
        raise CheckpointError(path, None, "is no object of JSON: download it again.")
    return fields


def _read_index(path: Path) -> dict[str, str]:
    """Names of tensors, and the names of their files."""
    file_of = read_json(path).get("weight_map")
    if not isinstance(file_of, dict) or not file_of:
        raise CheckpointError(path, None, "has no weight_map of names: download it again.")
    known: set[str] = set()
    for name, file_name in file_of.items():
        if isinstance(file_name, str) and file_name in known:
            continue
        # A plain name: a path could lead anywhere.
        if not isinstance(file_name, str) or file_name in ("", ".", "..") or Path(file_name).name != file_name:
            raise CheckpointError(
                path,
                name,
                f"is said to be in {str(file_name)[:80]!r}, wanted the name of a file of the folder: "
                "take the index from its source.",
            )
        if "\\" in file_name or "\0" in file_name:
            raise CheckpointError(path, name, "is said to be in a file with a strange name: take it from its source.")
        known.add(file_name)
    return file_of
