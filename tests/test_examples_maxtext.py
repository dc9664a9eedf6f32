"""The layer by MaxText's names: against its definitions, and against MaxText itself where that is installed."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from examples import maxtext_layer
from tests.support.cases import one_in


def maxtext_result(config, inputs, gate, bias, wi_0, wi_1, wo, biases):
    """In float64, by MaxText's definitions: of one token after the other."""
    has_scores = config.decoder_block.startswith("deepseek")
    result = np.zeros(inputs.shape)
    for place in np.ndindex(inputs.shape[:2]):
        x = inputs[place]
        scores = x @ gate
        if config.routed_score_func == "sigmoid":
            scores = 1 / (1 + np.exp(-scores))
        elif config.routed_score_func == "sqrtsoftplus":
            scores = np.sqrt(np.log1p(np.exp(scores)))
        elif config.routed_score_func == "softmax":
            scores = np.exp(scores) / np.exp(scores).sum()
        biased = scores if bias is None else scores + bias
        if not has_scores:
            scores = biased
        if config.n_routing_groups > 0:
            groups = biased.reshape(config.n_routing_groups, -1)
            best = np.argsort(-np.sort(groups)[:, -2:].sum(axis=1))[: config.topk_routing_group]
            is_open = np.isin(np.arange(len(groups)), best).repeat(groups.shape[1])
            biased = np.where(is_open, biased, -np.inf)
        chosen = np.argsort(-biased)[: config.num_experts_per_tok]
        weights = scores[chosen] if has_scores else np.exp(scores[chosen] - scores[chosen].max())
        if config.routed_score_func != "softmax":
            weights = weights / weights.sum()
        if has_scores:
            weights = weights * config.routed_scaling_factor
        for expert, weight in zip(chosen, weights, strict=True):
            gate_values, up = x @ wi_0[expert], x @ wi_1[expert]
            if config.mlp_bias:
                gate_values, up = gate_values + biases[0][expert], up + biases[1][expert]
            limit = config.mlp_activations_limit
            if limit > 0 and (has_scores or config.decoder_block == "gpt_oss"):
                gate_values, up = np.minimum(gate_values, limit), np.clip(up, -limit, limit)
            if config.decoder_block == "gpt_oss":
                activation = gate_values / (1 + np.exp(-1.702 * gate_values)) * (up + 1)
            else:
                activation = gate_values / (1 + np.exp(-gate_values)) * up
            result[place] += weight * (activation @ wo[expert] + (biases[2][expert] if config.mlp_bias else 0))
    return result


DEEPSEEK3 = dict(model_name="deepseek3-671b", decoder_block="deepseek", routed_score_func="sigmoid", routed_bias=True)
# Fields of both configurations, MaxText's and ours.
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": dict(decoder_block="mixtral"),
    # Which neither has, there.
    "mixtral, factor and limit": dict(decoder_block="mixtral", routed_scaling_factor=2.5, mlp_activations_limit=0.5),
    "deepseek3": DEEPSEEK3 | dict(routed_scaling_factor=2.5, n_routing_groups=4, topk_routing_group=2),
    "deepseek3, limit": DEEPSEEK3 | dict(mlp_activations_limit=0.5),
    "deepseek2": dict(
        model_name="deepseek2-16b", decoder_block="deepseek", routed_score_func="softmax", routed_scaling_factor=1.5
    ),
    "deepseek4": dict(
        model_name="deepseek4-284b",
        decoder_block="deepseek4",
        routed_score_func="sqrtsoftplus",
        routed_scaling_factor=1.5,
        routed_bias=True,
        mlp_activations_limit=10.0,
    ),
    "gpt_oss": dict(
        model_name="gpt-oss-20b",
        decoder_block="gpt_oss",
        routed_bias=True,
        mlp_activations=["sigmoid", "linear"],
        mlp_activations_limit=0.7,
        mlp_bias=True,
    ),
}
AXES = ("data", "fsdp", "tensor", "expert")
one_device_and_sharded = pytest.mark.parametrize("is_sharded", [False, True], ids=["one device", "sharded"])


def assert_close(y, wanted):
    # Weights, tokens and activations are rounded to FP8, each by 0.03 (root of the mean square) of its values; 0.07 was
    # measured, and 0.08 with the limit.
    assert np.linalg.norm(np.asarray(y, np.float64) - wanted) / np.linalg.norm(wanted) < 0.1


@pytest.mark.parametrize(("is_sharded", "name"), one_in(2, {"sharded": True, "one device": False}, list(FAMILIES)))
def test_maxtext_names_mean_what_they_mean_there(name, is_sharded):
    config = maxtext_layer.Config(4, **FAMILIES[name])
    rng = np.random.default_rng(0)
    wi_0, wi_1, wo = (rng.standard_normal(s) / s[1] ** 0.5 for s in ((16, 256, 128), (16, 256, 128), (16, 128, 256)))
    gate, bias = rng.standard_normal((256, 16)) / 8, rng.standard_normal(16) / 10 if config.routed_bias else None
    biases = [rng.standard_normal((16, size)) / 3 for size in (128, 128, 256)] if config.mlp_bias else None
    inputs = np.asarray(jnp.asarray(rng.standard_normal((8, 2, 256)), jnp.bfloat16))
    mesh = None
    if is_sharded:
        mesh = jax.make_mesh((2, 2, 1, 2), AXES, axis_types=(AxisType.Auto,) * 4, devices=jax.devices()[:8])

    def f32(arrays: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), arrays)

    packed_biases = None if biases is None else tuple(f32(biases))
    weights = maxtext_layer.pack(f32(wi_0), f32(wi_1), f32(wo), mesh, packed_biases)
    x = jax.device_put(inputs, None if mesh is None else NamedSharding(mesh, P(maxtext_layer.BATCH_AXES)))
    router = f32(gate), f32(bias)
    y = jax.jit(lambda x, weights: maxtext_layer.routed_moe(config, mesh, x, *router, weights))(x, weights)
    wanted = maxtext_result(config, inputs.astype(np.float64), gate, bias, wi_0, wi_1, wo, biases)
    assert_close(y, wanted)


