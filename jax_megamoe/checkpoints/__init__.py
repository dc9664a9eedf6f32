"""Experts, routers and options of models in Hugging Face's safetensors files, without torch.

`checkpoint` has what users call. Below it: `stock` (a model as published) and `cache` (one that was packed before);
`families` (names), `encodings` (how matrices are held), `experts` and `router`, `agreement` (with config.json);
`layers` and `conversion` (from files to packed leaves), `loading` (onto devices); `safetensors`, `folder` and `writing`
(files), `header`, `tensor_table` and `json_entries` (what they say, in little memory); `progress`.
"""

from jax_megamoe.checkpoints.cache_writing import convert
from jax_megamoe.checkpoints.checkpoint import Checkpoint, load_experts, read_checkpoint
from jax_megamoe.checkpoints.router import Router

__all__ = ["Checkpoint", "Router", "convert", "load_experts", "read_checkpoint"]
