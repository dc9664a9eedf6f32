"""Generated values that are no good, for a kernel or its reference: results are those of the NumPy model, and nothing
crosses between tokens. tests/test_bad_values.py, tests/gpu/test_bad_values.py and those of ranks draw them.
"""

import functools
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, get_args

import jax
import numpy as np
from hypothesis import event
from hypothesis import strategies as st
from jax.sharding import Mesh

import jax_megamoe as mm
from jax_megamoe.weight_layout import Format
from tests.support import numpy_model
from tests.support.compare import bits, difference
from tests.support.hostile import judge
from tests.support.meshes import place_all

FORMATS = get_args(Format)
INT32 = np.iinfo(np.int32)
TINY = 1e-30  # below which FP32 may be subnormal on the way, which is taken for zero or not
X_VALUES = [0.0, -0.0, 1e-40, 1e-5, 1e12, np.nan, np.inf, -np.inf]
WEIGHTS = [0.0, -1.0, 1e-42, 1e10, np.nan, np.inf, -np.inf]
SCALES = [0.0, -0.0, -0.01, 1e-40, 1e-20, 1e10, np.nan, np.inf, -np.inf]
EXPONENTS = [0, 1, 90, 130, 140, 254, 255]


@functools.cache
def program(format: Format) -> Any:
    """One for each format, whatever the values are."""
    return jax.jit(functools.partial(mm.moe, return_expert_load=True))


