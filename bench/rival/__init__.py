"""The rival: `sgl-deep-gemm`, whose FP8 mega MoE for SM90 is measured beside ours, on one rank.

It runs in an interpreter of its own (`python -m bench.rival`), which needs torch and has neither JAX nor jax_megamoe:
`process` and `check` are imported there, `client` here.
"""

PACKAGES = ("sgl-deep-gemm", "apache-tvm-ffi", "torch")
INSTALL = "pip install sgl-deep-gemm==0.1.4.post1 apache-tvm-ffi==0.1.11, beside a torch for CUDA 13"
# The rival's numerics are those of docs/numerics.md; its results are 6e-6 to 2e-5 away from a model of them.
MAX_DIFF = 1e-3
