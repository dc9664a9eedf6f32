"""Trained parameters in a file, together with what they belong to."""

import dataclasses
import hashlib
import json
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_megamoe.demo.model import ModelConfig, Parameters, initialize
from jax_megamoe.demo.text import VOCABULARY, Corpus

_FORMAT = 2
_DESCRIPTION = "description"


class CheckpointError(ValueError):
    """A file that cannot be used: not a checkpoint, damaged, or of another model or text."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Parameters and the number of steps they were trained for."""

    parameters: Parameters
    steps: int


def default_path() -> Path:
    """`jax_megamoe/demo.npz` in the user's cache directory ($XDG_CACHE_HOME, else ~/.cache)."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "jax_megamoe" / "demo.npz"


def _description(config: ModelConfig, corpus: Corpus) -> dict[str, object]:
    """What has to agree for a checkpoint to fit.

    The training text is part of it: measured on the held-out part of another text, it may have seen that part.
    """
    return {
        "format": _FORMAT,
        "model": dataclasses.asdict(config),
        "vocabulary": VOCABULARY,
        "train_sha256": hashlib.sha256(corpus.train.tobytes()).hexdigest(),
    }


def save(path: Path, checkpoint: Checkpoint, config: ModelConfig, corpus: Corpus) -> None:
    """Writes the file, its directories too; a reader never meets half a file. `OSError` where it cannot be written."""
    description = json.dumps(_description(config, corpus) | {"steps": checkpoint.steps})
    leaves = jax.tree_util.tree_leaves_with_path(checkpoint.parameters)
    arrays: dict[str, Any] = {jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in leaves}
    arrays[_DESCRIPTION] = np.array(description)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            np.savez(file, **arrays)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def load(path: Path, config: ModelConfig, corpus: Corpus) -> Checkpoint:
    """Reads the file; `FileNotFoundError` if there is none, `CheckpointError` that says why it does not fit."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        found = json.loads(str(arrays.pop(_DESCRIPTION)))
        steps = int(found.pop("steps"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (EOFError, zipfile.BadZipFile, KeyError, ValueError, TypeError, AttributeError) as error:
        # NumPy's own words stay out: for a file it does not know they advise to allow pickles.
        raise CheckpointError(f"{path} is not a checkpoint of this demo or is damaged.") from error

    wanted = _description(config, corpus)
    for name, value in wanted.items():
        if found.get(name) != value:
            raise CheckpointError(f"{path} has another {name}: got {found.get(name)!r}, wanted {value!r}.")

    shapes = jax.eval_shape(lambda key: initialize(config, key), jax.random.key(0))
    leaves_with_path, structure = jax.tree_util.tree_flatten_with_path(shapes)
    leaves = []
    for key, shape in leaves_with_path:
        leaf = arrays.get(jax.tree_util.keystr(key))
        if leaf is None or leaf.shape != shape.shape or leaf.dtype != shape.dtype or not np.isfinite(leaf).all():
            raise CheckpointError(
                f"{path} is damaged: the parameter {jax.tree_util.keystr(key)} is missing, misshapen or not finite."
            )
        leaves.append(jnp.asarray(leaf))
    return Checkpoint(jax.tree_util.tree_unflatten(structure, leaves), steps)
