"""The command line: train or load the model, measure float and quantised experts, continue a prompt."""

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import jax
from jax.sharding import Mesh

from jax_megamoe.demo import checkpoint as checkpoints
from jax_megamoe.demo import mesh as meshes
from jax_megamoe.demo import text
from jax_megamoe.demo.checkpoint import Checkpoint, CheckpointError
from jax_megamoe.demo.decode import generate
from jax_megamoe.demo.model import ModelConfig, Parameters, initialize, quantize
from jax_megamoe.demo.train import TrainConfig, bits_per_character, train
from jax_megamoe.errors import MegaMoEError
from jax_megamoe.options import Implementation
from jax_megamoe.weight_layout import Format

_DEFAULT_SECONDS = 90.0
_COMPARED: tuple[Format, ...] = ("fp8_block", "mxfp4")  # beside the float experts, whichever format decodes
_DEFAULT_PROMPT = 'The "with" statement is '


def _positive_int(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {value}, wanted 1 or more")
    return number


def _positive_float(value: str) -> float:
    number = float(value)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"got {value}, wanted a number above 0")
    return number


def _temperature(value: str) -> float:
    number = float(value)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"got {value}, wanted 0 (always the likeliest symbol) or more")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jax_megamoe.demo", description=__doc__)
    parser.add_argument("--prompt", action="append", help="text to continue; may be given several times")
    parser.add_argument("--tokens", type=_positive_int, default=400, help="symbols to add (default %(default)s)")
    parser.add_argument("--temperature", type=_temperature, default=0.5, help="0 is greedy (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of training and of sampling (default %(default)s)")
    parser.add_argument("--batch", type=_positive_int, help="texts decoded together; prompts are repeated to fill it")
    parser.add_argument(
        "--train-seconds",
        type=_positive_float,
        help=f"training budget (default {_DEFAULT_SECONDS:.0f}, or none where --steps is given)",
    )
    parser.add_argument("--steps", type=_positive_int, help="training budget in steps")
    parser.add_argument(
        "--checkpoint", type=Path, help="file of the trained model (default: demo.npz in the user's cache directory)"
    )
    parser.add_argument("--retrain", action="store_true", help="train even if a checkpoint exists, and replace it")
    parser.add_argument(
        "--devices",
        type=_positive_int,
        default=1,
        help="decode on so many: attention's heads and the experts are split (default %(default)s)",
    )
    parser.add_argument(
        "--format",
        choices=get_args(Format),
        default="fp8_block",
        help="how the experts that decode are quantised (default %(default)s); it is measured on the held-out text "
        f"beside float experts, {' and '.join(_COMPARED)}",
    )
    parser.add_argument("--implementation", choices=get_args(Implementation), help="passed to jax_megamoe.moe")
    return parser


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _load(arguments: argparse.Namespace, path: Path, config: ModelConfig, corpus: text.Corpus) -> Checkpoint | None:
    """The saved model, or None where one has to be trained; `CheckpointError` where the user's own file is unusable."""
    if arguments.retrain:
        return None
    try:
        return checkpoints.load(path, config, corpus)
    except FileNotFoundError:
        return None
    except CheckpointError as error:
        # Training ends with writing the file: what lies in the cache is ours to replace, a file somebody named is not.
        if arguments.checkpoint is not None:
            raise CheckpointError(f"{error} Name another file, or replace this one with --retrain.") from error
        _say(f"{error} Training again.")
        return None


def _try_moe(config: ModelConfig, corpus: text.Corpus, format: Format, implementation: Implementation | None) -> None:
    """Runs `moe` once, so that a machine it cannot serve says so before the training rather than after it."""
    untrained = initialize(config, jax.random.key(0))
    experts = quantize(untrained.experts, format)
    bits_per_character(config, untrained, experts, corpus.held_out, implementation=implementation, max_batches=1)


