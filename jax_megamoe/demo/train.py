"""Training in float32 with Adam, against a budget of seconds or steps, and the measure: bits per character."""

import dataclasses
import functools
import math
import sys
import time
from typing import NamedTuple, TextIO

import jax
import jax.numpy as jnp
import numpy as np

from jax_megamoe.demo.model import Experts, ModelConfig, Parameters, Routing, forward, initialize
from jax_megamoe.options import Implementation


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Budget and recipe of the training; it ends with whichever of `seconds` and `steps` is used up first."""

    seconds: float | None = 90.0
    steps: int | None = None
    num_sequences: int = 4
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    capacity_factor: float = 1.25
    balance_weight: float = 0.01
    seed: int = 0


class AdamState(NamedTuple):
    """Running means of the gradient and of its square, and the number of steps in them."""

    mean: Parameters
    square: Parameters
    step: jax.Array


def adam_init(parameters: Parameters) -> AdamState:
    """The state before the first step."""
    # Two trees of zeros, not one twice: `train_step` donates both.
    mean, square = (jax.tree.map(jnp.zeros_like, parameters) for _ in range(2))
    return AdamState(mean, square, jnp.zeros((), jnp.int32))


def adam_update(
    parameters: Parameters,
    gradient: Parameters,
    state: AdamState,
    learning_rate: jax.Array,
    *,
    decays: tuple[float, float] = (0.9, 0.98),
    max_norm: float = 1.0,
) -> tuple[Parameters, AdamState]:
    """One step of Adam on a gradient clipped to the global norm `max_norm`."""
    norm = jnp.sqrt(sum(jnp.sum(leaf * leaf) for leaf in jax.tree.leaves(gradient)))
    gradient = jax.tree.map(lambda leaf: leaf * jnp.minimum(1.0, max_norm / (norm + 1e-9)), gradient)
    step = state.step + 1
    mean = jax.tree.map(lambda m, g: decays[0] * m + (1 - decays[0]) * g, state.mean, gradient)
    square = jax.tree.map(lambda s, g: decays[1] * s + (1 - decays[1]) * g * g, state.square, gradient)
    # Both means start at zero and are divided by the weight they have gathered so far.
    mean_weight, square_weight = (1 - decay**step for decay in decays)
    parameters = jax.tree.map(
        lambda p, m, s: p - learning_rate * (m / mean_weight) / (jnp.sqrt(s / square_weight) + 1e-8),
        parameters,
        mean,
        square,
    )
    return parameters, AdamState(mean, square, step)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean surprise in nats of targets int32[...] under logits f32[..., V]."""
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1))


def balance_loss(routing: Routing) -> jax.Array:
    """1 where every expert is chosen equally often, more where the choices gather on a few; mean over layers.

    Per layer: E * sum over experts of (share of the choices, a constant to the gradient) * (mean score).
    """
    num_experts = routing.scores.shape[-1]
    chosen = jax.nn.one_hot(routing.ids, num_experts)
    share = jnp.mean(chosen, axis=tuple(range(1, chosen.ndim - 1)))
    score = jnp.mean(routing.scores, axis=tuple(range(1, routing.scores.ndim - 1)))
    return num_experts * jnp.mean(jnp.sum(share * score, axis=-1))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def train_step(
    config: ModelConfig,
    recipe: TrainConfig,
    parameters: Parameters,
    state: AdamState,
    tokens: jax.Array,
    learning_rate: jax.Array,
) -> tuple[Parameters, AdamState, jax.Array]:
    """One step on tokens int32[B, context + 1]; also the cross entropy in nats before it."""

    def loss(parameters: Parameters) -> tuple[jax.Array, jax.Array]:
        logits, routing = forward(
            config, parameters, parameters.experts, tokens[:, :-1], capacity_factor=recipe.capacity_factor
        )
        surprise = cross_entropy(logits, tokens[:, 1:])
        return surprise + recipe.balance_weight * balance_loss(routing), surprise

    gradient, surprise = jax.grad(loss, has_aux=True)(parameters)
    parameters, state = adam_update(parameters, gradient, state, learning_rate)
    return parameters, state, surprise


