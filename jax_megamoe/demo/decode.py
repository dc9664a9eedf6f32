"""Text generation: one jitted loop over positions with a key/value cache and `jax_megamoe.moe` in every layer."""

import dataclasses
import functools
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_megamoe.api import Implementation
from jax_megamoe.demo import text
from jax_megamoe.demo.model import Cache, Experts, ModelConfig, Parameters, decode_step, empty_cache


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
    Temperature 0 picks the likeliest symbol.
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

    state = (jnp.zeros((), jnp.int32), prompts, empty_cache(config, num_sequences))
    return jax.lax.while_loop(not_full, step, state)[1]


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
) -> Generation:
    """Continues every prompt by `num_tokens` symbols; compilation is not part of the time.

    Raises `ValueError` for an empty prompt and `text.TextError` for a symbol that the model does not know.
    """
    if not all(prompts):
        raise ValueError("A prompt is empty, and the model needs at least one symbol to continue.")
    encoded = [text.encode(prompt) for prompt in prompts]
    lengths = np.array([len(ids) for ids in encoded], np.int32)
    padded = np.zeros((len(prompts), lengths.max() + num_tokens), np.int32)
    for row, ids in zip(padded, encoded, strict=True):
        row[: len(ids)] = ids

    arguments = (parameters, experts, jnp.asarray(padded), jnp.asarray(lengths), jax.random.key(seed))
    compiled = decode_loop.lower(config, *arguments, temperature, implementation).compile()
    start = time.perf_counter()
    tokens = np.asarray(compiled(*arguments))
    seconds = time.perf_counter() - start
    texts = [text.decode(row[: length + num_tokens]) for row, length in zip(tokens, lengths, strict=True)]
    return Generation(texts, padded.shape[1] - 1, seconds)
