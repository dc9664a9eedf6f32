"""The decoders of `examples` on tiny checkpoints, and what `transformers` computes of these."""

import dataclasses
import functools
import importlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from examples import experts as expert_layer
from examples.batching import Request, greedy_step, serve
from examples.expectations import tiny

FAMILIES = list(tiny.MODELS)
LENGTH = 40  # positions of a slot: more than the longest case has
Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class Expected:
    """The cases of a family's committed file."""

    checkpoint_sha256: str
    cases: list[dict[str, Any]]

    @staticmethod
    def of(family: str) -> "Expected":
        path = Path(tiny.__file__).with_name(f"{family}.json")
        fields = json.loads(path.read_text())
        return Expected(fields["checkpoint_sha256"], fields["cases"])

    @property
    def margins(self) -> Array:
        return np.concatenate([case["margins"] for case in self.cases])

    @property
    def tokens(self) -> Array:
        return np.concatenate([case["tokens"] for case in self.cases])

    def requests(self) -> list[Request]:
        return [Request(case["prompt"], len(case["tokens"])) for case in self.cases]


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A loaded model of a family, with experts that are quantised or not."""

    module: Any
    config: Any
    parameters: Any
    experts: Any
    decode: Any  # decode_step with its configuration, the same object for all that share programs
    mesh: Any = None

    @staticmethod
    def load(family: str, folder: Path, **options: Any) -> "Decoder":
        module = importlib.import_module(f"examples.{family}")
        config, parameters, experts = module.load(folder, dtype=jnp.float32, **options)
        decode = functools.partial(module.decode_step, config)
        return Decoder(module, config, parameters, experts, decode, options.get("mesh"))

    def unrolled(self) -> "Decoder":
        """Without a scan, and with a cache for each layer."""
        config = dataclasses.replace(self.config, is_unrolled=True)
        decode = functools.partial(self.module.decode_step, config)
        return dataclasses.replace(self, config=config, decode=decode)

    def in_float(self) -> "Decoder":
        """The same weights, and nothing rounded to FP8 or BF16 on its way through the experts; unrolled, as these are."""
        parameters = self.parameters
        if hasattr(parameters, "shared"):
            parameters = parameters._replace(shared=expert_layer.dequantize(parameters.shared))
        experts = expert_layer.dequantize(self.experts)
        return dataclasses.replace(self.unrolled(), parameters=parameters, experts=experts)

    def empty_cache(self, num_slots: int) -> Any:
        return self.module.empty_cache(self.config, num_slots, LENGTH, jnp.float32, self.mesh)

    def step(self, cache: Any, tokens: Any, positions: Any) -> Any:
        return greedy_step(self.decode, self.parameters, self.experts, cache, tokens, positions)

    def serve(self, requests: list[Request], num_slots: int) -> list[Request]:
        serve(self.step, self.empty_cache(num_slots), requests, num_slots, LENGTH, keep_logits=True)
        return requests

    def forced_logits(self, expected: Expected, num_slots: int) -> list[Array]:
        """f32[tokens, V] of each case: the logits at each of them, where those before are the expected ones."""
        found = []
        for start in range(0, len(expected.cases), num_slots):
            cases = expected.cases[start : start + num_slots]
            sequences = [case["prompt"] + case["tokens"][:-1] for case in cases]
            steps = self._logits_of(sequences, num_slots)
            for slot, (case, sequence) in enumerate(zip(cases, sequences, strict=True)):
                found.append(np.stack([step[slot] for step in steps[len(case["prompt"]) - 1 : len(sequence)]]))
        return found

    def _logits_of(self, sequences: list[list[int]], num_slots: int) -> list[Array]:
        """f32[B, V] after each position, of sequences that begin together; slots behind their ends are empty."""
        cache, steps = self.empty_cache(num_slots), []
        for position in range(max(map(len, sequences))):
            tokens, positions = np.zeros(num_slots, np.int32), np.full(num_slots, -1, np.int32)
            for slot, sequence in enumerate(sequences):
                if position < len(sequence):
                    tokens[slot], positions[slot] = sequence[position], position
            _, logits, cache = self.step(cache, jnp.array(tokens), jnp.array(positions))
            steps.append(np.asarray(logits))
        return steps


def buffers(tree: Any) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
