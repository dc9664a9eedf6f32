"""What tests on a Hopper GPU need, and why there may be none. Importing it asks for the devices, which workers may not yet."""

import jax
import pytest


def why_not() -> str | None:
    try:
        devices = jax.devices("gpu")
    except RuntimeError:
        return "needs a GPU; this process sees none"
    capability = str(getattr(devices[0], "compute_capability", "?"))
    return None if capability == "9.0" else f"needs compute capability 9.0; this GPU has {capability}"


_REASON = why_not()
needs_hopper = [pytest.mark.gpu, pytest.mark.skipif(_REASON is not None, reason=str(_REASON))]
