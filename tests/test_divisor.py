"""The division by multiplication that the kernels use, compiled for the host."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
LARGEST = 2**32 - 1


def test_quotients_are_exact(tmp_path):
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    source, program = ROOT / "tests" / "native" / "divisor_test.cc", tmp_path / "divisor_test"
    command = [compiler, "-std=c++17", "-O1", f"-I{ROOT / 'jax_megamoe' / 'cuda'}", source, "-o", program]
    subprocess.run(command, check=True, timeout=120)
    random = np.random.default_rng(0)
    divisors = [*range(1, 200), 2**16 - 1, 2**16 + 1, 2**31 - 1, 2**31, 2**31 + 1, LARGEST]
    divisors += [int(value) for value in random.integers(1, 2**32, 300)]
    pairs = []
    for divisor in divisors:
        multiple = LARGEST // divisor * divisor
        # The estimate is off, if at all, for large numbers just below a multiple.
        numbers = {0, divisor - 1, divisor, multiple - 1, multiple, LARGEST, *map(int, random.integers(0, 2**32, 50))}
        pairs += [(divisor, number) for number in sorted(numbers) if number >= 0]
    text = "\n".join(f"{divisor} {number}" for divisor, number in pairs)
    done = subprocess.run([program], input=text, capture_output=True, text=True, check=True, timeout=60)
    assert [int(line) for line in done.stdout.split()] == [number // divisor for divisor, number in pairs]
