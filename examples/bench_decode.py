"""Times decode steps with random weights of real sizes: what experts take, what the rest, and both with `ragged_dot`.

    python -m examples.bench_decode --model qwen3-30b-a3b --layers all --tokens 1,32,128
    python -m examples.bench_decode --model deepseek-v4-flash --output flash.json

One device. DeepSeek's models are what one of eight ranks has of them (`random_models.py`): 32 of 256 experts, an
eighth of the heads and of the vocabulary. All experts that the model has for a token, 8 or 6, are among the 32, so
that there are as many pairs as reach a rank on average; exchanges are left out. BF16 but for the experts of `moe`,
which are FP8, or, of DeepSeek-V4, MXFP4 ("moe") and FP8 ("moe_fp8"); `ragged_dot` multiplies the experts before they
are quantised. Layers are unrolled, so that neither copies weights: `ragged_dot` has no other way, and `moe` has the
decoders' scan with `--scan`. "rest" is the same step without experts but with the router;
embedding and logits are shared out among the layers. Times are medians of the repeats; "+-" is how far repeats are
apart, of both steps together: experts that take less than that have not been measured.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from examples.random_models import MODELS, Model, make, ways_of


class Measured(NamedTuple):
    """What a step takes, in microseconds: the median of the repeats, and the most less the least of them."""

    median: float
    spread: float


def time_steps(step: Callable[[Any], Any], state: Any, num_steps: int, repeats: int) -> Measured:
    """A step takes the state, gives the next one, and is not waited for before the last."""
    state = jax.block_until_ready(step(state))
    measured = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(num_steps):
            state = step(state)
        jax.block_until_ready(state)
        measured.append(1e6 * (time.perf_counter() - start) / num_steps)
    return Measured(statistics.median(measured), max(measured) - min(measured))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames="state")
def decode(model_step: Callable[..., Any], length: int, parameters: Any, experts: Any, state: Any) -> Any:
    """One step; the state is the cache of `length`, tokens int32[B] and positions int32[B], and what was likeliest.

    Tokens are others in each step, and of each slot: were they what a random model likes best, slots would fall into
    one loop, and share experts as no real batch does.
    """
    cache, tokens, positions, _ = state
    logits, cache = model_step(parameters, experts, cache, tokens, positions)
    return cache, (tokens + 7919) % logits.shape[1], (positions + 1) % length, jnp.argmax(logits, axis=-1)


def measure(model: Model, num_tokens: int, length: int, num_steps: int, repeats: int) -> dict[str, Any]:
    """Times of one batch size; those of experts are what a step takes less without them."""
    num_layers = model.num_layers
    model_step = functools.partial(model.module.decode_step, model.config)
    result: dict[str, Any] = {"tokens": num_tokens}
    for name, (parameters, experts) in model.ways.items():

        def timed(parameters: Any, experts: Any) -> Measured:
            state = (
                model.module.empty_cache(model.config, num_tokens, length, jnp.bfloat16),
                jax.random.randint(jax.random.key(1), (num_tokens,), 0, model.vocabulary_size, jnp.int32),
                jnp.full(num_tokens, length // 2, jnp.int32),
                jnp.zeros(num_tokens, jnp.int32),
            )
            step = functools.partial(decode, model_step, length, parameters, experts)
            return time_steps(step, state, num_steps, repeats)

        no_experts = (None,) * num_layers if name == "ragged_dot" else None
        no_shared = parameters._replace(shared=no_experts) if "shared" in parameters._fields else parameters
        whole, rest = timed(parameters, experts), timed(no_shared, no_experts)
        result[name] = {
            "step_us": whole.median,
            "tokens_per_second": 1e6 * num_tokens / whole.median,
            "experts_us_per_layer": (whole.median - rest.median) / num_layers,
            "spread_us_per_layer": (whole.spread + rest.spread) / num_layers,
            "rest_us_per_layer": rest.median / num_layers,
            "experts_share": 1 - rest.median / whole.median,
        }
    return result


def main(arguments: list[str] | None = None) -> None:
    """Prints a table, a row for each number of tokens and way of multiplying experts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="qwen3-30b-a3b")
    parser.add_argument(
        "--layers",
        default="4",
        help="a number, or all, of those with experts that a router chooses; an H200 has room for all 48 of"
        " qwen3-30b-a3b, all 40 of deepseek-v4-flash, and 28 of deepseek-v3 (all 58 with --ways moe)",
    )
    parser.add_argument("--ways", help="what multiplies experts: some of moe, moe_fp8 and ragged_dot; all without")
    parser.add_argument("--tokens", default="1,8,32,128", help="batch sizes")
    parser.add_argument("--length", type=int, default=1024, help="positions of the cache, all of which are read")
    parser.add_argument("--scan", action="store_true", help="the layers of `moe` in a scan; unrolled without")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    options = parser.parse_args(arguments)
    if options.repeats < 2:
        parser.error(f"--repeats {options.repeats}: wanted two or more, whose spread says what was measured")
    fields, ways = MODELS[options.model], ways_of(options.model)
    if options.layers != "all" and not options.layers.isdecimal():
        parser.error(f"--layers {options.layers}: wanted a number, or all")
    num_layers = fields["num_hidden_layers"] if options.layers == "all" else int(options.layers)
    if not 1 <= num_layers <= fields["num_hidden_layers"]:
        parser.error(f"--layers {num_layers}: {options.model} has {fields['num_hidden_layers']}")
    if options.ways:
        if unknown := set(options.ways.split(",")) - set(ways):
            parser.error(f"--ways {','.join(sorted(unknown))}: {options.model} has {','.join(ways)}")
        ways = options.ways.split(",")
    model = make(options.model, num_layers, ways, jax.random.key(0))
    config = dataclasses.replace(model.config, is_unrolled=not options.scan)
    model = dataclasses.replace(model, config=config)
    device = jax.devices()[0]
    where = f"{device.device_kind}, jax {jax.__version__}"
    print(f"{options.model}, {num_layers} layers, cache of {options.length}, {where}")
    print("tokens experts by   us a step  tokens/s   experts us/layer      +-  rest us/layer  share of experts")
    rows = []
    for num_tokens in map(int, options.tokens.split(",")):
        row = measure(model, num_tokens, options.length, options.steps, options.repeats)
        rows.append(row)
        for name in ways:
            step, rate, of_experts, spread, rest, share = row[name].values()
            text = f"{num_tokens:6} {name:11}{step:10.1f}{rate:10.0f}{of_experts:19.1f}{spread:8.1f}"
            print(f"{text}{rest:15.1f}{share:18.0%}")
    if options.output:
        settings = {"model": options.model, "layers": num_layers, "length": options.length, "scan": options.scan}
        settings |= {"device": device.device_kind, "jax": jax.__version__}
        options.output.write_text(json.dumps(settings | {"rows": rows}, indent=2))


if __name__ == "__main__":
    main()
