"""The command line that both decoders share: a folder, prompts of token ids, a mesh."""

import argparse
import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from examples.batching import Request, greedy_step, serve
from examples.meshes import make_mesh


def main(
    description: str | None,
    load: Callable[..., tuple[Any, Any, Any]],
    empty_cache: Callable[..., Any],
    decode_step: Callable[..., tuple[jax.Array, Any]],
) -> None:
    """Loads a model, continues the prompts, and prints token ids and tokens per second."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="checkpoint as huggingface_hub downloads it")
    parser.add_argument("--experts", help="what `python -m jax_megamoe convert` made of it; packed here without")
    parser.add_argument("--prompt", action="append", type=_ids, required=True, help="token ids, 1,2,3; any number")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--slots", type=int, default=8, help="sequences that are decoded together")
    parser.add_argument("--length", type=int, default=256, help="positions of a slot")
    parser.add_argument("--mesh", type=_sizes, help="data x tensor, as 2x4; one device without")
    parser.add_argument("--unroll", action="store_true", help="layers not in a scan: slower to compile, faster to run")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    arguments = parser.parse_args()

    try:
        mesh = make_mesh(*arguments.mesh) if arguments.mesh else None
        _check_numbers(arguments)
        dtype = jnp.dtype(arguments.dtype)
        config, parameters, experts = load(arguments.folder, experts_folder=arguments.experts, mesh=mesh, dtype=dtype)
        config = dataclasses.replace(config, is_unrolled=arguments.unroll)
        cache = empty_cache(config, arguments.slots, arguments.length, dtype, mesh)
        _check_prompts(arguments.prompt, len(parameters.embedding), arguments.length)
    except (ValueError, OSError) as error:  # whatever the package refuses is a ValueError, too
        parser.error(str(error))
    requests = [Request(prompt, arguments.new_tokens) for prompt in arguments.prompt]
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        step = functools.partial(greedy_step, functools.partial(decode_step, config), parameters, experts)
        start = time.perf_counter()
        num_steps = serve(step, cache, requests, arguments.slots, arguments.length)
        seconds = time.perf_counter() - start
    for request in requests:
        print(",".join(map(str, request.prompt)), "->", ",".join(map(str, request.generated)))
        if len(request.generated) < arguments.new_tokens:
            print(f"... and no more: a slot has --length {arguments.length} positions", file=sys.stderr)
    generated = sum(len(request.generated) for request in requests)
    print(f"{num_steps} steps, {generated} tokens, {generated / seconds:.1f} a second, compiling included")


def _check_numbers(arguments: argparse.Namespace) -> None:
    for name in ("new_tokens", "slots", "length"):
        if (number := getattr(arguments, name)) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {number}, wanted 1 or more.")
    data = arguments.mesh[0] if arguments.mesh else 1
    if arguments.slots % data:
        raise ValueError(f"--slots is {arguments.slots}, wanted a multiple of {data}, the mesh's data: pass another.")


def _check_prompts(prompts: Sequence[Sequence[int]], vocabulary: int, length: int) -> None:
    """Gathers clamp: a token that the embedding lacks would be another one."""
    for prompt in prompts:
        if not all(0 <= token < vocabulary for token in prompt):
            raise ValueError(f"--prompt has ids {list(prompt)}, wanted ids of the vocabulary, 0 to {vocabulary - 1}.")
        if len(prompt) > length:
            raise ValueError(f"--prompt has {len(prompt)} ids, wanted at most --length {length}: pass a larger one.")


def _ids(text: str) -> list[int]:
    try:
        return [int(token) for token in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, wanted token ids, as 1,2,3: use the model's tokenizer") from None


def _sizes(text: str) -> tuple[int, int]:
    try:
        data, tensor = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, wanted data x tensor, as 2x4") from None
    if min(data, tensor) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, wanted positive numbers, as 2x4")
    return data, tensor
