"""What went wrong when a stranger tried to load checkpoints: each stays mended."""

import os
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_megamoe as mm
from jax_megamoe.errors import ArgumentError, CheckpointError
from tests.support.checkpoints import E, H, I, K, Named, build, write
from tests.support.compare import bits
from tests.support.families import PLANS


def stored(folder: Path, name: str) -> tuple[Path, Any]:
    stock = build(PLANS[name])
    return write(folder, stock.config, stock.tensors), stock


def test_loading_with_numbers_of_64_bits(tmp_path):
    folder, _ = stored(tmp_path, "deepseek-v3")
    wanted = mm.load_experts(folder)
    with jax.enable_x64(True):
        found = mm.load_experts(folder)
    for one, other in zip(found.leaves, wanted.leaves, strict=True):
        np.testing.assert_array_equal(np.asarray(one).view(np.uint8), np.asarray(other).view(np.uint8))


def test_layers_of_several_formats_have_to_be_asked_for(tmp_path):
    stock = build(PLANS["deepseek-v4"])
    first, second = PLANS["deepseek-v4"].moe_layers[:2]
    floats: Named = {}
    for name, array in stock.tensors.items():
        if f".{second}.ffn.experts." in name or name.startswith(f"layers.{second}.ffn.experts."):
            if name.endswith(".weight"):
                rows = array.shape[0]
                columns = H if rows == I else I
                floats[name] = np.ones((rows, columns), ml_dtypes.bfloat16)
        else:
            floats[name] = array
    folder = write(tmp_path, stock.config, floats)
    assert mm.load_experts(folder, first).format == "mxfp4"
    assert mm.load_experts(folder, second).format == "fp8_block"
    with pytest.raises(
        ArgumentError, match="format is None and the layers hold mxfp4 and fp8_block .* wanted one format"
    ):
        mm.read_checkpoint(folder).experts(layers=[first, second])
    assert mm.read_checkpoint(folder).experts(layers=[first, second], format="mxfp4").num_layers == 2


@pytest.mark.parametrize(
    ("plan", "suffix", "array", "text"),
    [
        ("qwen3-bf16", ".weight_scale_inv", np.ones((1, 2), np.float32), r"beside .*gate_proj\.weight' of BF16"),
        (
            "deepseek-v3",
            ".weight_scale",
            np.ones((1, 2), np.float32),
            r"beside .*weight_scale_inv', wanted one of them",
        ),
    ],
)
def test_what_lies_beside_a_weight_is_not_dropped(plan, suffix, array, text, tmp_path):
    stock = build(PLANS[plan])
    stock.tensors[f"model.layers.1.mlp.experts.3.gate_proj{suffix}"] = array
    with pytest.raises(CheckpointError, match=text):
        mm.load_experts(write(tmp_path, stock.config, stock.tensors), 1)


def test_experts_in_two_ways(tmp_path):
    stock = build(PLANS["qwen3.5-bf16"])
    (stem,) = {name.rsplit(".", 1)[0] for name in stock.tensors if "layers.1." in name and "gate_up_proj" in name}
    stock.tensors[f"{stem}.0.gate_proj.weight"] = np.ones((I, H), ml_dtypes.bfloat16)
    with pytest.raises(CheckpointError, match=r"experts\.0\.gate_proj\.weight' is of one expert beside"):
        mm.load_experts(write(tmp_path, stock.config, stock.tensors), 1)


def test_a_router_chooses_as_the_model_does(tmp_path):
    folder, stock = stored(tmp_path, "deepseek-v4")
    checkpoint = mm.read_checkpoint(folder)
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((5, E)), jnp.float32)
    tokens = jnp.arange(5)
    hashed = 0
    for layer in checkpoint.moe_layers:
        router = checkpoint.router(layer)
        ids, probs = router.route(logits, token_ids=tokens)
        if router.hash_table is None:
            wanted = mm.route(logits, bias=router.bias, **router.options)
            with pytest.raises(ArgumentError, match="is_image is an array, wanted None"):
                router.route(logits, is_image=tokens > 2)
        else:
            hashed += 1
            wanted = mm.route(logits, token_ids=tokens, hash_table=router.hash_table, **router.options)
            np.testing.assert_array_equal(ids, np.asarray(router.hash_table)[:5])
            with pytest.raises(ArgumentError, match="token_ids is None, wanted the tokens' ids"):
                router.route(logits)
        np.testing.assert_array_equal(ids, wanted[0])
        np.testing.assert_array_equal(bits(probs), bits(wanted[1]))
        assert ids.shape == (5, K)
    assert hashed == PLANS["deepseek-v4"].hash_layers


def test_a_file_that_got_shorter_is_an_error_and_no_signal(tmp_path):
    folder, _ = stored(tmp_path, "deepseek-v3")
    checkpoint = mm.read_checkpoint(folder)
    checkpoint.experts(1)
    for file in Path(folder).glob("*.safetensors"):
        os.truncate(file, 20000)
    with pytest.raises(CheckpointError, match="has 20000 bytes and had"):
        checkpoint.experts(2)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_pipe_is_not_waited_for(name, tmp_path):
    folder, _ = stored(tmp_path, "deepseek-v3")
    path = Path(folder) / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="is no regular file"):
        mm.read_checkpoint(folder)


@pytest.mark.parametrize(
    ("plan", "field", "value", "text"),
    [
        ("kimi-k2", "routed_scaling_factor", 10**400, "has scaling_factor beyond all floats"),
        ("deepseek-v4", "swiglu_limit", -1.0, "has an activation clamp of -1.0, wanted a positive number"),
    ],
)
def test_numbers_that_are_none(plan, field, value, text, tmp_path):
    stock = build(PLANS[plan])
    stock.config[field] = value
    checkpoint = mm.read_checkpoint(write(tmp_path, stock.config, stock.tensors))
    with pytest.raises(CheckpointError, match=text):
        checkpoint.moe_options(checkpoint.moe_layers[0])


def test_the_word_that_is_wrong_is_named(tmp_path):
    stock = build(PLANS["qwen3-bf16"])
    stock.config["num_experts"] = 0
    with pytest.raises(CheckpointError, match=r"has num_experts = 0, wanted a positive number"):
        mm.read_checkpoint(write(tmp_path, stock.config, stock.tensors)).experts(1)


def test_a_small_file_takes_little_memory(tmp_path):
    """Reading up to a limit allocates the limit."""
    folder, _ = stored(tmp_path, "qwen3-bf16")
    mm.read_checkpoint(folder)
    tracemalloc.start()
    mm.read_checkpoint(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
