"""Times decode steps with random weights of real sizes: what experts take, what the rest, and both with `ragged_dot`.

    python -m examples.bench_decode --model qwen3-30b-a3b --layers 8 --tokens 1,32,128
    python -m examples.bench_decode --model deepseek-v3 --layers 4 --output deepseek.json

One device. DeepSeek-V3 is what one of eight ranks has of it: 32 of 256 experts, 16 of 128 heads, an eighth of the
vocabulary; with 8 experts for each of its own tokens, as many pairs as reach a rank on average; exchanges are left out.
BF16 but for the experts of `moe`; `ragged_dot` multiplies the experts before they are quantised. Layers are unrolled,
so that neither copies weights: `ragged_dot` has no other way, and `moe` has the decoders' scan with `--scan`. "rest" is
the same step without experts but with the router; embedding and logits are shared out among the layers.
"""

import argparse
import dataclasses
import functools
import importlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jax_megamoe as mm
from examples import deepseek_v3, qwen3_moe
from examples.experts import FloatExperts

# Fields of config.json that give a model its sizes, but the number of layers.
_QWEN3 = {"model_type": "qwen3_moe", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "first_k_dense_replace": 0}
_DEEPSEEK = {"model_type": "deepseek_v3", "rms_norm_eps": 1e-6, "rope_theta": 1e4, "first_k_dense_replace": 0}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": _QWEN3
    | {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
    | {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936},
    "deepseek-v3": _DEEPSEEK
    | {"hidden_size": 7168, "moe_intermediate_size": 2048, "num_experts": 32, "num_experts_per_tok": 8}
    | {"num_attention_heads": 16, "q_lora_rank": 1536, "kv_lora_rank": 512, "vocab_size": 129280 // 8}
    | {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
    "tiny-qwen3": _QWEN3
    | {"hidden_size": 128, "moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2}
    | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 64},
    "tiny-deepseek": _DEEPSEEK
    | {"hidden_size": 128, "moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2}
    | {"num_attention_heads": 2, "q_lora_rank": 32, "kv_lora_rank": 32, "vocab_size": 64}
    | {"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16},
}


def random_array(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.Array:
    """Normal values that keep outputs about as large as inputs."""
    return (jax.random.normal(key, shape, jnp.float32) * shape[-1] ** -0.5).astype(dtype)


def random_experts(key: jax.Array, num_layers: int, e: int, h: int, i: int) -> tuple[Any, tuple[FloatExperts, ...]]:
    """Experts of all layers: quantised and stacked, and the BF16 values before, layer by layer."""

    @jax.jit
    def make(key: jax.Array) -> list[jax.Array]:
        shapes = ((e, i, h), (e, i, h), (e, h, i))
        return [random_array(k, shape) for k, shape in zip(jax.random.split(key, 3), shapes, strict=True)]

    @jax.jit
    def transpose(gate: jax.Array, up: jax.Array, down: jax.Array) -> FloatExperts:
        both = jnp.concatenate([gate, up], axis=1)
        return FloatExperts(jnp.swapaxes(both, 1, 2), jnp.swapaxes(down, 1, 2))

    keys = jax.random.split(key, num_layers)
    # Made twice rather than kept: one layer in three orders is much.
    quantized = mm.stack_experts((mm.quantize_experts(*make(key)) for key in keys), num_layers=num_layers)
    return quantized, tuple(transpose(*make(key)) for key in keys)


class Model:
    """A decoder with random weights, and its experts in both forms."""

    def __init__(self, fields: dict[str, Any], num_layers: int, key: jax.Array) -> None:
        self.fields = fields | {"num_hidden_layers": num_layers}
        self.module = importlib.import_module(f"examples.{fields['model_type']}")
        make = {"qwen3_moe": self._qwen3_moe, "deepseek_v3": self._deepseek_v3}[fields["model_type"]]
        keys = jax.random.split(key, 3)
        sizes = (fields["hidden_size"], fields["moe_intermediate_size"])
        self.experts, self.float_experts = random_experts(keys[0], num_layers, fields["num_experts"], *sizes)
        self.shared: Any = None
        self.float_shared: Any = None
        if fields["model_type"] == "deepseek_v3":
            self.shared, self.float_shared = random_experts(keys[1], num_layers, 1, *sizes)
        self.config, self.parameters = make(num_layers, iter(jax.random.split(keys[2], 20)))

    def variants(self) -> dict[str, tuple[Any, Any]]:
        """Parameters and experts by the name of what multiplies the experts."""
        if self.shared is None:
            return {"moe": (self.parameters, self.experts), "ragged_dot": (self.parameters, self.float_experts)}
        with_float = self.parameters._replace(shared=self.float_shared)
        return {"moe": (self.parameters, self.experts), "ragged_dot": (with_float, self.float_experts)}

    def _qwen3_moe(self, count: int, keys: Any) -> tuple[Any, Any]:
        fields = self.fields
        h, d, n, k = (fields[key] for key in ("hidden_size", "head_dim", "num_attention_heads", "num_key_value_heads"))
        layers = qwen3_moe.Layers(
            attention_norm=jnp.ones((count, h), jnp.bfloat16),
            query=random_array(next(keys), (count, n, d, h)),
            key=random_array(next(keys), (count, k, d, h)),
            value=random_array(next(keys), (count, k, d, h)),
            query_norm=jnp.ones((count, d), jnp.bfloat16),
            key_norm=jnp.ones((count, d), jnp.bfloat16),
            attention_out=random_array(next(keys), (count, h, n, d)),
            expert_norm=jnp.ones((count, h), jnp.bfloat16),
            router=random_array(next(keys), (count, fields["num_experts"], h), jnp.float32),
        )
        ends = self._ends(keys)
        config = qwen3_moe.Config.of(fields, {"top_k": fields["num_experts_per_tok"]})
        return config, qwen3_moe.Parameters(ends[0], layers, ends[1], ends[2])

    def _deepseek_v3(self, count: int, keys: Any) -> tuple[Any, Any]:
        fields = self.fields
        h, n, q, c = (fields[key] for key in ("hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank"))
        a, r, d = (fields[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        attention = deepseek_v3.Attention(
            norm=jnp.ones((count, h), jnp.bfloat16),
            query_down=random_array(next(keys), (count, q, h)),
            query_norm=jnp.ones((count, q), jnp.bfloat16),
            query_up=random_array(next(keys), (count, n, a + r, q)),
            latent_down=random_array(next(keys), (count, c + r, h)),
            latent_norm=jnp.ones((count, c), jnp.bfloat16),
            key_up=random_array(next(keys), (count, n, a, c)),
            value_up=random_array(next(keys), (count, n, d, c)),
            out=random_array(next(keys), (count, h, n, d)),
            mlp_norm=jnp.ones((count, h), jnp.bfloat16),
        )
        e = fields["num_experts"]
        router = deepseek_v3.Router(random_array(next(keys), (count, e, h), jnp.float32), jnp.zeros((count, e)))
        # The first layers, which have no experts, are left out.
        no_mlp = deepseek_v3.DenseMlp(*(jnp.zeros((0, *shape), jnp.bfloat16) for shape in ((8, h), (8, h), (h, 8))))
        no_layers = (jax.tree.map(lambda leaf: leaf[:0], attention), no_mlp)
        ends = self._ends(keys)
        options = {"top_k": fields["num_experts_per_tok"], "scoring": "sigmoid", "num_groups": 8, "top_groups": 4}
        config = deepseek_v3.Config.of(fields, options, {"routed_scaling_factor": 2.5})
        parameters = deepseek_v3.Parameters(ends[0], no_layers, (attention, router), self.shared, ends[1], ends[2])
        return config, parameters

    def _ends(self, keys: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        size = (self.fields["vocab_size"], self.fields["hidden_size"])
        norm = jnp.ones(size[1:], jnp.bfloat16)
        return random_array(next(keys), size), norm, random_array(next(keys), size)


def seconds_per_step(step: Callable[[Any], Any], state: Any, num_steps: int, repeats: int) -> float:
    """The median over repeats; a step takes the state, gives the next one, and is not waited for before the last."""
    state = jax.block_until_ready(step(state))
    measured = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(num_steps):
            state = step(state)
        jax.block_until_ready(state)
        measured.append((time.perf_counter() - start) / num_steps)
    return statistics.median(measured)


@functools.partial(jax.jit, static_argnums=0, donate_argnames="state")
def decode(model_step: Callable[..., Any], parameters: Any, experts: Any, state: Any) -> Any:
    """One step; the state is the cache, tokens int32[B] and positions int32[B], and what was likeliest.

    Tokens are others in each step, and of each slot: were they what a random model likes best, slots would fall into
    one loop, and share experts as no real batch does.
    """
    cache, tokens, positions, _ = state
    logits, cache = model_step(parameters, experts, cache, tokens, positions)
    length = jax.tree.leaves(cache)[0].shape[-2]
    return cache, (tokens + 7919) % logits.shape[1], (positions + 1) % length, jnp.argmax(logits, axis=-1)


def measure(model: Model, num_tokens: int, length: int, num_steps: int, repeats: int) -> dict[str, Any]:
    """Times of one batch size; those of experts are what a step takes less without them."""
    num_layers, vocabulary_size = model.fields["num_hidden_layers"], model.fields["vocab_size"]
    model_step = functools.partial(model.module.decode_step, model.config)
    result: dict[str, Any] = {"tokens": num_tokens}
    for name, (parameters, experts) in model.variants().items():

        def microseconds(parameters: Any, experts: Any) -> float:
            state = (
                model.module.empty_cache(model.config, num_tokens, length, jnp.bfloat16),
                jax.random.randint(jax.random.key(1), (num_tokens,), 0, vocabulary_size, jnp.int32),
                jnp.full(num_tokens, length // 2, jnp.int32),
                jnp.zeros(num_tokens, jnp.int32),
            )
            step = functools.partial(decode, model_step, parameters, experts)
            return 1e6 * seconds_per_step(step, state, num_steps, repeats)

        no_experts = None if name == "moe" else (None,) * num_layers
        no_shared = parameters if model.shared is None else parameters._replace(shared=no_experts)
        whole, rest = microseconds(parameters, experts), microseconds(no_shared, no_experts)
        result[name] = {
            "step_us": whole,
            "tokens_per_second": 1e6 * num_tokens / whole,
            "experts_us_per_layer": (whole - rest) / num_layers,
            "rest_us_per_layer": rest / num_layers,
            "experts_share": 1 - rest / whole,
        }
    return result


def main(arguments: list[str] | None = None) -> None:
    """Prints a table, a row for each number of tokens and way of multiplying experts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", default="1,8,32,128", help="batch sizes")
    parser.add_argument("--length", type=int, default=1024, help="positions of the cache, all of which are read")
    parser.add_argument("--scan", action="store_true", help="the layers of `moe` in a scan; unrolled without")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    options = parser.parse_args(arguments)
    model = Model(MODELS[options.model], options.layers, jax.random.key(0))
    model.config = dataclasses.replace(model.config, is_unrolled=not options.scan)
    device = jax.devices()[0]
    where = f"{device.device_kind}, jax {jax.__version__}"
    print(f"{options.model}, {options.layers} layers, cache of {options.length}, {where}")
    print("tokens experts by   us a step  tokens/s   experts us/layer  rest us/layer  share of experts")
    rows = []
    for num_tokens in map(int, options.tokens.split(",")):
        row = measure(model, num_tokens, options.length, options.steps, options.repeats)
        rows.append(row)
        for name in model.variants():
            step, rate, of_experts, rest, share = row[name].values()
            print(f"{num_tokens:6} {name:11}{step:10.1f}{rate:10.0f}{of_experts:19.1f}{rest:15.1f}{share:18.0%}")
    if options.output:
        settings = {"model": options.model, "layers": options.layers, "length": options.length, "scan": options.scan}
        settings |= {"device": device.device_kind, "jax": jax.__version__}
        options.output.write_text(json.dumps(settings | {"rows": rows}, indent=2))


if __name__ == "__main__":
    main()
