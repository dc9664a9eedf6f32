"""What tests on a Hopper GPU need, and why there may be none. Importing it asks for the devices, which workers may not yet."""

import jax
import pytest

from jax_megamoe.primitives import _library


def why_not() -> str | None:
    try:
        devices = jax.devices("gpu")
    except RuntimeError:
        return "needs a GPU; this process sees none"
    capability = str(getattr(devices[0], "compute_capability", "?"))
    return None if capability == "9.0" else f"needs compute capability 9.0; this GPU has {capability}"


_REASON = why_not()
_NO_TESTING = _library.why_no_testing()
needs_testing = pytest.mark.skipif(_NO_TESTING is not None, reason=str(_NO_TESTING))
needs_hopper = [pytest.mark.gpu, pytest.mark.skipif(_REASON is not None, reason=str(_REASON))]
