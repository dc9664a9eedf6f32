"""Checkpoints that cannot be loaded: each is named, with its file and tensor, and never becomes wrong weights."""

import json
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType

import jax_megamoe as mm
from jax_megamoe.errors import ArgumentError, CheckpointError, LayoutError
from tests.support.changed_checkpoints import Change, all_of, make, replace, with_config, with_tensor, without
from tests.support.checkpoints import E, H, I, Named, build, mxfp4, write
from tests.support.families import PLANS
from tests.support.meshes import make_mesh

STEM = "model.layers.1.mlp.experts"


def gate(number: int, value: Any) -> Change:
    """The gate of one expert of layer 1."""

    def change(_: dict[str, Any], held: Named) -> None:
        held[f"{STEM}.{number}.gate_proj.weight"] = value

    return change


BYTES, INTS = np.zeros((I, H), np.int8), np.zeros((I, H // 8), np.int32)
E4M3_SCALE = np.ones((I, H // 16), ml_dtypes.float8_e4m3fn)
FLOATS = np.zeros((I, H), ml_dtypes.bfloat16)
# Of a plan, a change, and what the error says. Each changes one thing.
EXPERTS: dict[str, tuple[str, Change, str]] = {
    # Kimi-K2.5 and others: compressed-tensors "pack-quantized".
    "INT4": (
        "kimi-k2",
        all_of(replace(".weight", (".weight_packed", INTS)), replace(".weight_scale_inv", (".weight_scale", FLOATS[:, :8]))),
        r"experts\.0\.gate_proj\.weight_packed' is of INT4: the kernel multiplies no integers",
    ),
    "GPTQ": ("qwen3-fp8", replace(".weight", (".qweight", INTS)), r"gate_proj\.qweight' is of GPTQ or AWQ"),
    "INT8": (
        "kimi-k2",
        all_of(replace(".weight", (".weight", BYTES)), replace(".weight_scale_inv", (".weight_scale", FLOATS[:, :1]))),
        r"gate_proj\.weight' is of INT8",
    ),
    "NVFP4 of compressed-tensors": (
        "kimi-k2",
        all_of(
            replace(".weight", (".weight_packed", BYTES[:, : H // 2].view(np.uint8))),
            replace(".weight_scale_inv", (".weight_scale", E4M3_SCALE)),
        ),
        r"gate_proj\.weight_packed' is of NVFP4",
    ),
    "NVFP4 of ModelOpt": (
        "kimi-k2",
        all_of(
            replace(".weight", (".weight", BYTES[:, : H // 2].view(np.uint8)), (".weight_scale_2", np.ones((), np.float32))),
            replace(".weight_scale_inv", (".weight_scale", E4M3_SCALE)),
        ),
        r"gate_proj\.weight_scale_2' is of NVFP4",
    ),
    "MXFP8": (
        "kimi-k2",
        replace(".weight_scale_inv", (".weight_scale", np.full((I, H // 32), 127, np.uint8))),
        r"gate_proj\.weight' is of MXFP8",
    ),
    "blocks of 64x64": (
        "kimi-k2",
        replace(".weight_scale_inv", (".weight_scale_inv", np.full((I // 64, H // 64), 127, np.uint8))),
        r"with a scale U8 \(2, 4\) \('_scale_inv'\), wanted one of: floats, FP8 with a scale for each 128x128 block",
    ),
    "no scale": (
        "kimi-k2",
        replace(".weight_scale_inv"),
        r"is F8_E4M3 \(128, 256\) without a scale beside it, wanted .*: download all files of the checkpoint, or dequant",
    ),
    "another type": ("qwen3-bf16", replace(".weight", (".weight", FLOATS.astype(np.int64))), r"is I64 \(128, 256\) without.*block: dequant"),
    "biases": (
        "qwen3-bf16",
        with_tensor(f"{STEM}.0.up_proj.bias", np.zeros(I, np.float32)),
        r"up_proj\.bias' is added to the projection, which experts of this family do without: look whether config",
    ),
    "biases of all experts": (
        "qwen3-bf16",
        with_tensor(f"{STEM}.down_proj_bias", np.zeros((E, H), np.float32)),
        r"experts\.down_proj_bias' is added to the projection, which experts of this family do without",
    ),
    "one expert beside all": (
        "qwen3.5-bf16",
        with_tensor("model.language_model.layers.1.mlp.experts.1.gate_proj.weight", FLOATS),
        r"experts\.1\.gate_proj\.weight' is of one expert beside",
    ),
    "an expert missing": (
        "kimi-k2",
        without(*(f"{STEM}.{E - 1}.{p}.weight{s}" for p in ("gate_proj", "up_proj", "down_proj") for s in ("", "_scale_inv"))),
        rf"tensor '{STEM}\.7\.gate_proj\.weight' is missing",
    ),
    "a matrix missing": ("qwen3-bf16", without(f"{STEM}.3.up_proj.weight"), r"experts\.3\.up_proj\.weight' is missing"),
    "a scale missing": ("kimi-k2", without(f"{STEM}.3.up_proj.weight_scale_inv"), r"experts\.3\.up_proj\.weight' is F8_E4M3"),
    "one of another type": ("kimi-k2", gate(2, FLOATS), r"experts\.2\.gate_proj\.weight_scale_inv' is beside '.*gate_proj\.weight' of BF16"),
    "one of another shape": ("qwen3-bf16", gate(2, FLOATS[:, :128]), r"experts\.2\.gate_proj\.weight' is BF16 \(128, 128\)"),
    "transposed": (
        "qwen3-bf16",
        replace("gate_proj.weight", ("gate_proj.weight", FLOATS.T.copy())),
        r"gate_proj\.weight' is of matrices \[256, 128\], wanted the hidden size 256 of config\.json",
    ),
    "down of another shape": (
        "qwen3-bf16",
        replace("down_proj.weight", ("down_proj.weight", FLOATS)),
        r"down_proj\.weight' is of a matrix \(128, 256\), wanted \(256, 128\)",
    ),
    "a vector": ("qwen3-bf16", gate(0, FLOATS[0]), r"has shape \(256,\), wanted \[N, K\]"),
    "fused with a scale for rows of gate and of up": (
        "qwen3.5-bf16",
        all_of(*(
            with_tensor(f"model.language_model.layers.1.mlp.experts.{name}", array)
            for p, rows, columns in (("gate_up_proj", 192, H), ("down_proj", H, 96))
            for name, array in (
                (p, np.zeros((E, rows, columns), ml_dtypes.float8_e4m3fn)),
                (f"{p}_scale_inv", np.ones((E, -(-rows // 128), -(-columns // 128)), np.float32)),
            )
        )),
        r"gate_up_proj' has scales that rows of gate share with rows of up",
    ),
    "two encodings": (
        "kimi-k2",
        all_of(
            replace("down_proj.weight", ("down_proj.weight", FLOATS.T.copy())), replace("down_proj.weight_scale_inv")
        ),
        r"down_proj\.weight' and those of gate and up are of FP8 .* and floats, wanted one",
    ),
    "fused with a scale and transposed": (
        "qwen3.5-transposed",
        lambda _, held: held.update({
            name: array.astype(ml_dtypes.float8_e4m3fn) if ".experts." in name else array for name, array in held.items()
        } | {
            f"model.language_model.layers.1.mlp.experts.{p}_scale_inv": np.ones((E, *s), np.float32)
            for p, s in (("gate_up_proj", (2, 2)), ("down_proj", (1, 2)))
        }),
        "is transposed, .*, and has scales",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_that_cannot_be_loaded(name, tmp_path):
    plan, change, text = EXPERTS[name]
    checkpoint = make(tmp_path, plan, change)
    with pytest.raises(CheckpointError, match=text) as caught:
        checkpoint.experts(1)
    assert caught.value.tensor is not None and str(caught.value).endswith(".")


FOLDERS: dict[str, tuple[Change, str]] = {
    "unknown family": (with_config(model_type="mixtral"), "has model_type 'mixtral', wanted one of deepseek_v3, "),
    "no family": (lambda config, _: config.pop("model_type"), "has model_type None"),
    "Llama-4": (with_config(model_type="llama4_text"), "'llama4_text', which weighs the input of an expert"),
    "no number of experts": (lambda config, _: config.pop("n_routed_experts"), "n_routed_experts = None"),
    "more experts": (with_config(n_routed_experts=4), "has 4 experts, and layer 1 of the files has number 7"),
    "a number of layers": (with_config(num_hidden_layers=10**9), "has 1000000000 layers, wanted at most"),
    "a number in words": (with_config(num_hidden_layers="three"), "has num_hidden_layers = 'three'"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_other_models(name, tmp_path):
    change, text = FOLDERS[name]
    with pytest.raises(CheckpointError, match=text) as caught:
        make(tmp_path, "kimi-k2", change)
    assert caught.value.file == str(tmp_path / "config.json")


def test_more_experts_in_the_configuration_are_missed(tmp_path):
    checkpoint = make(tmp_path, "kimi-k2", with_config(n_routed_experts=2 * E))
    with pytest.raises(CheckpointError, match=r"experts\.8\.gate_proj\.weight' is missing"):
        checkpoint.experts(1)


def test_a_layer_that_is_missing_is_missed(tmp_path):
    """All layers are asked for, and one is not there: not a shorter stack."""

    def change(_: dict[str, Any], held: Named) -> None:
        for key in [key for key in held if ".layers.2." in key]:
            del held[key]

    checkpoint = make(tmp_path, "kimi-k2", change)
    assert checkpoint.moe_layers == [1, 2]
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.experts\.0\.gate_proj\.weight' is missing"):
        checkpoint.experts()


def test_a_model_without_experts(tmp_path):
    def change(config: dict[str, Any], held: Named) -> None:
        config["first_k_dense_replace"] = 3
        for key in [key for key in held if ".experts." in key]:
            del held[key]

    checkpoint = make(tmp_path, "kimi-k2", change)
    assert checkpoint.moe_layers == [] and "no layers" in repr(checkpoint)
    with pytest.raises(CheckpointError, match="has no layer with experts"):
        checkpoint.experts()
    with pytest.raises(CheckpointError, match="has no experts in layer 1"):
        checkpoint.experts(1)


@pytest.mark.parametrize("text, problem", [(None, "cannot be read"), ("{", "no JSON"), ("3", "no object")])
def test_no_configuration(text, problem, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{problem}"):
        mm.read_checkpoint(tmp_path)


def spread(exponents: list[int], expert: int = 5) -> Change:
    """Row 7 of an expert's down has these exponents in its first groups, and no zeros."""

    def change(_: dict[str, Any], held: Named) -> None:
        stem = f"layers.1.ffn.experts.{expert}.w2"
        codes, scale = held[f"{stem}.weight"].copy(), held[f"{stem}.scale"].view(np.uint8).copy()
        codes[7], scale[7, : len(exponents)] = 0x22, exponents
        held[f"{stem}.weight"], held[f"{stem}.scale"] = codes, scale.view(ml_dtypes.float8_e8m0fnu)

    return change


@pytest.mark.parametrize("exponents, format, text", [
    ([118, 100], "mxfp4", None),
    ([118, 91], "mxfp4", r"experts\.5\.w2\.weight' has exponents from 91 to 118 in row 7, wanted at most 26"),
    ([118, 255], "mxfp4", "exponent of 255"),
    ([118, 104], "fp8_block", None),
    ([118, 103], "fp8_block", r"experts\.5\.w2\.weight' has exponents from 103 to 118 in rows 0 to 127, wanted .* 14"),
    ([118, 255], "fp8_block", "exponent of 255"),
])  # fmt: skip
def test_exponents_that_a_format_cannot_hold(exponents, format, text, tmp_path):
    checkpoint = make(tmp_path, "deepseek-v4", spread(exponents))
    if text is None:
        checkpoint.experts(1, format=format)
        return
    with pytest.raises(CheckpointError, match=text):
        checkpoint.experts(1, format=format)
    assert checkpoint.experts(2, format=format).num_experts == E


def test_groups_of_zeros_may_have_any_exponent(tmp_path):
    def change(_: dict[str, Any], held: Named) -> None:
        stem = "layers.1.ffn.experts.5.w2"
        codes, scale = held[f"{stem}.weight"].copy(), held[f"{stem}.scale"].view(np.uint8).copy()
        codes[7, :16], scale[7, 0] = 0, 1
        held[f"{stem}.weight"], held[f"{stem}.scale"] = codes, scale.view(ml_dtypes.float8_e8m0fnu)

    checkpoint = make(tmp_path, "deepseek-v4", change)
    for format in ("mxfp4", "fp8_block"):
        assert checkpoint.experts(1, format=format).format == format


@pytest.mark.parametrize("format", ["fp8_block", "fp8_channel", None])
def test_nothing_but_floats_is_rounded(format, tmp_path):
    checkpoint = make(tmp_path, "glm-4.5", lambda *_: None)
    if format == "fp8_block":
        with pytest.raises(
            CheckpointError, match="FP8 with a scale for each row, wanted what fp8_block holds without rounding"
        ):
            checkpoint.experts(1, format=format)
    else:
        assert checkpoint.experts(1, format=format).format == "fp8_channel"
    with pytest.raises(LayoutError, match="format is 'nvfp4'"):
        checkpoint.experts(1, format="nvfp4")  # type: ignore[arg-type]


def test_floats_that_mxfp4_cannot_hold(tmp_path):
    wide = np.ones((I, H), ml_dtypes.bfloat16)
    wide[3, 0] = 2.0**-40
    wide[3, :32] *= np.float32(2.0**-40)
    checkpoint = make(tmp_path, "qwen3-bf16", gate(4, wide))
    with pytest.raises(
        CheckpointError,
        match=r"experts\.4\.gate_proj\.weight' is of an expert that mxfp4 cannot hold: row 3 of expert 4 of gate",
    ):
        checkpoint.experts(1, format="mxfp4")


def test_a_nan_among_floats_stays_one(tmp_path):
    nan = np.ones((I, H), ml_dtypes.bfloat16)
    nan[3, 3] = np.nan
    weights = make(tmp_path, "qwen3-bf16", gate(4, nan)).experts(1, format="mxfp4")
    assert np.isnan(np.asarray(weights.leaves.gate_up_scale)).any((1, 2, 3)).tolist() == [e == 4 for e in range(E)]


def test_the_index_of_a_partial_download(tmp_path):
    stock = build(PLANS["kimi-k2"])
    folder = write(tmp_path, stock.config, stock.tensors)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002.safetensors: cannot be read, No such file"):
        mm.read_checkpoint(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "kimi_k2"


def test_the_encoding_of_the_test_is_what_it_says():
    stored = mxfp4(spread=3)(np.random.default_rng(0), 128, 128)
    assert stored.tensors[".scale"].dtype == ml_dtypes.float8_e8m0fnu


def test_an_index_that_names_a_file_of_several_lines(tmp_path):
    stock = build(PLANS["qwen3-bf16"])
    folder = write(tmp_path, stock.config, stock.tensors)
    index = folder / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    fields["weight_map"] = dict.fromkeys(fields["weight_map"], "x\nerror: all is well\x1b[31m.safetensors")
    index.write_text(json.dumps(fields))
    with pytest.raises(CheckpointError) as raised:
        mm.read_checkpoint(folder)
    assert str(raised.value).isprintable()


def test_a_checkpoint_is_not_read_while_tracing(tmp_path):
    checkpoint = make(tmp_path, "qwen3-bf16", lambda *_: None)
    with pytest.raises(ArgumentError, match="inside a function that JAX traces, wanted outside"):
        jax.eval_shape(lambda: checkpoint.experts(1))


def test_a_checkpoint_is_read_whether_jax_compiles_or_not(tmp_path):
    checkpoint = make(tmp_path, "qwen3-bf16", lambda *_: None)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = make_mesh({"expert": 4}, kind)
        wanted = checkpoint.experts(1, mesh=mesh)
        with jax.disable_jit():
            found = checkpoint.experts(1, mesh=mesh)
        for array, other in zip(found.leaves, wanted.leaves, strict=True):
            assert array.sharding == other.sharding
            np.testing.assert_array_equal(np.asarray(array).view(np.uint8), np.asarray(other).view(np.uint8))


@pytest.mark.parametrize("prefix", ["", "language_model.", "model.language_model.", "language_model.model."])
def test_experts_under_two_prefixes(prefix, tmp_path):
    """Which of them are the model's, nobody knows."""

    def change(_: dict[str, Any], held: Named) -> None:
        held |= {key.replace("model.", prefix, 1): value for key, value in held.items() if ".layers.2." in key}

    with pytest.raises(
        CheckpointError, match=r"has experts of layer 2 with names that begin with .*, wanted them once"
    ):
        make(tmp_path, "qwen3-bf16", change)
