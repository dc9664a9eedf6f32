"""XLA's flags for programs that call the layer in a loop, and a hint in the log where they are missing."""

import logging
import os
import shlex
import sys
from collections.abc import Mapping

import jax

_log = logging.getLogger("jax_megamoe")

_COMMANDS, _SMALLEST_GRAPH = "xla_gpu_enable_command_buffer", "xla_gpu_graph_min_graph_size"
# "+" adds to what XLA captures by itself. A list of kinds would replace that: the one that was measured first,
# FUSION,CUSTOM_CALL,WHILE,DYNAMIC_SLICE_FUSION, leaves cuBLAS out, and so every loop that has a product of cuBLAS.
_RECOMMENDED = {_COMMANDS: "+WHILE", _SMALLEST_GRAPH: "1"}
_JAX = os.path.dirname(jax.__file__) + os.sep


def recommended_xla_flags() -> str:
    """What a decode loop wants in XLA_FLAGS: "--name=value --name=value".

    With them XLA for GPUs captures a `jax.lax.while_loop` as one CUDA graph, the test of its end included. Without
    them the host waits for the device at every iteration, and a body of few operations is launched one by one. What a
    layer in a `while_loop` takes beyond the kernel was measured: 34.6 us by default and 7.6 with WHILE captured on an
    H200, 38.4 and 7.2 on an H100. In `jax.lax.scan`, or unrolled, it is at most 3.4 either way (docs/benchmark.md,
    "Layers in a loop").

    XLA reads XLA_FLAGS once, when JAX first looks for devices. So set them before the program starts, or above its
    first use of a device:

      os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {jax_megamoe.recommended_xla_flags()}"

    A loop is captured whole or not at all. One whose body has collectives of XLA's is not; the kernel of a group of
    ranks is none of them. Both names are those of jax 0.11.2 and 0.12, on any platform. `compiler_options` of `jax.jit`
    does not take the "+".
    """
    return _text(_RECOMMENDED)


def missing_xla_flags() -> str:
    """Those of the recommended flags that XLA_FLAGS lacks, in the same form; empty where it has them all."""
    found = _flags_of_environment()
    missing = dict(_RECOMMENDED)
    if _captures_loops(found.get(_COMMANDS, "")):
        del missing[_COMMANDS]
    if found.get(_SMALLEST_GRAPH) == _RECOMMENDED[_SMALLEST_GRAPH]:
        del missing[_SMALLEST_GRAPH]
    return _text(missing)


def remember_loop() -> None:
    """To be called while the layer is traced: `hint_at_flags` speaks of `jax.lax.while_loop` only where there is one.

    It is told by the functions that are being called: what is lowered later does not say any more which loop of JAX's
    it was.
    """
    frame = sys._getframe() if not _hint.in_loop else None
    while frame is not None and not _hint.in_loop:
        code = frame.f_code
        _hint.in_loop = code.co_name == "while_loop" and code.co_filename.startswith(_JAX)
        frame = frame.f_back


def hint_at_flags() -> None:
    """To be called while the layer is lowered for a GPU: warns once, of a `while_loop` without the flags."""
    if _hint.is_given or not _hint.in_loop or not _has_gpu():
        return
    if missing := missing_xla_flags():
        _hint.is_given = True
        _log.warning(
            "moe is called in jax.lax.while_loop, which XLA does not capture as a CUDA graph by itself: that costs up "
            "to 30 us an iteration. Set XLA_FLAGS='%s' before JAX starts (jax_megamoe.recommended_xla_flags).",
            missing,
        )


class _Hint:
    """What is known of this process's programs."""

    in_loop = False
    is_given = False


_hint = _Hint()


def _has_gpu() -> bool:
    """Not so where a program is lowered for another machine, which has flags of its own."""
    try:
        return bool(jax.local_devices(backend="cuda"))
    except RuntimeError:
        return False


def _captures_loops(value: str) -> bool:
    return "WHILE" in value.upper().replace("+", "").split(",")


def _flags_of_environment() -> dict[str, str]:
    text = os.environ.get("XLA_FLAGS", "").strip()
    if text and not text.startswith("-"):  # as XLA has it: the name of a file that holds them
        try:
            with open(text, encoding="utf-8") as file:
                text = file.read()
        except OSError:
            return {}
    try:
        words = shlex.split(text)
    except ValueError:  # a quote that does not end
        words = text.split()
    pairs = (word.lstrip("-").partition("=") for word in words)
    return {name: value for name, _, value in pairs}  # of a flag that is given twice, the last one


def _text(flags: Mapping[str, str]) -> str:
    return " ".join(f"--{name}={value}" for name, value in flags.items())