class Progress:
    """Says on a stream how far the training is: by a bar on a terminal, elsewhere by a line for every tenth."""

    _BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"

    def __init__(self, stream: TextIO) -> None:
        """Reports to `stream`."""
        self._stream, self._tenths, self._bar = stream, 0, None
        if stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=1.0, desc="training", file=stream, bar_format=self._BAR)

    def show(self, fraction: float, step: int, bits: float) -> None:
        """Reports `fraction` of the budget used, after `step` steps at `bits` per character."""
        fraction = min(fraction, 1.0)
        state = f"step {step}, {bits:.3f} bits/char"
        if self._bar is not None:
            self._bar.set_postfix_str(state, refresh=False)
            self._bar.update(fraction - self._bar.n)
        elif (tenths := int(10 * fraction)) != self._tenths:
            self._tenths = tenths
            print(f"training {fraction:4.0%}, {state}", file=self._stream, flush=True)

    def close(self) -> None:
        """Ends the line."""
        if self._bar is not None:
            self._bar.close()


def train(
    config: ModelConfig, recipe: TrainConfig, text: np.ndarray, progress_stream: TextIO | None = None
) -> tuple[Parameters, int]:
    """Trains on text int32[N] until the budget is used up; the parameters and the number of steps taken.

    Raises `ValueError` for a recipe without any budget and for a text shorter than one sequence.
    """
    if recipe.seconds is None and recipe.steps is None:
        raise ValueError("The training recipe has neither seconds nor steps: give at least one of them.")
    if len(text) <= config.context + 1:
        raise ValueError(f"The text has {len(text)} symbols, and training needs more than {config.context + 1}.")
    parameters = initialize(config, jax.random.key(recipe.seed))
    state = adam_init(parameters)
    generator = np.random.default_rng(recipe.seed)
    window = np.arange(config.context + 1)
    progress = Progress(progress_stream or sys.stderr)

    start = time.monotonic()
    step, smoothed, fraction = 0, math.log2(config.vocabulary_size), 0.0
    while fraction < 1.0:
        offsets = generator.integers(len(text) - config.context, size=(recipe.num_sequences, 1))
        warmup = min(1.0, (step + 1) / recipe.warmup_steps)
        learning_rate = recipe.learning_rate * warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * fraction)))
        parameters, state, surprise = train_step(
            config, recipe, parameters, state, jnp.asarray(text[offsets + window]), jnp.float32(learning_rate)
        )
        smoothed += 0.05 * (float(surprise) / math.log(2) - smoothed)
        step += 1
        elapsed = time.monotonic() - start
        fraction = max(
            elapsed / recipe.seconds if recipe.seconds is not None else 0.0,
            step / recipe.steps if recipe.steps is not None else 0.0,
        )
        progress.show(fraction, step, smoothed)
    progress.close()
    return parameters, step


@functools.partial(jax.jit, static_argnums=(0, 4))
def _surprise(
    config: ModelConfig,
    parameters: Parameters,
    experts: Experts,
    tokens: jax.Array,
    implementation: Implementation | None,
) -> jax.Array:
    logits, _ = forward(config, parameters, experts, tokens[:, :-1], implementation=implementation)
    return cross_entropy(logits, tokens[:, 1:])


def bits_per_character(
    config: ModelConfig,
    parameters: Parameters,
    experts: Experts,
    text: np.ndarray,
    *,
    implementation: Implementation | None = None,
    num_sequences: int = 16,
    max_batches: int | None = None,
) -> float:
    """Mean surprise in bits over text int32[N], in windows of `context` symbols that do not overlap.

    `num_sequences` windows make a batch, and the last symbols that fill none are left out. `implementation` is that of
    `jax_megamoe.moe`; `max_batches` shortens the measurement. Raises `ValueError` where no batch fits.
    """
    window = config.context + 1
    batches = len(text) // (window * num_sequences)
    if batches == 0:
        raise ValueError(
            f"The text has {len(text)} symbols, and measuring needs at least {window * num_sequences} "
            f"({num_sequences} windows of {window})."
        )
    tokens = text[: batches * num_sequences * window].reshape(batches, num_sequences, window)[:max_batches]
    nats = [float(_surprise(config, parameters, experts, jnp.asarray(batch), implementation)) for batch in tokens]
    return float(np.mean(nats)) / math.log(2)
