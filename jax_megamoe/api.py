"""`moe`, the documented entry: checks its arguments, finds the mesh, and hands over to the primitives."""

import functools
from typing import get_args

import jax

from jax_megamoe import arguments, shared_experts, xla_flags
from jax_megamoe.activations import SiTU, SwiGLU
from jax_megamoe.arrays import check_flag, text_of
from jax_megamoe.errors import ArgumentError
from jax_megamoe.operands import Operands
from jax_megamoe.options import Implementation, typed_by_load
from jax_megamoe.placement import EXPERT_AXIS, TOKEN_AXES, AxisNames, find_placement, tell_devices
from jax_megamoe.placement_log import log_costs
from jax_megamoe.primitives import moe as primitive
from jax_megamoe.weights import ExpertWeights


@typed_by_load
def moe(
    x: jax.Array,
    weights: ExpertWeights,
    topk_ids: jax.Array,
    topk_weights: jax.Array,
    *,
    activation: SwiGLU | SiTU | None = None,
    activation_clamp: float | None = None,
    routed_scaling_factor: float = 1.0,
    return_expert_load: bool = False,
    layer: int | jax.Array | None = None,
    num_valid_tokens: int | jax.Array | None = None,
    shared: ExpertWeights | None = None,
    shared_weights: jax.Array | None = None,
    batch_invariant: bool = False,
    expert_axis: AxisNames = EXPERT_AXIS,
    token_axes: AxisNames = TOKEN_AXES,
    implementation: Implementation | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """The expert layer of a mixture-of-experts model: for each token, the weighted sum of its experts' results.

    An expert computes down(silu(gate(x)) * up(x)) with FP8 weights and activations (docs/numerics.md). Works inside and
    outside `jax.jit`, under automatic, explicit and manual sharding (docs/sharding.md), and under `jax.vmap` over
    tokens; it has no derivative. Results are the same bits from run to run. What a placement costs without need, such
    as experts gathered at every call, is said once in the log `jax_megamoe`, with what to pass.

    Args:
      x: bf16[..., H], hidden states; the leading dimensions together are T tokens.
      weights: from `quantize_experts` or `pack_experts`, one layer, or with `layer` several that are stacked.
      topk_ids: int32[..., k], the experts of each token, 1 <= k <= 32. Ids count the experts of all devices. -1, or any
        id outside [0, E), marks an unused slot; an id that a token has twice counts twice.
      topk_weights: f32[..., k], routing weights, applied here; those of unused slots are ignored.
      activation: `SwiGLU(alpha, up_offset)` or `SiTU(beta, linear_beta)`; None is silu(gate) * up.
      activation_clamp: c > 0 limits gate to at most c, and up to [-c, c].
      routed_scaling_factor: multiplies topk_weights.
      return_expert_load: also returns how many (token, slot) pairs each expert received from all tokens of the mesh.
      layer: which layer of stacked weights, an int or an array int[] of any integer type; traced ones, as in
        `jax.lax.scan` over layers, don't slice the weights. Ints, Python's or NumPy's, outside [0, L) are a
        ShapeError; values of jax arrays, traced or not, are clamped.
      num_valid_tokens: how many of the T tokens are valid, an int or an array int[] of any integer type, traced or not.
        The slots of those behind are unused: they get zeros, and the load does not count them. Inside `jax.shard_map`
        it counts the tokens of the x that is passed there, each device's own; under `jax.vmap` those of each element.
        Ints, Python's or NumPy's, outside [0, T] are a ShapeError; values of jax arrays are clamped. None: all.
      shared: S shared experts, through which every token goes, whole on each device: of the sizes of `weights`, and
        stacked like them. Their results, times shared_weights and not times routed_scaling_factor, are added in the
        same kernel, by the device that has the token; tokens without used slots get them too, those that are not valid
        do not. Where the format is another than that of `weights`, or k + S is more than 32, they are a kernel of their
        own, and the sum is rounded once more.
      shared_weights: f32[..., S], a factor for each token and shared expert, as models with a gate for them have it;
        None for ones.
      batch_invariant: a token's result is the same bits whatever other tokens are in the call, and over any number of
        ranks. All calls take the kernel for many tokens then, and with "collective" each slot's result travels.
        docs/numerics.md says what is promised, and what it costs.
      expert_axis: the mesh axis, or a tuple of axes, that split the experts, inside `jax.shard_map` too. None: each
        device has all experts. A name that is passed has to be an axis of the mesh, while a mesh may lack the default,
        "expert", and counts as None then. Without a mesh any name serves: the same program runs on one device.
      token_axes: the mesh axes that split the tokens; the default is those of ("data", "expert") that the mesh has, and
        () or None says that no axis does. Numbers of tokens that they do not divide are padded. Ignored where types
        already say it: explicit axes, and `jax.shard_map` with check_vma=True. With check_vma=False it has to be
        passed where `expert_axis` is another than the default's axes. Names that are passed have to be in the mesh.
      implementation: None is the fused kernel on SM90 GPUs, over all ranks of `expert_axis` where it can be, and array
        code on CPUs; "cuda" the former or an error; "reference" array code anywhere, slow on a GPU. "collective" puts
        XLA's collectives around the kernel of one device. So does None, with a warning that says why, where one kernel
        can't serve all ranks: tokens that are not split over `expert_axis`, or GPUs without access to each other's
        memory. How long the kernel waits for another rank: JAX_MEGAMOE_TIMEOUT_SECONDS in the environment, 30; when
        ranks first meet, JAX_MEGAMOE_SETUP_TIMEOUT_SECONDS, 120. Both are read while tracing.

    Returns:
      y bf16[..., H]; a token without used slots, shared experts' among them, gets zeros. Over explicit axes it is
      sharded as x's type says. Over automatic axes it comes split over `token_axes` along the first dimension (whole
      where these don't divide it), however x is: like x where x is split so; else y, fed back into the same jitted
      function, compiles it once more. With `return_expert_load` also int32[E], sharded like the experts (in
      `jax.shard_map`: the part that belongs to this device's experts).

    Raises:
      ShapeError, DTypeError, LayoutError, ShardingError: while tracing, for an array that cannot be served.
      ArgumentError: the class of all these; itself for other arguments.
      PlatformError, GroupError: while lowering, for a platform, GPU, build or group of GPUs that `implementation` does
        not run on. All are MegaMoEError, and that is a ValueError.
      NotImplementedError: for derivatives, and for `jax.vmap` over weights or layer.
    """
    x, weights, topk_ids, topk_weights, layer, num_valid, numbers, factor = arguments.check(
        x,
        weights,
        topk_ids,
        topk_weights,
        activation=activation,
        activation_clamp=activation_clamp,
        routed_scaling_factor=routed_scaling_factor,
        layer=layer,
        num_valid_tokens=num_valid_tokens,
    )
    shared_part = shared_experts.check(shared, shared_weights, x, weights)
    check_flag("return_expert_load", return_expert_load)
    check_flag("batch_invariant", batch_invariant)
    if implementation is not None and not (
        isinstance(implementation, str) and implementation in get_args(Implementation)
    ):
        raise ArgumentError(
            f"implementation is {text_of(implementation)}, wanted None or one of {get_args(Implementation)}: "
            "choose one."
        )
    mesh, axes = find_placement(
        x,
        weights,
        topk_ids,
        topk_weights,
        shared_experts.arrays_by_name(shared_part),
        expert_axis=expert_axis,
        token_axes=token_axes,
    )
    with_load = bool(return_expert_load)
    log_costs(x, weights, mesh, axes, expert_axis=expert_axis, token_axes=token_axes, with_load=with_load)
    xla_flags.remember_loop()
    operands = Operands(x, weights.leaves, topk_ids, topk_weights, layer)
    operands = Operands.of(tell_devices(operands.row))
    y, load = shared_experts.call_with_shared(
        functools.partial(
            primitive.moe,
            mesh=mesh,
            with_load=with_load,
            activation=numbers,
            batch_invariant=bool(batch_invariant),
            implementation=implementation,
        ),
        operands,
        shared_part,
        axes=axes,
        num_experts=weights.num_experts,
        num_valid_tokens=num_valid,
        routed_scaling_factor=factor,
    )
    return (y, load) if return_expert_load else y
