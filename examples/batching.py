"""Continuous batching: requests take slots of a decode step as they become free; slots in between are empty.

The compiled step sees arrays of one shape only: tokens and positions of all slots, -1 for the position of an empty one.
A slot's new sequence begins at position 0 and does not see what the last one left in the cache.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass
class Request:
    """A prompt of token ids, and what was generated after it."""

    prompt: list[int]
    max_new_tokens: int
    generated: list[int] = field(default_factory=list)
    logits: list[np.ndarray[Any, Any]] = field(default_factory=list)  # one for each generated token, if they are kept

    def token(self, position: int) -> int:
        """The token at a position that is known."""
        return self.prompt[position] if position < len(self.prompt) else self.generated[position - len(self.prompt)]


@functools.partial(jax.jit, static_argnums=0, donate_argnames="cache")
def greedy_step(
    decode: Callable[..., tuple[jax.Array, Any]],
    parameters: Any,
    experts: Any,
    cache: Any,
    tokens: jax.Array,
    positions: jax.Array,
) -> tuple[jax.Array, jax.Array, Any]:
    """The likeliest next tokens int32[B], logits f32[B, V] and the cache, whose old buffers are given up for it.

    `decode` is a `decode_step` with its configuration bound, the same object each time: it names the program.
    """
    logits, cache = decode(parameters, experts, cache, tokens, positions)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), logits, cache


def serve(
    step: Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array, Any]],
    cache: Any,
    requests: Iterable[Request],
    num_slots: int,
    length: int,
    *,
    end: int | None = None,
    keep_logits: bool = False,
) -> int:
    """Runs requests to their end; returns the number of steps.

    Args:
      step: `(cache, tokens int32[B], positions int32[B])` to next tokens, logits and cache: `greedy_step`, bound.
      cache: of `num_slots` slots of `length` positions; it is given up.
      requests: taken in their order. One ends after its `max_new_tokens`, with a full slot, or after the token `end`.
      keep_logits: also copies logits to the host, for comparisons.
    """
    waiting: Iterator[Request] = iter(requests)
    slots: list[Request | None] = [None] * num_slots
    positions = np.full(num_slots, -1, np.int32)
    num_steps = 0
    while True:
        for slot, request in enumerate(slots):
            if request is None and (new := next(waiting, None)) is not None:
                slots[slot], positions[slot] = new, 0
        active = [(slot, request) for slot, request in enumerate(slots) if request is not None]
        if not active:
            return num_steps
        tokens = np.zeros(num_slots, np.int32)
        for slot, request in active:
            tokens[slot] = request.token(int(positions[slot]))
        # Copies: the host changes its arrays while the device may not have read them yet.
        next_tokens, logits, cache = step(cache, jnp.array(tokens), jnp.array(positions))
        num_steps += 1
        found = np.asarray(next_tokens)
        for slot, request in active:
            positions[slot] += 1
            # Prompts go through the step token by token, too; what follows all but their last one is known.
            if positions[slot] >= len(request.prompt):
                request.generated.append(int(found[slot]))
                if keep_logits:
                    request.logits.append(np.asarray(logits[slot]))
            is_full = len(request.generated) >= request.max_new_tokens or positions[slot] >= length
            if is_full or (request.generated and request.generated[-1] == end):
                slots[slot], positions[slot] = None, -1
