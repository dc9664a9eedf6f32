"""Lowering for CUDA on a machine that has neither GPU nor a build with CUDA."""

import re
import types
from collections.abc import Callable
from typing import Any

import jax

WORKSPACE, PEER_WORKSPACE = 4096, 8192
FUSED, LOCAL = "jax_megamoe.moe_peers.v3", "jax_megamoe.moe.v1"


def fake_core() -> Any:
    """The compiled module as far as lowering needs it; remembers in `asked` for what problems of a group."""
    asked: list[tuple[int | str, ...]] = []

    def peer_workspace_bytes(*sizes: int | str) -> int:
        asked.append(sizes)
        return PEER_WORKSPACE

    return types.SimpleNamespace(
        has_cuda=True,
        workspace_bytes=lambda *sizes: WORKSPACE,
        peer_workspace_bytes=peer_workspace_bytes,
        asked=asked,
    )


def no_devices(backend: str | None = None) -> list[Any]:
    raise RuntimeError(f"no {backend} here")


def cuda_text(function: Callable[..., Any], *arguments: Any, platforms: tuple[str, ...] = ("cuda",)) -> str:
    """The StableHLO of the function."""
    # A function of its own each time: JAX remembers how it lowered an equal one, perhaps with another `_core`.
    fresh = jax.jit(lambda *arguments: function(*arguments))
    return fresh.trace(*arguments).lower(lowering_platforms=platforms).as_text()


def calls(text: str) -> list[str]:
    """The FFI targets that a StableHLO text calls."""
    return re.findall(r"custom_call @(jax_megamoe\.[\w.]+)\(", text)


def attribute(text: str, name: str) -> str:
    """The attribute of the one call that has it."""
    (value,) = re.findall(rf"{name} = (.*?) : ", text)
    return value
