"""The rival: `sgl-deep-gemm`, whose FP8 mega MoE for SM90 is measured beside ours, on one rank or expert-parallel.

It runs in an interpreter of its own (`python -m bench.rival`, one process for each GPU), which needs torch and has
neither JAX nor jax_megamoe: `process` and `check` are imported there, `client` here.
"""

PACKAGE = "sgl-deep-gemm"
PACKAGES = (PACKAGE, "torch")
INSTALL = "pip install sgl-deep-gemm==0.2.5 torch==2.14.1"
# What the sources of 0.2.5 do. Tokens are quantised as docs/numerics.md says, with a scale of amax / 448 in FP32 for
# each 128 values. Hidden activations get such a scale for each 128 values, too, where ours get a power of two for each
# 64 or 128. So the same activations are rounded twice, independently, to E4M3's 3 bits, by which the results of any
# shape are about 6e-4 apart: by a simulation, and measured from a model with our scales. From a model that rounds where
# the rival does it is about 1e-4 at the sizes of check.py: some activations end up on the other side of a tie, because
# the rival's sums over K are those of the tensor cores alone, which keep some 13 bits.
MAX_DIFF = 2e-3  # from our result, and from the reference
MAX_MODEL_DIFF = 3e-4  # from the model in check.py
