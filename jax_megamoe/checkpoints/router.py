"""Routers of checkpoints: their arrays, and what their configurations say to `route` and to `moe`."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jax_megamoe.activations import SiTU, can_bound
from jax_megamoe.arrays import as_array, clamp_to_int32, text_of
from jax_megamoe.checkpoints.families import MAX_TEXT, Config, Family
from jax_megamoe.checkpoints.folder import Tensors
from jax_megamoe.checkpoints.safetensors import Array, Tensor
from jax_megamoe.errors import ArgumentError, ShapeError
from jax_megamoe.routing import route
from jax_megamoe.routing_arrays import GroupScoring, Scoring

# Activations of configurations that `moe` computes; None is its default.
_ACTIVATIONS = ("silu", "swish")
_SITU = "situ"
# Ways to choose experts, by DeepSeek's names, and how groups of experts are scored: with a bias added to the scores, or
# without one; and without groups.
_WITH_BIAS = "noaux_tc"
_GROUP_SCORING: dict[str, GroupScoring | None] = {
    _WITH_BIAS: "sum_of_two",
    "group_limited_greedy": "max",
    "greedy": None,
}


@dataclass(frozen=True, eq=False)
class Router:
    """A layer's router: logits are x @ weight.T, and `route` chooses experts as the model does.

    That is `jax_megamoe.route(logits, bias=bias, **options)`, of gpt-oss with `logit_bias` added to the logits before,
    in hash layers with `hash_table` and `token_ids`, and of models that see with `image_bias` and `is_image`.
    `shared_gate` is a linear layer whose sigmoid weighs the S shared experts. A pytree of its arrays.
    """

    weight: jax.Array  # f32[E, H], of the model's H, where experts are narrower too
    bias: jax.Array | None  # f32[E]
    hash_table: jax.Array | None  # int32[vocabulary, k]
    options: dict[str, Any] = field(default_factory=dict)  # keywords of `route`
    image_bias: jax.Array | None = None  # f32[E]
    shared_gate: jax.Array | None = None  # f32[S, H]
    logit_bias: jax.Array | None = None  # f32[E], added to the logits

    def route(
        self,
        logits: jax.Array | np.ndarray,
        *,
        token_ids: jax.Array | np.ndarray | None = None,
        is_image: jax.Array | np.ndarray | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Ids int32[..., k] and weights f32[..., k] of logits [..., E], as `jax_megamoe.route` with all that is here.

        Args:
          logits: x @ weight.T; `logit_bias` is added here.
          token_ids: int [...], needed in hash layers; elsewhere without influence.
          is_image: bool [...], which tokens are of images, for models that see; None: none.

        Raises:
          ArgumentError: for a hash layer without `token_ids`, for `is_image` where the model has no `image_bias`, and
            where `jax_megamoe.route` raises one.
        """
        if self.hash_table is not None and token_ids is None:
            raise ArgumentError("token_ids is None, wanted the tokens' ids: this layer chooses experts by a table.")
        if is_image is not None and self.image_bias is None:
            raise ArgumentError("is_image is an array, wanted None: the model has no bias of its own for images.")
        if self.logit_bias is not None:
            logits = _add_to_logits(logits, self.logit_bias)
        return route(
            logits,
            bias=self.bias,
            token_ids=None if self.hash_table is None else token_ids,
            hash_table=self.hash_table,
            image_bias=None if is_image is None else self.image_bias,
            is_image=is_image,
            **self.options,
        )


ARRAYS = ("weight", "bias", "hash_table", "image_bias", "shared_gate", "logit_bias")


def _add_to_logits(logits: jax.Array | np.ndarray, bias: jax.Array) -> jax.Array | np.ndarray:
    """f32[..., E] of logits [..., E] of any floating type. Raises `ShapeError` for other shapes."""
    logits, bias = as_array("logits", logits), jnp.asarray(as_array("logit_bias", bias))
    if logits.shape[-1:] != bias.shape:
        raise ShapeError(
            f"logits has shape {logits.shape}, wanted [..., {bias.shape[0]}]: pass one score for each expert."
        )
    # What is no float is refused by `route`.
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        return logits
    return jnp.asarray(logits, np.float32) + bias.reshape((1,) * (logits.ndim - 1) + bias.shape)


