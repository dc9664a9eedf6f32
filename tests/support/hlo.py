"""What a compiled program does, by its text."""

import re
from typing import Any

import numpy as np

from jax_megamoe.primitives import _library


def is_fused(compiled: Any) -> bool:
    """The ranks of a group are served by one kernel."""
    return _library.MOE_PEERS_TARGET in str(compiled.as_text())


def kernels(text: str) -> list[str]:
    """The instructions of a program compiled for a GPU, without loops, that run there, by name."""
    found = re.findall(r"^  (?:ROOT )?%?([\w.-]+) = .*? ([a-z][\w-]*)\(", text[text.index("\nENTRY ") :], re.MULTILINE)
    nothing = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")
    return [name for name, opcode in found if opcode not in nothing]


def opcodes_of_large_results(text: str, num_elements: int) -> set[str]:
    """The opcodes of the instructions in compiled HLO that give an array of at least so many elements."""
    found = set()
    for line in text.splitlines():
        match = re.match(r"\s*(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][\w-]*)\(", line)
        if match is None:
            continue
        shapes = re.findall(r"[a-z]\w*\[([\d,]+)\]", match[1])
        if any(np.prod([int(n) for n in shape.split(",")]) >= num_elements for shape in shapes):
            found.add(match[2])
    return found
