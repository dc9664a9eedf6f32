"""The activation of an expert: what becomes of the gate's and the up projection's results. Known while tracing."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_megamoe.arrays import as_float, text_of
from jax_megamoe.errors import ArgumentError


@dataclasses.dataclass(frozen=True)
class SwiGLU:
    """gate * sigmoid(alpha * gate) * (up + up_offset), after `activation_clamp` where there is one.

    The defaults are silu(gate) * up. `SwiGLU(alpha=1.702, up_offset=1.0)` with `activation_clamp=7.0` is what gpt-oss
    and MiniMax-M3 compute (openai/gpt-oss, `gpt_oss/torch`), the former of gate and up with the biases of its weights.
    """

    alpha: float = 1.0
    up_offset: float = 0.0


@dataclasses.dataclass(frozen=True)
class SiTU:
    """Sigmoid tanh unit: beta * tanh(gate / beta) * sigmoid(gate) * linear_beta * tanh(up / linear_beta).

    Kimi-K3 has a beta of 4 and a linear_beta of 25 (`SituAndMul` in the model's own code; sgl-project/DeepGEMM#67).
    """

    beta: float
    linear_beta: float


class Activation(NamedTuple):
    """Either of them as numbers, as the kernel takes them."""

    clamp: float = math.inf
    alpha: float = 1.0
    up_offset: float = 0.0
    beta: float = 0.0  # 0: SwiGLU
    linear_beta: float = 0.0

    def apply(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        """FP32 arrays of one shape -> their activation."""
        if self.beta:
            bounded = self.beta * jnp.tanh(gate / self.beta), self.linear_beta * jnp.tanh(up / self.linear_beta)
            return bounded[0] / (1.0 + jnp.exp(-gate)) * bounded[1]
        gate, up = jnp.minimum(gate, self.clamp), jnp.clip(up, -self.clamp, self.clamp)
        if self.up_offset:
            up = up + self.up_offset
        return gate / (1.0 + jnp.exp(-self.alpha * gate)) * up


SILU = Activation()
# Beyond them, FP32 quotients overflow or vanish.
_MIN_BETA, _MAX_BETA = 1e-30, 1e30


def can_bound(*betas: float) -> bool:
    """Whether SiTU can be computed with these."""
    return all(_MIN_BETA <= beta <= _MAX_BETA for beta in betas)


def as_numbers(activation: object, clamp: float) -> Activation:
    """The argument `activation` of `moe` and the checked clamp, infinite for none. Raises `ArgumentError`."""
    match activation:
        case None:
            return Activation(clamp)
        case SwiGLU(alpha, up_offset):
            return Activation(clamp, *_finite(alpha=alpha, up_offset=up_offset))
        case SiTU(beta, linear_beta):
            numbers = _finite(beta=beta, linear_beta=linear_beta)
            if not can_bound(*numbers):
                raise ArgumentError(
                    f"activation is {text_of(activation)}, wanted numbers from {_MIN_BETA:g} to {_MAX_BETA:g}: "
                    "pass those of the model."
                )
            if clamp != math.inf:
                raise ArgumentError(
                    f"activation_clamp is {clamp} beside SiTU, which has bounds of its own, wanted None: leave it out."
                )
            return Activation(clamp, beta=numbers[0], linear_beta=numbers[1])
    raise ArgumentError(
        f"activation is {text_of(activation)}, wanted SwiGLU(...), SiTU(...) or None: pass one of these."
    )


def _finite(**numbers: object) -> tuple[float, ...]:
    values = {name: as_float(value) for name, value in numbers.items()}
    for name, value in values.items():
        if not math.isfinite(value):
            raise ArgumentError(
                f"{name} of the activation is {text_of(numbers[name])}, "
                "wanted a finite FP32 number known while tracing: "
                "pass a number of Python or NumPy."
            )
    return tuple(values.values())