def _train(arguments: argparse.Namespace, path: Path, config: ModelConfig, corpus: text.Corpus) -> Checkpoint:
    seconds = arguments.train_seconds
    if seconds is None and arguments.steps is None:
        seconds = _DEFAULT_SECONDS
    recipe = TrainConfig(seconds=seconds, steps=arguments.steps, seed=arguments.seed)
    parameters, steps = train(config, recipe, corpus.train, sys.stderr)
    checkpoint = Checkpoint(parameters, steps)
    try:
        checkpoints.save(path, checkpoint, config, corpus)
    except OSError as error:
        _say(f"The checkpoint could not be written, so the next run trains again: {error}.")
    else:
        _say(f"The trained model is saved in {path}.")
    return checkpoint


def _nothing(_: str) -> None:
    pass


def _obtain(
    arguments: argparse.Namespace, config: ModelConfig, corpus: text.Corpus, report: Callable[[str], None]
) -> Parameters:
    """The model, loaded or trained: by the first process for all of them."""
    if jax.process_index() > 0:
        return meshes.of_first_process(initialize(config, jax.random.key(0)))
    path = arguments.checkpoint or checkpoints.default_path()
    checkpoint = _load(arguments, path, config, corpus)
    origin = f"loaded from {path} (--retrain trains again)"
    if checkpoint is None:
        _try_moe(config, corpus, arguments.format, arguments.implementation)
        checkpoint = _train(arguments, path, config, corpus)
        origin = "trained now"
    report(f"model       {checkpoint.steps} training steps, {origin}")
    return meshes.of_first_process(checkpoint.parameters)


def _run(arguments: argparse.Namespace, config: ModelConfig) -> None:
    report = print if jax.process_index() == 0 else _nothing
    mesh: Mesh | None = None
    if arguments.devices > 1 or jax.process_count() > 1:
        mesh = meshes.make_mesh(config, arguments.devices)
    corpus = text.load_corpus()
    prompts = arguments.prompt or [_DEFAULT_PROMPT]
    prompts = list(itertools.islice(itertools.cycle(prompts), arguments.batch or len(prompts)))
    for prompt in prompts:
        text.encode(prompt)  # An unknown symbol is better reported before the training than after it.

    report(f"device      {arguments.devices} x {jax.devices()[0].device_kind} ({jax.default_backend()})")
    report(f"corpus      {len(corpus.train)} symbols to train on, {len(corpus.held_out)} held out")
    implementation = arguments.implementation
    parameters = _obtain(arguments, config, corpus, report)
    float_bits = bits_per_character(config, parameters, parameters.experts, corpus.held_out)
    report(f"held out    {float_bits:.4f} bits/char with float experts")
    for format in dict.fromkeys((*_COMPARED, arguments.format)):
        experts = quantize(parameters.experts, format)
        bits = bits_per_character(config, parameters, experts, corpus.held_out, implementation=implementation)
        report(f"held out    {bits:.4f} bits/char with moe ({format}), difference {bits - float_bits:+.4f}")
    experts = quantize(parameters.experts, arguments.format)

    generation = generate(
        config,
        parameters,
        experts,
        prompts,
        arguments.tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
        implementation=implementation,
        mesh=mesh,
    )
    report(
        f"decoding    {generation.tokens_per_second:.1f} tokens/s, {generation.milliseconds_per_step:.3f} ms per step "
        f"({len(prompts)} sequences x {generation.num_steps} steps in {generation.seconds:.2f} s, "
        f"{arguments.format})"
    )
    for prompt, generated in zip(prompts, generation.texts, strict=True):
        report(f"\n--- continuing {prompt!r}\n{generated}")


def main(argv: Sequence[str] | None = None, config: ModelConfig | None = None) -> int:
    """Runs the demo with the arguments `argv` and gives the exit status; `config` replaces the sizes of the model.

    Under `jax.distributed` all processes call it alike, with the number of all their devices.
    """
    arguments = _parser().parse_args(argv)
    try:
        _run(arguments, config or ModelConfig())
    except (CheckpointError, text.TextError, MegaMoEError) as error:
        _say(f"error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