def _flatten(router: Router) -> tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]]:
    """Its arrays, and its options, which programs are compiled for."""
    return tuple(getattr(router, name) for name in ARRAYS), tuple(sorted(router.options.items()))


jax.tree_util.register_pytree_node(
    Router, _flatten, lambda options, arrays: Router(**dict(zip(ARRAYS, arrays, strict=True)), options=dict(options))
)


def read_router(tensors: Tensors, stem: str, family: Family, config: Config, layer: int) -> Router:
    """The router below `{stem}.`, with one gate for all shared experts.

    Raises `CheckpointError` for tensors that are missing or of another shape.
    """
    num_experts, top_k, size = config.count("num_experts"), config.count("top_k"), config.stated("model_size")

    def read(name: str | None, shape: tuple[int | None, ...], is_required: bool) -> jax.Array | None:
        if name is None or (f"{stem}.{name}" not in tensors and not is_required):
            return None
        array: jax.Array = jax.device_put(_floats(tensors.require(f"{stem}.{name}"), shape))
        return array

    table = None
    if family.hash_table is not None and (config.is_hashed(layer) or f"{stem}.{family.hash_table}" in tensors):
        tensor = tensors.require(f"{stem}.{family.hash_table}")
        if config.is_hashed(layer) is False:
            raise tensor.error(
                f"chooses the experts of layer {layer}, which by config.json chooses them by scores: look whether they "
                "belong together."
            )
        table = jax.device_put(_table(tensor, num_experts, top_k, config))
    # Every model here that adds a bias always does, unless it says otherwise; its hash layers need none.
    has_bias = config.get("has_bias", bool)
    if has_bias is None:
        has_bias = _method(config) == _WITH_BIAS
    weight = read(family.router, (num_experts, size), True)
    assert weight is not None
    return Router(
        weight=weight,
        bias=read(family.bias, (num_experts,), table is None) if has_bias else None,
        hash_table=table,
        options=_route_options(family, config, num_experts, top_k),
        image_bias=read(family.image_bias, (num_experts,), False),
        shared_gate=read(family.shared_gate, (1, size), bool(config.get("shared_size", int))),
        logit_bias=read(family.logit_bias, (num_experts,), True),
    )


def _method(config: Config) -> str:
    """How experts are chosen. Raises `CheckpointError` for a way that `route` does not have."""
    method = config.fields.get("topk_method", _WITH_BIAS)
    if method not in (None, *_GROUP_SCORING):
        raise config.error(
            f"has topk_method = {text_of(method, MAX_TEXT)}, wanted one of {', '.join(_GROUP_SCORING)}: "
            "route has no other."
        )
    return str(method or _WITH_BIAS)


def moe_options(family: Family, config: Config) -> dict[str, Any]:
    """Keywords of `moe`. Raises `CheckpointError` for an activation that it does not compute."""
    activation = config.get("activation", str) or _ACTIVATIONS[0]
    if activation not in (*_ACTIVATIONS, _SITU):
        raise config.error(
            f"has hidden_act = {text_of(activation, MAX_TEXT)}, wanted {_ACTIVATIONS[0]!r} or {_SITU!r}: moe of this "
            "version computes no other."
        )
    options: dict[str, Any] = {}
    if activation == _SITU:
        beta, linear_beta = _number(config, "situ_beta"), _number(config, "situ_linear_beta")
        if beta is None or linear_beta is None or not can_bound(beta, linear_beta):
            raise config.error(
                f"has bounds {beta} and {linear_beta} of its activation, wanted two positive numbers, "
                "activation_situ_beta and activation_situ_linear_beta: take them from its source."
            )
        options["activation"] = SiTU(beta, linear_beta)
        if config.get("clamp", (int, float)):
            raise config.error("has a swiglu_limit beside hidden_act = 'situ': look which of them the model has.")
    elif family.activation is not None:
        alpha = _number(config, "alpha")
        options["activation"] = family.activation if alpha is None else replace(family.activation, alpha=alpha)
    clamp = _number(config, "clamp")
    if (clamp := family.clamp if clamp is None else clamp) is not None:
        if not clamp >= 0:
            raise config.error(
                f"has an activation clamp of {clamp}, wanted a positive number: take it from its source."
            )
        if clamp > 0:
            options["activation_clamp"] = clamp
    if (factor := _number(config, "scaling_factor")) is not None:
        options["routed_scaling_factor"] = factor
    return options


