"""Sizes of an expert layer. Imports neither JAX nor torch: the rival's process has one of them only."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes of one device's expert layer."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert of fp8_block: weights and their packed scales, 16 bytes a pipeline stage."""
        h, i = self.hidden_size, self.intermediate_size
        scales = 16 * (i // 64 * (h // 128) + h // 64 * -(-i // 256))
        return 3 * h * i + scales

    @property
    def weight_bytes(self) -> int:
        """Bytes of all experts of fp8_block."""
        return self.num_experts * self.expert_bytes

    def flops(self, num_pairs: float) -> float:
        """Multiplications and additions of the three projections, for so many pairs of a token and an expert."""
        return 6 * self.hidden_size * self.intermediate_size * num_pairs