@one_device_and_sharded
@pytest.mark.parametrize("name", FAMILIES)
def test_maxtext_itself_gives_the_same(name, is_sharded):
    # Not in CI: it wants some hundred packages. MaxText's mesh has all of its axes, 14.
    pytest.importorskip("maxtext", reason="needs MaxText (docs/models.md), as nothing else here")
    nnx = pytest.importorskip("flax.nnx", reason="needs Flax, as MaxText does")
    from maxtext.configs import pyconfig
    from maxtext.layers import moe
    from maxtext.layers.initializers import nd_dense_init
    from maxtext.utils import maxtext_utils

    options: dict[str, Any] = dict(
        emb_dim=256, base_emb_dim=256, base_moe_mlp_dim=128, base_mlp_dim=128, num_experts=16
    )
    options |= dict(num_experts_per_tok=4, per_device_batch_size=1, max_target_length=2, dtype="float32")
    options |= dict(megablox=False, sparse_matmul=False, matmul_precision="highest", override_model_config=True)
    options |= dict(
        attention="dot_product",
        run_name="x",
        enable_checkpointing=False,
        skip_jax_distributed_system=True,
        log_config=False,
    )
    options |= dict(ici_data_parallelism=2, ici_fsdp_parallelism=1, ici_expert_parallelism=4) if is_sharded else {}
    options |= FAMILIES[name]
    config = pyconfig.initialize(["", str(Path(pyconfig.__file__).parent / "base.yml")], **options)
    one = np.array(jax.devices()[:1]).reshape((1,) * len(config.mesh_axes))
    mesh = Mesh(maxtext_utils.create_device_mesh(config) if is_sharded else one, config.mesh_axes)
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.standard_normal((8, 2, 256)), jnp.bfloat16)
    with jax.set_mesh(mesh):
        layer = moe.RoutedMoE(
            config=config,
            num_experts=16,
            num_experts_per_tok=4,
            mesh=mesh,
            kernel_init=nd_dense_init(1.0, "fan_in", "truncated_normal"),
            kernel_axes=("embed", "mlp"),
            rngs=nnx.Rngs(0),
            intermediate_dim=128,
        )
        parts = [layer.wi_0_bias, layer.wi_1_bias, layer.wo_bias]
        for part, size in ((layer.gate.kernel, 8), (layer.gate.bias, 10), *((part, 3) for part in parts)):
            if part is not None:
                part.set_value(jnp.asarray(rng.standard_normal(part.shape) / size, jnp.float32))
        wanted = np.asarray(layer(inputs.astype(jnp.float32))[0], np.float64)

    def array(part):
        return None if part is None else jnp.asarray(np.asarray(part.get_value()))

    ours = mesh if is_sharded else None
    biases = tuple(map(array, parts)) if config.mlp_bias else None
    weights = maxtext_layer.pack(array(layer.wi_0), array(layer.wi_1), array(layer.wo), ours, biases)
    router = array(layer.gate.kernel), array(layer.gate.bias)
    y = jax.jit(lambda x, weights: maxtext_layer.routed_moe(config, ours, x, *router, weights))(inputs, weights)
    assert_close(y, wanted)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(decoder_block="llama4"), "decoder_block is 'llama4', whose router is not served here"),
        (dict(routed_score_func="sigmoid"), "a softmax over scores is not served"),
        (dict(decoder_block="deepseek"), "routed_score_func is '', wanted 'sigmoid'"),
        (dict(decoder_block="deepseek", routed_score_func="softmax"), "model_name is 'default', whose router's bias"),
        (dict(mlp_activations=("gelu", "linear")), r"wanted \['silu', 'linear'\] with 'llama2'"),
        (dict(decoder_block="gpt_oss"), r"wanted \['sigmoid', 'linear'\] with 'gpt_oss'"),
        (dict(decoder_block="gpt_oss", mlp_activations=("sigmoid", "linear")), "wanted a positive one"),
        (dict(mlp_bias=True), "weights have no biases: give them to pack"),
        (dict(decoder_block="nonsense"), "decoder_block is 'nonsense', whose router is not served here"),
        (dict(routed_bias=False), "routed_bias is False, wanted gate_bias if and only if it is set"),
        (dict(capacity_factor=1.0), "wanted neither: this layer drops no token"),
        (dict(use_random_routing=True), "wanted neither: this layer drops no token"),
    ],
)
def test_what_maxtext_has_and_the_layer_has_not_is_refused(options, message):
    matrix = jnp.zeros((4, 128, 128))
    weights = maxtext_layer.pack(matrix, matrix, matrix)
    x, gate, bias = jnp.zeros((1, 1, 128)), jnp.zeros((128, 4)), jnp.zeros(4)
    with pytest.raises(ValueError, match=message):
        maxtext_layer.routed_moe(
            maxtext_layer.Config(2, **({"routed_bias": True} | options)), None, x, gate, bias, weights
        )
