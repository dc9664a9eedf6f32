"""Which expert layers `transformers` is asked for, and of which tokens: of the tiny checkpoints beside this file."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from examples.expectations import qwen3_5_layer, tiny
from examples.expectations.tiny import Array

# What writes a checkpoint and returns the SHA-256 of its tensors, and the number of the layer. DeepSeek-V4's first one
# chooses experts by a hash of the token.
LAYERS: Mapping[str, tuple[Callable[[Path], str], int]] = {
    "qwen3_moe": (functools.partial(tiny.write, "qwen3_moe"), 1),
    "deepseek_v3": (functools.partial(tiny.write, "deepseek_v3"), 1),
    "deepseek_v4": (functools.partial(tiny.write, "deepseek_v4"), 1),
    "deepseek_v4_hash": (functools.partial(tiny.write, "deepseek_v4"), 0),
    "qwen3_5_moe": (qwen3_5_layer.write, 0),
}
NUM_TOKENS, HIDDEN_SIZE = 8, 256
TOKEN_IDS = [17, 5, 99, 3, 64, 2, 77, 31]
STEP = 4  # of the columns of a result, each fourth is kept
_SEED = 11


def tokens() -> Array:
    """What a layer is applied to, bf16[T, H]."""
    return tiny.Tensors(_SEED, is_float=False).uniform(NUM_TOKENS, HIDDEN_SIZE).astype(ml_dtypes.bfloat16)


def kept(y: Array) -> Array:
    """[T, H / STEP] of a result [T, H]."""
    return np.asarray(y, np.float32)[:, ::STEP]
