"""The numerics of docs/numerics.md in jax.numpy: what runs on a CPU, and what the kernel is compared with."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from jax_megamoe import arguments, collectives, mxfp4, quantization, shared_experts, weight_layout
from jax_megamoe.activations import SILU, Activation, SiTU, SwiGLU
from jax_megamoe.arrays import check_flag, text_of
from jax_megamoe.errors import ArgumentError
from jax_megamoe.operands import Leaves, Operands
from jax_megamoe.options import typed_by_load
from jax_megamoe.placement import EXPERT_AXIS, TOKEN_AXES, AxisNames, find_placement
from jax_megamoe.primitives import _specs
from jax_megamoe.primitives import _transforms as transforms
from jax_megamoe.primitives._specs import Axes
from jax_megamoe.weight_layout import Format
from jax_megamoe.weights import ExpertWeights

# Pairs of one expert that go through the GEMMs together, at most. Enough to read the weights rarely, few enough that a
# tile's FP32 accumulators stay small beside the weights.
_MAX_ROWS = 512
_MIN_ROWS = 8


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
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`jax_megamoe.moe`, computed by plain array code.

    x bf16[..., H], topk_ids int32[..., k], topk_weights f32[..., k] -> bf16[..., H], with `return_expert_load` also
    int32[E]. The arguments mean what they mean in `jax_megamoe.moe`, and the same errors are raised, but `jax.vmap`
    over weights or layer works. Outside of `jax.shard_map` this is array code like any other, which XLA splits as it
    sees fit: over automatic axes `expert_axis` and `token_axes` have no influence there. With `batch_invariant` it
    computes what the kernel does then, activations quantised by 128 columns; the bits of its products are XLA's.
    """
    check_flag("return_expert_load", return_expert_load)
    check_flag("batch_invariant", batch_invariant)
    if implementation is not None and not (isinstance(implementation, str) and implementation == "reference"):
        raise ArgumentError(
            f"implementation is {text_of(implementation)}, wanted None or 'reference': call jax_megamoe.moe instead."
        )
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
    mesh, axes = find_placement(
        x,
        weights,
        topk_ids,
        topk_weights,
        shared_experts.arrays_by_name(shared_part),
        expert_axis=expert_axis,
        token_axes=token_axes,
    )
    manual_sizes = {axis: mesh.shape[axis] for axis in mesh.manual_axes}

    def call(operands: Operands, *, axes: Axes, **params: Any) -> tuple[jax.Array, jax.Array]:
        operands = Operands.of([transforms.without_derivative(value) for value in operands.row])
        per_device: Any = functools.partial(
            _per_device,
            expert_axes=tuple(axis for axis in axes.experts if axis in manual_sizes),
            token_axes=axes.tokens,
            axis_sizes=tuple(manual_sizes.items()),
            with_load=bool(return_expert_load),
            activation=numbers,
            batch_invariant=bool(batch_invariant),
            **params,
        )
        if _specs.axes_of_type(mesh, AxisType.Explicit):
            specs = _specs.choose_specs(jax.typeof(x), Leaves(*map(jax.typeof, operands.leaves)), mesh, axes)
            per_device = _specs.with_automatic_axes(per_device, mesh, (specs.token_spec(), specs.load_spec()))
        y, load = per_device(operands)
        return y, load

    y, load = shared_experts.call_with_shared(
        call,
        Operands(x, weights.leaves, topk_ids, topk_weights, layer),
        shared_part,
        axes=axes,
        num_experts=weights.num_experts,
        num_valid_tokens=num_valid,
        routed_scaling_factor=factor,
    )
    return (y, load) if return_expert_load else y


# Compiled, also where the caller's program is not: its constants would be transfers to the device, and NaN in what is
# not used would be found by jax_debug_nans.
@functools.partial(
    jax.jit,
    static_argnames=(
        "num_experts",
        "expert_axes",
        "token_axes",
        "axis_sizes",
        "with_load",
        "activation",
        "routed_scaling_factor",
        "batch_invariant",
    ),
)
def _per_device(
    operands: Operands, *, axis_sizes: tuple[tuple[str, int], ...], **params: Any
) -> tuple[jax.Array, jax.Array]:
    y, load = collectives.moe_per_device(
        operands.map_tokens(transforms.join_leading_dimensions),
        moe_local,
        functools.partial(collectives.through_collectives, local_op=moe_local),
        axis_sizes=dict(axis_sizes),
        **params,
    )
    return y.reshape(operands.x.shape), load