def _number(config: Config, what: str) -> float | None:
    value = config.get(what, (int, float))
    try:
        number = None if value is None else float(value)
    except OverflowError as error:
        raise config.error(f"has {what} beyond all floats: take it from its source.") from error
    if number is not None and not math.isfinite(number):
        raise config.error(f"has {what} = {number}, wanted a finite number: take it from its source.")
    return number


def _route_options(family: Family, config: Config, num_experts: int, top_k: int) -> dict[str, Any]:
    scoring = config.get("scoring", str) or family.scoring
    if scoring not in get_args(Scoring):
        raise config.error(
            f"has scoring {text_of(scoring, MAX_TEXT)}, wanted one of {', '.join(get_args(Scoring))}: "
            "route has no other."
        )
    if config.get("uses_sigmoid", bool) is False and scoring == "sigmoid":
        raise config.error("has moe_router_use_sigmoid = False, wanted True: which scores it has instead is not known.")
    renormalize = config.get("renormalize", bool)
    renormalize = family.renormalize if renormalize is None else renormalize
    options: dict[str, Any] = {"top_k": top_k, "scoring": scoring, "renormalize": renormalize}
    if family.states_groups and config.stated("num_groups") is None:
        raise config.error(
            f"has no {config.key('num_groups')}, wanted how many groups its experts are in: take it from its source."
        )
    num_groups = config.count("num_groups", 1) if family.has_groups else 1
    group_scoring = _GROUP_SCORING[_method(config)]
    num_eligible, of_groups = num_experts, ""
    if num_groups > 1 and group_scoring is not None:
        options["num_groups"] = num_groups
        options["top_groups"] = top_groups = config.count("top_groups", num_groups)
        options["group_scoring"] = group_scoring
        if num_experts % num_groups or top_groups > num_groups:
            raise config.error(
                f"has {config.key('num_groups')} = {num_groups} and {config.key('top_groups')} = {top_groups}, wanted "
                f"a divisor of its {num_experts} experts and at most that: take them from its source."
            )
        num_eligible, of_groups = num_experts // num_groups * top_groups, f" that {top_groups} of its groups have"
    if top_k > num_eligible:
        raise config.error(
            f"has {config.key('top_k')} = {top_k}, wanted at most the {num_eligible} experts{of_groups}: take it from "
            "its source."
        )
    return options


def _floats(tensor: Tensor, shape: tuple[int | None, ...]) -> Array:
    """The tensor as f32. Raises `CheckpointError` unless it is of floats and of this shape, None being any size."""
    fits = len(tensor.shape) == len(shape) and all(
        found > 0 and size in (None, found) for size, found in zip(shape, tensor.shape, strict=True)
    )
    if not fits or tensor.dtype not in ("F32", "BF16", "F16"):
        text = ", ".join("H" if size is None else str(size) for size in shape)
        raise tensor.error(
            f"is {tensor.dtype} {tensor.shape}, wanted floats [{text}]: look whether config.json is its own."
        )
    return tensor.array().astype(np.float32)


def _table(tensor: Tensor, num_experts: int, top_k: int, config: Config) -> Array:
    if tensor.dtype not in ("I32", "I64") or len(tensor.shape) != 2 or tensor.shape[1] != top_k:
        raise tensor.error(
            f"is {tensor.dtype} {tensor.shape}, wanted integers [vocabulary, {top_k}]: look whether config.json is its "
            "own."
        )
    # It may be filled up to a size that suits somebody.
    if tensor.shape[0] < (vocabulary := config.stated("vocabulary") or 0):
        raise tensor.error(
            f"has {tensor.shape[0]} rows, wanted one for each of {config.key('vocabulary')} = {vocabulary} of "
            "config.json: look whether they belong together."
        )
    table = tensor.array()
    if table.size and (table.min() < 0 or table.max() >= num_experts):
        raise tensor.error(
            f"names experts {table.min()} to {table.max()}, wanted 0 to {num_experts - 1}: it is damaged."
        )
    return clamp_to_int32(table)
