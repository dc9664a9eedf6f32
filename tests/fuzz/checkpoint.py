"""Coverage-guided fuzzing of whatever reads a checkpoint's folder, by atheris (`pip install atheris`):

    python -m tests.fuzz.checkpoint CORPUS -max_total_time=600 -max_len=262144 -timeout=20

CORPUS is a folder, which gets a small checkpoint of every family; further arguments are libFuzzer's. An input is the
index, config.json and the safetensors file of a folder, separated by `SEPARATOR`. Whatever it is, what comes of it is
a checkpoint, or a `CheckpointError`, in memory of at most its size and `MORE_BYTES`.
"""

import dataclasses
import json
import sys
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import atheris
import jax

from jax_megamoe.errors import CheckpointError
from tests.support.checkpoints import build, file_bytes
from tests.support.families import PLANS

with atheris.instrument_imports(include=["jax_megamoe.checkpoints"]):
    for module in [name for name in sys.modules if name.startswith("jax_megamoe.checkpoints")]:
        del sys.modules[module]  # imported with the package, before it was to be watched
    from jax_megamoe.checkpoints.checkpoint import read_checkpoint
    from jax_megamoe.checkpoints.layers import StockLayer

SEPARATOR = b"\0\0\0\1"
NAMES = ("model.safetensors.index.json", "config.json", "model.safetensors")
# What docs/reliability.md promises.
MORE_BYTES = 32_000_000


def read(folder: Path) -> None:
    """All but packing, which would be compiled for each shape: headers, configuration, routers, views of the experts."""
    checkpoint = read_checkpoint(folder)
    asked: tuple[Any, ...] = (checkpoint.moe_options, checkpoint.router, checkpoint._model.layer)
    for layer in checkpoint.moe_layers[:2]:
        for what in asked:
            try:
                found = what(layer)
                if isinstance(found, StockLayer):
                    found.read(0, 1)
            except CheckpointError:
                continue


def check(data: bytes) -> None:
    """One input."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        for name, content in zip(NAMES, data.split(SEPARATOR, 2), strict=False):
            if content:
                (Path(folder) / name).write_bytes(content)
        tracemalloc.start()
        try:
            read(Path(folder))
        except CheckpointError:
            pass
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    if peak > len(data) + MORE_BYTES:
        raise MemoryError(f"{peak} bytes for an input of {len(data)}")


def write_seeds(corpus: Path) -> None:
    """A checkpoint of every family, with an index and without: small, for what is longer than -max_len is cut off."""
    corpus.mkdir(parents=True, exist_ok=True)
    for name, plan in PLANS.items():
        stock = build(dataclasses.replace(plan, hidden_size=32, model_size=32, intermediate_size=32))
        content = file_bytes(stock.tensors)
        index = json.dumps({"weight_map": dict.fromkeys(stock.tensors, NAMES[2])}).encode()
        for number, first in enumerate((b"", index)):
            (corpus / f"{name}-{number}").write_bytes(
                SEPARATOR.join((first, json.dumps(stock.config).encode(), content))
            )


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    write_seeds(Path(sys.argv[1]))
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()