@dataclass(frozen=True)
class Layer:
    """Sizes of a layer and a call, and how far from the model a token's result may be."""

    tokens: int
    top_k: int
    experts: int
    hidden: int
    inter: int
    tolerance: float

    @functools.cache  # noqa: B019 - layers are few, and live as long as the tests
    def natural(self, format: Format) -> numpy_model.Experts:
        """Weights as a checkpoint has them."""
        E, H, I = self.experts, self.hidden, self.inter  # noqa: E741
        random = np.random.default_rng(0)
        gate_up, down = (random.standard_normal(shape) / 8 for shape in ((E, 2 * I, H), (E, H, I)))
        if format == "mxfp4":
            codes = [random.integers(0, 256, (*a.shape[:2], a.shape[2] // 2), np.uint8) for a in (gate_up, down)]
            exponents = [
                random.integers(119, 123, (*a.shape[:2], a.shape[2] // 32)).astype(np.uint8) for a in (gate_up, down)
            ]
            return numpy_model.Experts(codes[0], exponents[0], codes[1], exponents[1])
        values = [numpy_model.round_e4m3(a * 64) for a in (gate_up, down)]
        shapes: list[tuple[int, ...]] = [(E, 2 * I // 128, H // 128), (E, H // 128, I // 128)]
        if format == "fp8_channel":
            shapes = [(E, 2 * I), (E, H)]
        scales = [random.uniform(0.01, 0.02, shape).astype(np.float32) for shape in shapes]
        return numpy_model.Experts(values[0], scales[0], values[1], scales[1])

    @functools.cache  # noqa: B019
    def packed(self, format: Format) -> mm.ExpertWeights:
        return mm.pack_experts(*self.natural(format))

    def call(self, format: Format) -> Any:
        """What is tried: a function of tokens, packed weights, ids and routing weights, which returns y and the load."""
        return program(format)

    def clean(self, seed: int) -> tuple[Any, Any, Any]:
        """Tokens, ids and routing weights of a call that is as it should be."""
        random = np.random.default_rng(seed)
        x = random.standard_normal((self.tokens, self.hidden)).astype(numpy_model.BF16)
        routes = (self.tokens, self.top_k)
        return x, random.integers(0, self.experts, routes).astype(np.int32), random.random(routes, np.float32) + 0.1

    @functools.cache  # noqa: B019
    def clean_result(self, format: Format) -> np.ndarray[Any, Any]:
        x, ids, topk_weights = self.clean(0)
        return bits(self.call(format)(x, self.packed(format), ids, topk_weights)[0])

    def assert_as_model(self, y: Any, wanted: Any, cancels: Container[int] = ()) -> None:
        """Token by token: what is no finite number where the model has such, and the numbers of those not `cancels`."""
        differences = []
        rows = zip(np.asarray(y).astype(np.float64), wanted.astype(np.float64), strict=True)
        for token, (row, model) in enumerate(rows):
            # Which of NaN and infinity it is depends on where an infinite scale meets a zero: before the sum, or after.
            np.testing.assert_array_equal(np.isfinite(row), np.isfinite(model))
            if token in cancels:
                continue
            finite = np.isfinite(model) & (np.maximum(abs(row), abs(model)) > TINY)
            differences.append(difference(row[finite], model[finite]))
        assert max(differences) < self.tolerance
        # Few of them come near that.
        assert np.mean(differences) < 1e-1 * self.tolerance

    def tokens_that_cancel(self, x: Any, experts: numpy_model.Experts, ids: Any, topk_weights: Any) -> set[int]:
        """Those whose result hangs on one sum that is small beside its terms.

        One row's scale that is far too large makes that row's sum most of the token's result. Of gate and up the order
        of summation decides then; of down an activation that FP8 rounds the other way, up to an eighth of a term.
        """
        gate_up = numpy_model.dequantize_gate_up(experts.gate_up, experts.gate_up_scale).transpose(0, 2, 1)
        down = numpy_model.dequantize_matrices(experts.down, experts.down_scale)
        values, scales = numpy_model.quantize_rows(x.astype(np.float32), 128, 1e-4, power_of_two=False)
        rows = values.astype(np.float64) * scales.repeat(128, -1)[:, : self.hidden]
        tokens = np.arange(self.tokens)

        sums, terms = rows @ gate_up, abs(rows) @ abs(gate_up)  # [E, T, 2I]
        gate, up = sums[..., : self.inter], sums[..., self.inter :]
        activations = gate / (1 + np.exp(-gate)) * up
        places = ids, tokens[:, None]  # of a token's slots
        largest = np.nan_to_num(abs(activations[places]), nan=-1.0).reshape(self.tokens, -1).argmax(-1)
        expert, column = ids[tokens, largest // self.inter], largest % self.inter
        cancels = np.zeros(self.tokens, bool)
        for part in (column, self.inter + column):
            cancels |= abs(sums[expert, tokens, part]) < 1e-3 * terms[expert, tokens, part]

        results = ((activations @ down.transpose(0, 2, 1))[places] * topk_weights[..., None]).sum(1)  # [T, H]
        column = np.nan_to_num(abs(results), nan=-1.0).argmax(-1)
        terms = activations[places] * topk_weights[..., None] * down[ids, column[:, None]]
        cancels |= abs(results[tokens, column]) < abs(terms).max((1, 2))
        return set(np.flatnonzero(cancels))

    def check_tokens(self, data: Any) -> None:
        """Bad tokens, ids and routing weights; the other tokens' bits; the next call's."""
        draw, format = data.draw, data.draw(st.sampled_from(FORMATS))
        weights, run = self.packed(format), self.call(format)
        x, ids, topk_weights = self.clean(draw(st.integers(0, 9)))
        before, _ = run(x, weights, ids, topk_weights)
        hit = set()
        for _ in range(draw(st.integers(1, 4))):
            token = draw(st.integers(0, self.tokens - 1))
            what = draw(st.sampled_from(["some", "all", "weight", "zeros"]))
            hit.add(token)
            if what == "weight":
                topk_weights[token, draw(st.integers(0, self.top_k - 1))] = draw(st.sampled_from(WEIGHTS))
            elif what == "zeros":
                x[token] = 0
            else:
                columns = slice(None) if what == "all" else draw(st.integers(0, self.hidden - 1))
                x[token, columns] = draw(st.sampled_from(X_VALUES))
        y, _ = run(x, weights, ids, topk_weights)
        untouched = [token for token in range(self.tokens) if token not in hit]
        np.testing.assert_array_equal(bits(y)[untouched], bits(before)[untouched])
        # Which experts the tokens have is another question.
        nowhere = [-1, self.experts, self.experts + 1, INT32.min, INT32.max, INT32.min + 1, -self.experts]
        for token in hit:
            ids[token, draw(st.integers(0, self.top_k - 1))] = draw(st.sampled_from(nowhere))
        function = draw(st.sampled_from([run, functools.partial(mm.reference.moe, return_expert_load=True)]))
        y, load = function(x, weights, ids, topk_weights)
        with np.errstate(all="ignore"):
            wanted, wanted_load = numpy_model.moe(x, self.natural(format), ids, topk_weights)
        event(f"nan: {np.isnan(wanted.astype(np.float32)).any()}")
        self.assert_as_model(y, wanted)
        np.testing.assert_array_equal(load, wanted_load)
        # The next correct call is right.
        x, ids, topk_weights = self.clean(0)
        np.testing.assert_array_equal(bits(run(x, weights, ids, topk_weights)[0]), self.clean_result(format))

    def check_weights(self, data: Any) -> None:
        """Bad numbers and scales of weights: refused where they are packed, or as the model has them."""
        draw, format = data.draw, data.draw(st.sampled_from(FORMATS))
        experts = numpy_model.Experts(*(array.copy() for array in self.natural(format)))
        right = True
        for _ in range(draw(st.integers(1, 3))):
            name = draw(st.sampled_from(["gate_up", "gate_up_scale", "down", "down_scale"]))
            array = getattr(experts, name)
            index = tuple(draw(st.integers(0, size - 1)) for size in array.shape)
            if name.endswith("scale"):
                value: Any = draw(st.sampled_from(EXPONENTS if format == "mxfp4" else SCALES))
                array[index] = value
            else:
                array.view(np.uint8)[index] = draw(st.integers(0, 255))  # NaN of FP8 among them
        if format == "mxfp4":
            rows = [(s.astype(int), v.reshape(*s.shape, -1)) for v, s in (experts[:2], experts[2:])]
            for exponents, codes in rows:
                used = (codes & 0x77).any(-1)  # a group of zeros counts for nothing
                low = np.where(used, exponents, 999).min(-1)
                spread = np.where(used, exponents, -999).max(-1) - low
                right &= not (exponents == 255).any() and bool((spread <= 26).all())
        event("right" if right else "wrong")
        weights = judge(lambda: mm.pack_experts(*experts), right)
        if weights is None:
            return
        for array, back in zip(experts, weights.unpack(), strict=True):
            np.testing.assert_array_equal(np.asarray(back).view(np.uint8), array.view(np.uint8))
        x, ids, topk_weights = self.clean(1)
        y, _ = self.call(format)(x, weights, ids, topk_weights)
        with np.errstate(all="ignore"):
            wanted, _ = numpy_model.moe(x, experts, ids, topk_weights)
            cancels = self.tokens_that_cancel(x, experts, ids, topk_weights)
        self.assert_as_model(y, wanted, cancels)


@dataclass(frozen=True)
class LayerOfRanks(Layer):
    """The same with tokens and experts over the devices of a mesh."""

    mesh: Mesh

    def call(self, format: Format) -> Any:
        return lambda *arguments: program(format)(*place_all(self.mesh, arguments))
