"""What a soak draws: layers of random shapes, routings, formats and options, each by a seed and a number."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Device
from jax.sharding import Mesh

import jax_megamoe as mm
from jax_megamoe.weight_layout import Format
from tests.support import chain as chains
from tests.support.cases import ODD_ROUTINGS
from tests.support.compare import bits, difference
from tests.support.hlo import is_fused
from tests.support.meshes import place_all
from tests.support.problems import Problem, Sizes, make_inputs, make_weights

# Kernel against reference, as docs/numerics.md says, of results of many slots. In a token of few, one activation that
# rounds the other way can be a large part of the sum; a slot that is lost or another expert's comes to far more.
TOLERANCE, TOKEN_TOLERANCE = 1e-4, 5e-3
MANY_SLOTS = 256
# Few, since weights stay: hidden and intermediate sizes, some of them no multiples of 128; experts of a rank; top_k.
LAYERS = [
    (128, 128, 4, 2),
    (512, 384, 8, 4),
    (1024, 512, 8, 6),
    (2048, 768, 16, 8),
    (2880, 352, 4, 1),
    (4096, 256, 4, 3),
]
MOST_NUMBERS = 1 << 22  # of x


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer, its tokens, and how it is called."""

    seed: int
    number: int
    sizes: Sizes  # of all ranks
    tokens: int  # of all ranks
    routing: str
    format: Format
    ranks: int
    calls: int  # in a program, each of which needs the one before
    is_captured: bool
    clamp: float | None
    factor: float

    @classmethod
    def draw(cls, seed: int, number: int, most_ranks: int, most_tokens: int) -> "Case":
        random = np.random.default_rng([seed, number])
        ranks = int(random.choice([1, most_ranks]))
        layers = LAYERS if most_tokens > 256 else LAYERS[:1]
        hidden, inter, experts, top_k = layers[random.integers(len(layers))]
        tokens = int(min(np.exp(random.uniform(0, np.log(most_tokens))), MOST_NUMBERS / hidden))
        return cls(
            seed,
            number,
            Sizes(hidden, inter, experts * ranks, top_k),
            max(1, tokens // ranks) * ranks,  # meshes divide them
            str(random.choice(["uniform", "uniform", "uniform", *ODD_ROUTINGS])),
            random.choice(get_args(Format)),
            ranks,
            int(random.integers(1, 4)),
            bool(random.integers(2)),
            [None, 6.0][random.integers(2)],
            [1.0, 2.5][random.integers(2)],
        )

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of `moe`."""
        return {"activation_clamp": self.clamp, "routed_scaling_factor": self.factor}

    def make(self) -> Problem:
        weights = make_weights(self.sizes, 0, self.format)
        x, ids, topk_weights = make_inputs(self.tokens, self.sizes, self.routing, self.number)
        return Problem(x, weights, ids, topk_weights)


class Program:
    """A case, compiled, and the bits that every run of it has to give."""

    def __init__(self, case: Case, place: Mesh | Device, dispatch: Callable[[Case], Any]) -> None:
        """`dispatch(case)` is a context in which programs of that case may be started."""
        self.case, self._dispatch = case, dispatch
        problem = case.make()
        of_group = isinstance(place, Mesh)
        self._arguments = place_all(place, problem) if of_group else jax.device_put(tuple(problem), place)
        on_gpu = jax.default_backend() == "gpu"
        options = (chains.CAPTURED if case.is_captured else chains.NOT_CAPTURED) if on_gpu else None
        function = chains.chain(case.calls, functools.partial(mm.moe, **case.options))
        self._compiled = jax.jit(function, compiler_options=options).lower(*self._arguments).compile()
        self.is_fused = of_group and is_fused(self._compiled)
        self.wanted = self.run()
        self.wrong = self._against_reference(problem)

    def run(self) -> np.ndarray[Any, Any]:
        """The bits of all calls' results."""
        with self._dispatch(self.case):
            ys = self._compiled(*self._arguments)
        return bits(ys)

    def _against_reference(self, problem: Problem) -> str:
        """Each call against the reference of what it was given, and what is wrong with it, if anything is."""
        reference = jax.jit(functools.partial(mm.reference.moe, **self.case.options))
        x = problem.x
        for call, found in enumerate(self.wanted.view(jnp.bfloat16)):
            y = np.asarray(reference(x, *problem[1:]))
            worst, all_of_it = max(map(difference, found, y)), difference(found, y)
            bound = TOLERANCE if self.case.tokens * self.case.sizes.top_k >= MANY_SLOTS else TOKEN_TOLERANCE
            if not (all_of_it < bound and worst < TOKEN_TOLERANCE):  # NaN is less than nothing
                return f"call {call} is {all_of_it:.1e} from the reference, a token of it {worst:.1e}"
            # As the chain goes on, from what the program itself has found.
            x = jnp.where(jnp.asarray(found) > 0, x, -x)
        return ""
