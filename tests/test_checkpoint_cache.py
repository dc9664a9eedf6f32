"""Caches of checkpoints: the same experts and routers as the checkpoint's, and never those of another layout."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jax.sharding import AxisType

import jax_megamoe as mm
from jax_megamoe import weight_layout
from jax_megamoe.__main__ import main
from jax_megamoe.checkpoints import convert
from jax_megamoe.checkpoints.folder import MANIFEST, METADATA, Tensors
from jax_megamoe.checkpoints.safetensors import File
from jax_megamoe.errors import ArgumentError, CheckpointError
from tests.support.caches import assert_alike, edit, stock_folder
from tests.support.changed_checkpoints import Change, make
from tests.support.checkpoints import Named, file_bytes, octets
from tests.support.meshes import make_mesh

NAMES = ["deepseek-v4", "qwen3.5-bf16", "glm-4.5", "kimi-k3", "deepseek-v3", "gpt-oss"]


@pytest.fixture
def made(tmp_path) -> tuple[Path, Path]:
    """A checkpoint and the folder for its cache."""
    return stock_folder(tmp_path, "deepseek-v4"), tmp_path / "cache"


def test_a_cache_is_no_checkpoint(made):
    """Its layers have tensors of the same names: nobody should be told to remove one of them."""
    out = convert(*made)
    for use in (lambda: convert(out, out.parent / "again"), lambda: Tensors(out)):
        with pytest.raises(CheckpointError, match="is of experts that are packed already: pass the checkpoint"):
            use()


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_is_read_like_the_checkpoint(name, tmp_path):
    folder = stock_folder(tmp_path, name)
    stock, cached = mm.read_checkpoint(folder), mm.read_checkpoint(convert(folder, tmp_path / "cache"))
    assert (cached.family, cached.moe_layers, cached.config) == (stock.family, stock.moe_layers, stock.config)
    assert_alike(cached.experts(), stock.experts())
    layer = stock.moe_layers[0]
    assert_alike(cached.experts(layer), stock.experts(layer))
    assert_alike(cached.shared_experts(layer), stock.shared_experts(layer))
    for field in ("weight", "bias", "hash_table", "image_bias", "shared_gate", "logit_bias"):
        found, wanted = getattr(cached.router(layer), field), getattr(stock.router(layer), field)
        assert (found is None) == (wanted is None), field
        if wanted is not None:
            np.testing.assert_array_equal(found, wanted)
    assert cached.router(layer).options == stock.router(layer).options
    assert cached.moe_options(layer) == stock.moe_options(layer)


def widen_shared(times: int) -> Change:
    """The shared expert of each layer as wide as so many routed ones."""

    def change(config: dict[str, Any], held: Named) -> None:
        config["text_config"]["shared_expert_intermediate_size"] *= times
        for key, value in list(held.items()):
            if ".shared_expert." in key:
                held[key] = np.concatenate([value] * times, 1 if "down" in key else 0)

    return change


@pytest.mark.parametrize("times", [1, 2, 3])
def test_the_gate_of_several_shared_experts(times, tmp_path):
    """It has a row for each of those that one wide expert becomes."""
    stock = make(tmp_path / "stock", "qwen3.5-bf16", widen_shared(times))
    cached = mm.read_checkpoint(convert(tmp_path / "stock", tmp_path / "cache"))
    shared, gate = cached.shared_experts(0), cached.router(0).shared_gate
    assert shared is not None and gate is not None
    assert shared.num_experts == len(gate) == times
    np.testing.assert_array_equal(gate, stock.router(0).shared_gate)
    assert_alike(shared, stock.shared_experts(0))


@pytest.mark.parametrize("name", ["config.json", MANIFEST])
def test_a_damaged_cache_is_to_be_made_anew(name, made):
    out = convert(*made)
    (out / name).write_text("{")
    with pytest.raises(CheckpointError, match=f"{name}: is no JSON: make the cache anew"):
        mm.read_checkpoint(out)


def test_a_cache_without_its_manifest_says_so(made):
    out = convert(*made)
    (out / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=f"has files of a cache, and no {MANIFEST}: make the cache anew"):
        mm.read_checkpoint(out)


def test_devices_get_their_experts_from_a_cache(made):
    cached = mm.read_checkpoint(convert(*made))
    mesh = make_mesh({"data": 2, "expert": 4}, AxisType.Auto)
    weights = cached.experts(mesh=mesh)
    assert weights.leaves.down.addressable_shards[0].data.shape[1] == 2
    assert_alike(cached.experts(), mm.load_experts(made[0]))
    for one, other in zip(weights.leaves, cached.experts().leaves, strict=True):
        np.testing.assert_array_equal(octets(one), octets(other))


def test_a_format_of_ones_own(made):
    cached = mm.read_checkpoint(convert(*made, format="fp8_block"))
    assert_alike(cached.experts(1), mm.load_experts(made[0], 1, format="fp8_block"))
    assert cached.experts(1, format="fp8_block").format == "fp8_block"
    with pytest.raises(CheckpointError, match="gate_up' is packed as fp8_block, wanted mxfp4"):
        cached.experts(1, format="mxfp4")
    with pytest.raises(CheckpointError, match="another format, 'fp8_block', wanted 'mxfp4'"):
        convert(*made)


def test_tensors_begin_where_arrays_of_their_type_may(made):
    out = convert(*made)
    for path in out.glob("*.safetensors"):
        file = File(path)
        assert all(tensor.offset % 4 == 0 for tensor in file.tensors.values())
        assert min(tensor.offset for tensor in file.tensors.values()) % 64 == 0


def test_another_layout_is_refused(made, monkeypatch):
    out = convert(*made)
    edit(out / MANIFEST, layout="sm90_mxfp4_v0")
    for call in (lambda: mm.read_checkpoint(out), lambda: convert(*made)):
        with pytest.raises(
            CheckpointError, match="has layout 'sm90_mxfp4_v0', this version of the package wants one of"
        ):
            call()


def test_another_layout_in_a_layers_file_is_refused(made, monkeypatch):
    """As if a later version had made the cache, and somebody had edited the first file."""
    out = convert(*made)
    written, later = weight_layout.LAYOUT_TAGS["mxfp4"], "sm90_mxfp4_v99"
    monkeypatch.setitem(weight_layout.LAYOUT_TAGS, "mxfp4", later)
    with pytest.raises(CheckpointError, match=rf"jax_megamoe\.json: has layout '{written}'"):
        mm.read_checkpoint(out)
    edit(out / MANIFEST, layout=later)
    with pytest.raises(CheckpointError, match=rf"layer-00001\.safetensors: has layout '{written}'"):
        mm.read_checkpoint(out).experts(1)
    with pytest.raises(CheckpointError, match=rf"layer-00000\.safetensors: has layout '{written}'"):
        convert(*made)


def test_another_version_of_caches_is_refused(made):
    out = convert(*made)
    edit(out / MANIFEST, version=0)
    with pytest.raises(CheckpointError, match="has version 0 of caches, wanted 1"):
        mm.read_checkpoint(out)


@pytest.mark.parametrize("key, what", [("family", "family of models"), ("format", "format of weights")])
@pytest.mark.parametrize("value", [{}, -1, None, "a\nb", ["mxfp4"]])
def test_a_manifest_of_something_else(key, what, value, made):
    out = convert(*made)
    edit(out / MANIFEST, **{key: value})
    with pytest.raises(CheckpointError, match=f"has no {what}: make the cache anew"):
        mm.read_checkpoint(out)


def test_a_cache_needs_its_checkpoint_no_more(made):
    folder, out = made
    wanted = mm.load_experts(folder)
    convert(folder, out)
    for path in folder.iterdir():
        path.unlink()
    assert_alike(mm.load_experts(out), wanted)


@pytest.mark.parametrize("path", [None, 5, b"bytes", "a\0b", ["a"], "", "\ud800"])
def test_paths_that_are_none(path, made):
    with pytest.raises(ArgumentError, match="folder is .*, wanted the path of a folder: pass a string"):
        mm.read_checkpoint(path)
    with pytest.raises(ArgumentError, match="folder is .*, wanted the path of a folder: pass a string"):
        convert(path, made[1])
    with pytest.raises(ArgumentError, match="out is .*, wanted the path of a folder: pass a string"):
        convert(made[0], path)


def test_files_that_do_not_belong_together_are_named(made):
    out = convert(*made)
    (out / "layer-00002.safetensors").write_bytes((out / "layer-00001.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"layer-00002\.safetensors: is of another layer"):
        mm.read_checkpoint(out).experts(2)
    (out / "layer-00001.safetensors").write_bytes(file_bytes({"a": np.zeros(3, np.uint8)}))
    with pytest.raises(CheckpointError, match=r"layer-00001\.safetensors: is no file of a cache"):
        mm.read_checkpoint(out).experts(1)
    (out / "layer-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"layer-00000\.safetensors: cannot be read"):
        mm.read_checkpoint(out).experts(0)


@pytest.mark.parametrize("field", ["version", "layout", "layer", "source", "sizes", "route", "moe", "shared"])
@pytest.mark.parametrize(
    "value", [[], {"a": 1}, "x", -1, [0, 0, 0], None, [float("inf"), 256, 128], [8.5, 256, 128], [8, 256, 10**400]]
)
def test_headers_of_layers_that_lie_are_named(field, value, made_once):
    """Whatever stands there: an error that names the file, or what is right all the same."""
    out, path, content, held = made_once
    header = {**held, field: value}
    tensors = {name: tensor.array() for name, tensor in File(path).tensors.items()}
    path.write_bytes(file_bytes(tensors, {METADATA: json.dumps(header)}))
    try:
        checkpoint = mm.read_checkpoint(out)
        for call in (checkpoint.experts, checkpoint.shared_experts, checkpoint.router, checkpoint.moe_options):
            try:
                call(1)
            except CheckpointError as error:
                assert str(path) in str(error) or "config.json" in str(error)
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("call, field, value, text", [
    ("router", "route", {"nonsense": 1}, r"has options of route, \{'nonsense': 1\}, that it lacks: make the cache anew"),
    ("router", "route", {"top_k": 2, "bias": [1]}, "has options of route"),
    ("router", "route", {"top_k": True}, "has options of route"),
    ("router", "route", {"top_k": 2, "scoring": ["softmax"]}, "has options of route"),
    ("router", "route", {"top_k": 2, "renormalize": 1}, "has options of route"),
    ("moe_options", "moe", {"nonsense": 1}, r"has options of moe, \{'nonsense': 1\}, that it lacks"),
    ("moe_options", "moe", {"activation_clamp": -1.0}, "has options of moe"),
    ("moe_options", "moe", {"routed_scaling_factor": "2"}, "has options of moe"),
    ("moe_options", "moe", {"activation": {"beta": 4.0}}, "has options of moe"),
    ("moe_options", "moe", {"activation": {"beta": 4.0, "linear_beta": 0.0}}, "has options of moe"),
    ("moe_options", "moe", {"activation": 4.0}, "has options of moe"),
    ("moe_options", "moe", {"activation": {"alpha": 1.0, "linear_beta": 1.0}}, "has options of moe"),
    ("moe_options", "moe", {"activation": {"alpha": 1.0, "up_offset": float("inf")}}, "has options of moe"),
    ("moe_options", "moe", {"activation": {"alpha": 1, "up_offset": 1.0}}, "has options of moe"),
])  # fmt: skip
def test_options_that_a_cache_may_not_hold(call, field, value, text, made_once):
    out, path, content, held = made_once
    tensors = {name: tensor.array() for name, tensor in File(path).tensors.items()}
    path.write_bytes(file_bytes(tensors, {METADATA: json.dumps({**held, field: value})}))
    try:
        with pytest.raises(CheckpointError, match=rf"layer-00001\.safetensors: {text}"):
            getattr(mm.read_checkpoint(out), call)(1)
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("name, value, text", [
    ("weight", None, r"is missing, wanted F32 \(8, any\): make the cache anew"),
    ("weight", np.zeros((7, 256), np.float32), r"is F32 \(7, 256\), wanted F32 \(8, any\)"),
    ("weight", np.zeros(8, np.float32), r"is F32 \(8,\), wanted"),
    ("weight", np.zeros((8, 256), np.int32), r"is I32 \(8, 256\), wanted F32"),
    ("bias", np.zeros(7, np.float32), r"is F32 \(7,\), wanted F32 \(8,\)"),
    ("image_bias", np.zeros((1, 8), np.float32), r"is F32 \(1, 8\), wanted F32 \(8,\)"),
    ("logit_bias", np.zeros(7, np.float32), r"is F32 \(7,\), wanted F32 \(8,\)"),
    ("hash_table", np.zeros((16, 3), np.int32), r"is I32 \(16, 3\), wanted I32 \(any, 2\)"),
    ("hash_table", np.full((16, 2), 8, np.int32), "names experts 8 to 8, wanted 0 to 7"),
    ("shared_gate", np.zeros((1, 255), np.float32), r"is F32 \(1, 255\), wanted F32 \(1, 256\)"),
])  # fmt: skip
def test_routers_that_a_cache_may_not_hold(name, value, text, made_once):
    out, path, content, held = made_once
    tensors = {name: tensor.array() for name, tensor in File(path).tensors.items()}
    del tensors["router.bias"]  # Other arrays come to the end, where they are aligned.
    kept = {key: array for key, array in tensors.items() if key != f"router.{name}"}
    kept |= {} if value is None else {f"router.{name}": value}
    path.write_bytes(file_bytes(kept, {METADATA: json.dumps(held)}))
    try:
        with pytest.raises(CheckpointError, match=rf"layer-00001\.safetensors: tensor 'router\.{name}' {text}"):
            mm.read_checkpoint(out).router(1)
    finally:
        path.write_bytes(content)


@pytest.fixture(scope="module")
def made_once(tmp_path_factory) -> tuple[Path, Path, bytes, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("cache")
    out = convert(stock_folder(folder, "deepseek-v4"), folder / "cache")
    path = out / "layer-00001.safetensors"
    return out, path, path.read_bytes(), json.loads(File(path).metadata[METADATA])


def test_a_truncated_layer_is_named(made):
    out = convert(*made)
    path = out / "layer-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="inside them: remove it, and make the cache again"):
        mm.read_checkpoint(out).experts(1)


def test_the_command(made, capsys):
    folder, out = made
    assert main(["convert", str(folder), str(out)]) == 0
    captured = capsys.readouterr()
    assert f"pass {str(out)!r} to jax_megamoe.read_checkpoint" in captured.out
    assert "(100 %)" in captured.err and "GB/s" in captured.err
    assert_alike(mm.load_experts(out), mm.load_experts(folder))


def test_the_command_with_a_format_and_in_silence(made, capsys):
    folder, out = made
    assert main(["convert", str(folder), str(out), "--format", "fp8_block", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert mm.load_experts(out, 0).format == "fp8_block"


def test_what_the_command_refuses(made, capsys, tmp_path):
    assert main(["convert", str(tmp_path / "nothing"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    for arguments in (["convert"], ["convert", "a", "b", "--format", "int4"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
