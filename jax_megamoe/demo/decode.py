"""Text generation: one jitted loop over positions with a key/value cache and `jax_megamoe.moe` in every layer."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_megamoe.demo import mesh as meshes
from jax_megamoe.demo import text
from jax_megamoe.demo.model import Cache, Experts, ModelConfig, Parameters, decode_step, empty_cache, split
from jax_megamoe.options import Implementation


@dataclasses.dataclass(frozen=True)
class Generation:
    """The texts, prompts included, and how fast they came."""

    texts: list[str]
    num_steps: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Symbols that went through the model, of prompts and answers alike, per second of the compiled loop."""
        return len(self.texts) * self.num_steps / self.seconds

    @property
    def milliseconds_per_step(self) -> float:
        """Time of one pass through the model, for all texts together."""
        return 1e3 * self.seconds / self.num_steps


@functools.partial(jax.jit, static_argnums=(0, 6, 7))
def decode_loop(
    config: ModelConfig,
    parameters: Parameters,
    experts: Experts,
    prompts: jax.Array,
    lengths: jax.Array,
    key: jax.Array,
    temperature: float,
    implementation: Implementation | None,
) -> jax.Array:
    """Continues prompts int32[B, N], of which row b holds lengths[b] symbols (1 or more), to N symbols each.

    Prompts of unequal length share the loop: a row takes its own symbols while it has any and samples from then on.
    Temperature 0 picks the likeliest symbol. Over the mesh of the context, if there is one, with parameters and experts
    placed there (`mesh.place`).
    """
    num_sequences, num_symbols = prompts.shape

    def not_full(state: tuple[jax.Array, jax.Array, Cache]) -> jax.Array:
        return state[0] < num_symbols - 1

    def step(state: tuple[jax.Array, jax.Array, Cache]) -> tuple[jax.Array, jax.Array, Cache]:
        position, tokens, cache = state
        logits, cache = decode_step(
            config, parameters, experts, tokens[:, position], position, cache, implementation=implementation
        )
        if temperature == 0.0:
            sampled = jnp.argmax(logits, axis=-1)
        else:
            sampled = jax.random.categorical(jax.random.fold_in(key, position), logits / temperature, axis=-1)
        following = jnp.where(position + 1 < lengths, tokens[:, position + 1], sampled.astype(tokens.dtype))
        return position + 1, tokens.at[:, position + 1].set(following), cache

    cache = split(empty_cache(config, num_sequences), None, None, None, meshes.AXIS)
    state = (jnp.zeros((), jnp.int32), prompts, cache)
    return split(jax.lax.while_loop(not_full, step, state)[1])


def generate(
    config: ModelConfig,
    parameters: Parameters,
    experts: Experts,
    prompts: Sequence[str],
    num_tokens: int,
    *,
    temperature: float = 0.7,
    seed: int = 0,
    implementation: Implementation | None = None,
    mesh: Mesh | None = None,
) -> Generation:
    """Continues every prompt by `num_tokens` symbols, with `mesh` on all of its devices (`mesh.make_mesh`).

    The loop runs twice and is timed the second time: compiling, setting up memory that devices share, and capturing
    CUDA graphs are not part of it. Every process of a mesh makes the same call and gets the same texts.

    Raises `ValueError` for an empty prompt and `text.TextError` for a symbol that the model does not know.
    """
    if not all(prompts):
        raise ValueError("A prompt is empty, and the model needs at least one symbol to continue.")
    encoded = [text.encode(prompt) for prompt in prompts]
    lengths = np.array([len(ids) for ids in encoded], np.int32)
    padded = np.zeros((len(prompts), lengths.max() + num_tokens), np.int32)
    for row, ids in zip(padded, encoded, strict=True):
        row[: len(ids)] = ids

    if mesh is not None:
        parameters, experts = meshes.place(mesh, parameters, experts)
    arguments = (parameters, experts, padded, lengths, jax.random.key(seed))
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        compiled = decode_loop.lower(config, *arguments, temperature, implementation).compile()
    jax.block_until_ready(compiled(*arguments))
    start = time.perf_counter()
    tokens = np.asarray(compiled(*arguments))
    seconds = time.perf_counter() - start
    texts = [text.decode(row[: length + num_tokens]) for row, length in zip(tokens, lengths, strict=True)]
    return Generation(texts, padded.shape[1] - 1, seconds)
