"""Command line: `python -m bench buffers` prints what memory expert parallelism takes, as a table in Markdown."""

import argparse
import sys

from bench.presets import MODELS
from jax_megamoe.errors import MegaMoEError
from jax_megamoe.expert_parallel import buffer_bytes

NUM_RANKS = 8
TOKENS = (8, 128, 512, 8192)


def main(arguments: list[str]) -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench buffers", description=__doc__)
    parser.add_argument("--ranks", type=int, default=NUM_RANKS, help="of the expert group")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="of each rank, with commas between them")
    options = parser.parse_args(arguments)
    try:
        for line in table(options.ranks, [int(tokens) for tokens in options.tokens.split(",")]):
            print(line)
    except MegaMoEError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def table(num_ranks: int, tokens: list[int]) -> list[str]:
    """A row for each model: symmetric + scratch MiB on each GPU, for so many tokens of each rank."""
    lines = [
        "| model | " + " | ".join(f"{num_tokens} tokens" for num_tokens in tokens) + " |",
        "|---" * (1 + len(tokens)) + "|",
    ]
    for name, model in MODELS.items():
        cells = []
        for num_tokens in tokens:
            sizes = (num_tokens, model.top_k, model.hidden_size, model.intermediate_size, model.num_experts, num_ranks)
            try:
                cells.append(" + ".join(_mebibytes(num_bytes) for num_bytes in buffer_bytes(*sizes)))
            except MegaMoEError:
                raise
            except ValueError as error:
                cells.append(str(error))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _mebibytes(num_bytes: int) -> str:
    mebibytes = num_bytes / 2**20
    return f"{mebibytes:.0f}" if mebibytes >= 10 else f"{mebibytes:.1f}"
