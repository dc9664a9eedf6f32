"""The division by multiplication that the kernels use, compiled for the host."""

import numpy as np

from tests.support.native_program import compile_program

LARGEST = 2**32 - 1


def test_quotients_are_exact(tmp_path):
    quotients = compile_program(tmp_path, "divisor_test")
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
    assert [int(line) for line in quotients(text).split()] == [number // divisor for divisor, number in pairs]
