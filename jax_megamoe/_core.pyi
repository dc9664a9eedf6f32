"""The compiled module: registrations for XLA, sizes of memory, and what a process shares with other ranks.

What is missing depends on the build: `has_cuda` and `has_testing` tell (docs/building.md).
"""

from typing import Any

has_cuda: bool
has_testing: bool

def ffi_registrations() -> dict[str, dict[str, Any]]: ...
def host_identity() -> str: ...
def workspace_bytes(
    num_tokens: int,
    top_k: int,
    hidden_size: int,
    intermediate_size: int,
    num_local_experts: int,
    weight_format: str,
    batch_invariant: bool,
) -> int: ...
def peer_workspace_bytes(
    num_tokens: int,
    top_k: int,
    hidden_size: int,
    intermediate_size: int,
    num_local_experts: int,
    weight_format: str,
    batch_invariant: bool,
    num_ranks: int,
) -> int: ...
def peer_buffer_bytes(
    num_tokens: int,
    top_k: int,
    hidden_size: int,
    intermediate_size: int,
    num_local_experts: int,
    weight_format: str,
    batch_invariant: bool,
    num_ranks: int,
) -> int: ...
def launch_choice(
    num_tokens: int,
    top_k: int,
    hidden_size: int,
    intermediate_size: int,
    num_local_experts: int,
    weight_format: str,
    num_ranks: int,
    *,
    num_sms: int,
    bytes_per_microsecond: float,
    batch_invariant: bool = False,
) -> dict[str, Any]: ...

# With CUDA.
def moe_execute_count() -> int: ...
def can_access_peer(from_device: int, to_device: int) -> bool: ...
def symmetric_memories() -> list[dict[str, Any]]: ...

# With MEGAMOE_TESTING.
def hold_sms(device: int, ctas: int, milliseconds: int) -> None: ...
