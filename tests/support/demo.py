"""The demo's model at tiny sizes, and its decode loop on a mesh beside that on one device."""

import dataclasses
import itertools
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_megamoe.demo import decode, model
from jax_megamoe.demo import mesh as demo_mesh
from tests.support.hlo import opcodes_of_large_results

TINY = model.ModelConfig(
    hidden_size=128, intermediate_size=128, num_layers=2, num_heads=2, num_experts=4, top_k=2, context=16
)
WIDE = dataclasses.replace(TINY, num_heads=8, num_experts=8)  # to be split over eight devices
PROMPTS = ["of a", "the st", "x = "]


def make_parameters(config: model.ModelConfig) -> model.Parameters:
    # The unembedding starts at zero, which would make all logits equal.
    untrained = model.initialize(config, jax.random.key(0))
    return untrained._replace(unembedding=jax.random.normal(jax.random.key(1), untrained.unembedding.shape) / 8)


def assert_mesh_decodes_as_one_device(
    num_devices: int, num_prompts: int, devices: list[Any], config: model.ModelConfig = WIDE
) -> str:
    """The text on so many devices is that on one of them; returns the compiled program, whose weights stay in place."""
    mesh = demo_mesh.make_mesh(config, num_devices, devices)
    prompts = list(itertools.islice(itertools.cycle(PROMPTS), num_prompts))
    with jax.default_device(devices[0]):
        parameters = make_parameters(config)
        experts = model.quantize(parameters.experts)
        alone = decode.generate(config, parameters, experts, prompts, 12, temperature=0.0)
    together = decode.generate(config, parameters, experts, prompts, 12, temperature=0.0, mesh=mesh)
    assert together.texts == alone.texts
    assert together.num_steps == alone.num_steps and together.milliseconds_per_step > 0

    arguments = loop_arguments(config, mesh, num_prompts)
    with jax.set_mesh(mesh):
        compiled = str(decode.decode_loop.lower(config, *arguments, 0.0, None).compile().as_text())
    # The smallest matrix of a layer that is split. What decoding exchanges is a few rows of activations.
    assert num_prompts * config.hidden_size < (size := parameters.blocks.attention_out[0].size)
    moved = [opcode for opcode in opcodes_of_large_results(compiled, size) if re.match("all|collective", opcode)]
    assert not moved
    return compiled


def loop_arguments(config: model.ModelConfig, mesh: Mesh, num_prompts: int) -> tuple[Any, ...]:
    parameters = make_parameters(config)
    placed = demo_mesh.place(mesh, parameters, model.quantize(parameters.experts))
    return *placed, np.zeros((num_prompts, 20), np.int32), np.ones(num_prompts, np.int32), jax.random.key(0)
