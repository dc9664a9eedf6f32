"""What a checkpoint holds besides experts: embeddings, attention, norms. Read, dequantised and stacked over layers."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

import jax_megamoe as mm
from jax_megamoe.checkpoints import Checkpoint
from jax_megamoe.checkpoints.families import Config
from jax_megamoe.checkpoints.folder import CONFIG, Tensors, read_json

BLOCK = 128  # FP8 weights have one scale per block of 128x128


def open_checkpoint(
    folder: str | os.PathLike[str], experts_folder: str | os.PathLike[str] | None, *families: str
) -> Checkpoint:
    """The experts of a checkpoint, or what `python -m jax_megamoe convert` has made of them in a folder of their own.

    Raises `ValueError` for a model of none of these families, and where the two folders have different configurations.
    """
    checkpoint = mm.read_checkpoint(experts_folder or folder)
    if experts_folder is not None:
        config = Path(folder) / CONFIG
        if Config(read_json(config), str(config)).fields != checkpoint.config:
            raise ValueError(
                f"{experts_folder} has experts of another config.json than that of {folder}, wanted them to be of one "
                "model: pass the folder that convert has made of it."
            )
    if checkpoint.family not in families:
        raise ValueError(
            f"{experts_folder or folder} holds {checkpoint.family}, wanted {families[0]}: "
            "use the example of its family."
        )
    return checkpoint


class DenseWeights:
    """The tensors of a folder by name, as arrays of one floating-point type."""

    def __init__(self, folder: str | os.PathLike[str], dtype: Any) -> None:
        self.tensors = Tensors(Path(folder))
        self.dtype = jnp.dtype(dtype)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def read(self, name: str, *shape: int, dtype: Any = None) -> np.ndarray[Any, Any]:
        """A tensor in this shape, of another type if that is said; FP8 blocks are multiplied by their scales first."""
        tensor = self.tensors.require(name)
        array = tensor.array()
        if tensor.dtype == "F8_E4M3":
            scale = self._scale(name)
            # The last block of a row or column may be smaller than the others.
            scale = scale.repeat(BLOCK, 0)[: array.shape[0]].repeat(BLOCK, 1)[:, : array.shape[1]]
            array = array.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
        return array.astype(dtype or self.dtype).reshape(shape or array.shape)

    def _scale(self, name: str) -> np.ndarray[Any, Any]:
        """The scales f32 of an FP8 weight's blocks; of E8M0 each byte is an exponent."""
        names = (f"{name}_scale_inv", f"{name.removesuffix('weight')}scale")
        scale = self.tensors.require(next((each for each in names if each in self.tensors), names[0]))
        array = scale.array()
        if scale.dtype in ("F8_E8M0", "U8"):
            array = array.view(ml_dtypes.float8_e8m0fnu)
        return array.astype(np.float32)

    def stack(self, layers: Sequence[int], name: str, *shape: int) -> np.ndarray[Any, Any]:
        """[L, ...]: the tensors `model.layers.{number}.{name}` of these layers."""
        return np.stack([self.read(f"model.layers.{number}.{name}", *shape) for number in layers])
