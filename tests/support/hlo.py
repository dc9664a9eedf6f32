"""What a compiled program does, by its text."""

import math
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


def bytes_of_collectives(text: str) -> dict[str, int]:
    """Bytes of the results that a device has of collectives in HLO compiled for a CPU, by opcode."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        match = re.match(r"\s*(?:ROOT )?%?[\w.-]+ = (.*?) ((?:all|collective|ragged)-[a-z-]+|reduce-scatter)\(", line)
        if match is None:
            continue
        for bits, shape in re.findall(r"[a-z]+(\d+)\w*\[([\d,]*)\]", match[1]):
            count = math.prod(int(n) for n in shape.split(",") if n)
            found[match[2]] = found.get(match[2], 0) + count * int(bits) // 8
    return found


def types_of_collectives(text: str) -> dict[str, list[str]]:
    """Types of the results of collectives in StableHLO, as in "4x256xf32", by operation."""
    found: dict[str, list[str]] = {}
    operations = r'"?stablehlo\.((?:all|collective)_[a-z_]+|reduce_scatter)"?\(.*?-> tensor<([^>]*)>'
    for operation, type_ in re.findall(operations, text, re.DOTALL):
        found.setdefault(operation, []).append(type_)
    return found


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