def moe_local(
    operands: Operands,
    *,
    activation: Activation = SILU,
    routed_scaling_factor: float = 1.0,
    out_dtype: Any = jnp.bfloat16,
    batch_invariant: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The experts of one device: tokens -> the sum of their results, and how many pairs each expert received.

    The pairs (token, slot) are sorted by expert and cut into tiles of one expert each; a loop runs over the tiles that
    exist, so time follows the number of pairs, and memory holds one BF16 row per pair beside a tile's temporaries.

    Args:
      operands: x bf16[T, H]; packed leaves that lead with E_local, or with L, E_local; topk_ids int32[T, k], local
        ids, of which anything outside [0, E_local) is an unused slot; topk_weights f32[T, k]; layer int32[], which
        layer of stacked leaves, clamped to [0, L); leaves of shared experts, which are the first of E_local.
      activation: of gate and up.
      routed_scaling_factor: multiplies topk_weights.
      out_dtype: bfloat16, or float32 where sums of several devices are added up afterwards.
      batch_invariant: activations are quantised by 128 columns instead of 64.

    Returns:
      y out_dtype[T, H] and load int32[E_local].
    """
    x, packed, topk_ids, topk_weights, layer, shared = operands
    format, num_experts = weight_layout.format_of(packed), operands.num_local_experts
    leaves, layer = _sliceable(packed), 0 if packed.gate_up.ndim == 4 else layer
    layer = jnp.clip(layer, 0, leaves[0].shape[0] - 1)
    if shared:
        leaves = [
            jnp.concatenate([other[layer], own[layer]])[None]
            for own, other in zip(leaves, _sliceable(shared), strict=True)
        ]
        layer = jnp.int32(0)
    (num_tokens, hidden_size), top_k = x.shape, topk_ids.shape[1]
    num_pairs = num_tokens * top_k
    if num_pairs == 0 or num_experts == 0:
        return jnp.zeros((num_tokens, hidden_size), out_dtype), jnp.zeros(num_experts, jnp.int32)

    used = (topk_ids >= 0) & (topk_ids < num_experts)
    expert_of_pair = jnp.where(used, topk_ids, num_experts).reshape(num_pairs)
    order = jnp.argsort(expert_of_pair, stable=True)
    load = jnp.zeros(num_experts, jnp.int32).at[expert_of_pair].add(1, mode="drop")
    begin = jnp.cumsum(load) - load
    rows = min(_MAX_ROWS, max(_MIN_ROWS, 1 << (num_pairs // num_experts).bit_length()))
    last_tile = jnp.cumsum(-(-load // rows))

    activation_block = (
        quantization.BATCH_INVARIANT_ACTIVATION_BLOCK if batch_invariant else quantization.ACTIVATION_BLOCK
    )
    quantized, token_scales = quantization.quantize_tokens(quantization.round_to_bf16(x))
    tokens = quantized.astype(jnp.bfloat16)
    routing = (jnp.where(used, topk_weights.astype(jnp.float32), 0.0) * routed_scaling_factor).reshape(num_pairs)
    # One tile more than there are pairs, so that the last tile's write is not moved to fit.
    padded_order = jnp.concatenate([order, jnp.broadcast_to(order[:1], (rows,))])

    def run_tile(tile: jax.Array, results: jax.Array) -> jax.Array:
        expert = jnp.sum(last_tile <= tile, dtype=jnp.int32)
        tiles_before = jnp.where(expert > 0, last_tile[expert - 1], 0)
        first = begin[expert] + (tile - tiles_before) * rows
        pairs = jax.lax.dynamic_slice_in_dim(padded_order, first, rows)
        token = pairs // top_k
        result = _expert(
            tokens[token],
            token_scales[token],
            routing[pairs],
            *(leaf[layer, expert] for leaf in leaves),
            format=format,
            activation=activation,
            activation_block=activation_block,
        )
        # Rows beyond the expert's last pair are those of later experts, whose tiles come later and overwrite them.
        return jax.lax.dynamic_update_slice_in_dim(results, result, first, 0)

    results = _zeros_like_varying((num_pairs + rows, hidden_size), jnp.bfloat16, x, leaves[0], topk_ids, topk_weights)
    results = jax.lax.fori_loop(0, last_tile[-1], run_tile, results)

    row_of_pair = jnp.zeros_like(order).at[order].set(jnp.arange(num_pairs, dtype=order.dtype)).reshape(used.shape)
    y = jnp.zeros((num_tokens, hidden_size), jnp.float32)
    for slot in range(top_k):
        y += jnp.where(used[:, slot, None], results[row_of_pair[:, slot]].astype(jnp.float32), 0.0)
    if out_dtype == jnp.bfloat16:
        y = quantization.round_to_bf16(y)
    return y.astype(out_dtype), load


def _sliceable(leaves: Leaves) -> list[jax.Array]:
    """[L, E, ...], L being one where there are no layers, as what XLA slices without reading all of it."""
    # XLA on CPUs slices FP8 arrays by converting them to half precision, whole; bytes it just slices.
    as_bytes = [
        jax.lax.bitcast_convert_type(leaf, jnp.uint8) if leaf.dtype.itemsize == 1 else jnp.asarray(leaf)
        for leaf in leaves
    ]
    return as_bytes if leaves.gate_up.ndim == 5 else [leaf[None] for leaf in as_bytes]


def _expert(
    tokens: jax.Array,
    token_scales: jax.Array,
    routing: jax.Array,
    gate_up: jax.Array,
    gate_up_scale: jax.Array,
    down: jax.Array,
    down_scale: jax.Array,
    *,
    format: Format,
    activation: Activation,
    activation_block: int,
) -> jax.Array:
    """One expert's result bf16[R, H] for rows [R, H] with scales f32[R, H/128] and routing weights f32[R].

    The leaves are those of one expert; FP8 may be bytes, since the format is said.
    """
    intermediate_size = gate_up.shape[0] * weight_layout.PLANE_ROWS
    gate_up_bias, down_bias = None, None
    if format == "fp8_block":
        gate_up_scale = weight_layout.unpack_gate_up_scale(gate_up_scale)
        down_scale = weight_layout.unpack_down_scale(down_scale, intermediate_size)
        matmul: Callable[..., jax.Array] = _scaled_matmul
    else:
        gate_up_bias = weight_layout.unpack_gate_up_bias(gate_up_scale)
        down_bias = weight_layout.unpack_down_bias(down_scale)
        gate_up_scale = weight_layout.unpack_gate_up_row_scale(gate_up_scale)
        down_scale = weight_layout.unpack_down_row_scale(down_scale)
        matmul = _row_scaled_matmul
    if format == "mxfp4":
        gate_up_values = mxfp4.decode(*mxfp4.unpack_gate_up(gate_up))
        down_values = mxfp4.decode(*mxfp4.unpack_down(down))
    else:
        gate_up_values, down_values = weight_layout.unpack_gate_up(gate_up), weight_layout.unpack_down(down)

    both = matmul(tokens, token_scales, gate_up_values, gate_up_scale)
    if gate_up_bias is not None:
        both += gate_up_bias[None, :]
    gate, up = both[:, :intermediate_size], both[:, intermediate_size:]
    activations = activation.apply(gate, up) * routing[:, None]

    quantized, scales = quantization.quantize_activations(activations, activation_block)
    result = matmul(quantized, scales, down_values, down_scale)
    if down_bias is not None:
        result += routing[:, None] * down_bias[None, :]
    return result.astype(jnp.bfloat16)


def _row_scaled_matmul(a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array) -> jax.Array:
    """`_scaled_matmul` for scales f32[N] of B's rows, which multiply the sum over K."""
    return _scaled_matmul(a, a_scale, b, None) * b_scale[None, :]


def _scaled_matmul(a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array | None) -> jax.Array:
    """E4M3 [R, K], scales f32[R, K/S], times the transpose of FP8 [N, K], scales f32[N/128, K/128] -> f32[R, N].

    Each partial sum over S of K is added to the accumulator after scaling, in the order of K. Either operand may be
    held in a wider type than FP8, and B may be without scales.
    """
    num_rows, k = a.shape
    num_columns = b.shape[0]
    num_blocks = a_scale.shape[1]
    block = k // num_blocks
    # BF16 holds every E4M3 and E5M2 value, and FP32 every product of two: as exact as FP32 operands, on every backend.
    a_blocks = jnp.moveaxis(a.astype(jnp.bfloat16).reshape(num_rows, num_blocks, block), 1, 0)
    b_blocks = jnp.moveaxis(b.astype(jnp.bfloat16).reshape(num_columns, num_blocks, block), 1, 0)
    b_scales = None if b_scale is None else jnp.repeat(b_scale.T, weight_layout.BLOCK // block, axis=0)

    def add_block(accumulator: jax.Array, operands: tuple[Any, ...]) -> tuple[jax.Array, None]:
        a_block, b_block, row_scale, column_scale = operands
        partial = jax.lax.dot_general(
            a_block, b_block, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32, precision="highest"
        )
        scale = row_scale[:, None]
        if column_scale is not None:
            scale = scale * jnp.repeat(column_scale, weight_layout.BLOCK)[None, :]
        return accumulator + scale * partial, None

    scales = [a_scale] if b_scale is None else [a_scale, b_scale]
    start = _zeros_like_varying((num_rows, num_columns), jnp.float32, a, b, *scales)
    return jax.lax.scan(add_block, start, (a_blocks, b_blocks, a_scale.T, b_scales))[0]


def _zeros_like_varying(shape: tuple[int, ...], dtype: Any, *others: jax.Array) -> jax.Array:
    """Zeros to start a loop from that, in `shard_map`, count as varying over the mesh axes over which `others` vary."""
    # The sum of no elements is zero, whatever the array holds, and inherits the mark.
    nothing = (jnp.sum(other[(slice(0, 0),) * other.ndim].astype(jnp.float32)) for other in others)
    return jnp.zeros(shape, dtype) + sum(nothing, start=jnp.float32(0)).astype(dtype)
