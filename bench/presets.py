"""Shapes to measure: one rank of an expert-parallel group of eight."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes of one device's expert layer."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert: FP8 weights and their packed scales, 16 bytes a pipeline stage."""
        h, i = self.hidden_size, self.intermediate_size
        scales = 16 * (i // 64 * (h // 128) + h // 64 * -(-i // 256))
        return 3 * h * i + scales

    def flops(self, num_tokens: int) -> int:
        """Multiplications and additions of the three projections."""
        return 6 * self.hidden_size * self.intermediate_size * self.top_k * num_tokens


SHAPES = {
    "flash": Shape(4096, 2048, 32, 6),  # DeepSeek-V4-Flash
    "pro": Shape(7168, 3072, 48, 6),  # DeepSeek-V4-Pro
    "deepseek-v3": Shape(7168, 2048, 32, 8),
    "qwen3-30b": Shape(2048, 768, 16, 8),
    "qwen3-235b": Shape(4096, 1536, 16, 8),
    "glm-5": Shape(6144, 2048, 32, 8),
    "kimi-k2": Shape(7168, 2048, 48, 8),
    "minimax-m2": Shape(3072, 1536, 32, 8),
    "tiny": Shape(256, 128, 8, 2),  # for a dry run on a CPU
}
