"""Caches of checkpoints: the same experts and routers, whole or not believed, and never those of another layout."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jax.sharding import AxisType

import jax_megamoe as mm
from jax_megamoe import weight_layout
from jax_megamoe.__main__ import main
from jax_megamoe.checkpoints import cache, cache_writing, convert, writing
from jax_megamoe.checkpoints.folder import MANIFEST, Tensors
from jax_megamoe.checkpoints.safetensors import File
from jax_megamoe.errors import ArgumentError, CheckpointError, LayoutError
from tests.support.checkpoints import build, file_bytes, octets, write
from tests.support.families import PLANS
from tests.support.meshes import make_mesh

NAMES = ["deepseek-v4", "qwen3.5-bf16", "glm-4.5", "kimi-k3", "deepseek-v3", "gpt-oss"]


def stock_folder(folder: Path, name: str) -> Path:
    stock = build(PLANS[name])
    return write(folder / name, stock.config, stock.tensors)


@pytest.fixture
def made(tmp_path) -> tuple[Path, Path]:
    """A checkpoint and the folder for its cache."""
    return stock_folder(tmp_path, "deepseek-v4"), tmp_path / "cache"


def assert_alike(found: mm.ExpertWeights | None, wanted: mm.ExpertWeights | None) -> None:
    if wanted is None or found is None:
        assert found is wanted
        return
    assert (found.num_experts, found.layout, repr(found)) == (wanted.num_experts, wanted.layout, repr(wanted))
    for one, other in zip(found.leaves, wanted.leaves, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(octets(one), octets(other))


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


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


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


class Killed(BaseException):
    """As `KeyboardInterrupt`."""


def test_what_was_interrupted_is_not_believed_and_gone_on_with(made, monkeypatch):
    folder, out = made
    seen: list[int] = []

    def stop_later(done: int, total: int) -> None:
        seen.append(done)
        if len(seen) == 12:  # in the second layer
            raise Killed

    with pytest.raises(Killed):
        convert(folder, out, progress=stop_later)
    assert [path.name for path in sorted(out.glob("*.safetensors"))] == ["layer-00000.safetensors"]
    with pytest.raises(CheckpointError, match="not complete: run python -m jax_megamoe convert again, it goes on"):
        mm.read_checkpoint(out)
    before = (out / "layer-00000.safetensors").stat()
    calls: list[tuple[int, int]] = []
    convert(folder, out, progress=lambda *call: calls.append(call))
    after = (out / "layer-00000.safetensors").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    # A layer at once, then expert by expert.
    assert len(calls) == 1 + 2 * 8 and calls[-1][0] == calls[-1][1]
    assert_alike(mm.read_checkpoint(out).experts(), mm.load_experts(folder))
    assert not list(out.glob("*.unfinished"))


def test_a_writer_that_is_killed_leaves_nothing_that_is_believed(made):
    """The real thing, by SIGKILL, while it writes a layer: whatever is left, the next run makes a cache that is right."""
    folder, out = made
    code = (
        "import sys, time, jax_megamoe.checkpoints as c\n"
        "def slow(done, total): print(done, flush=True); time.sleep(0.2)\n"
        "c.convert(*sys.argv[1:], progress=slow)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder), str(out)], stdout=subprocess.PIPE, env=env
    ) as writer:
        assert writer.stdout is not None
        for _ in range(10):  # one layer and two experts
            writer.stdout.readline()
        # While it writes nobody else may.
        with pytest.raises(CheckpointError, match="is being written by another process"):
            convert(folder, out)
        writer.send_signal(signal.SIGKILL)
    assert list(out.glob("*.unfinished"))
    with pytest.raises(CheckpointError, match="not complete"):
        mm.read_checkpoint(out)
    convert(folder, out)
    assert not list(out.glob("*.unfinished"))
    assert_alike(mm.read_checkpoint(out).experts(), mm.load_experts(folder))


def test_a_cache_that_is_complete_is_not_written_again(made):
    out = convert(*made)
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("layer-*")}
    time.sleep(0.01)
    convert(*made)
    assert times == {path.name: path.stat().st_mtime_ns for path in out.glob("layer-*")}


def test_folders_of_something_else_are_left_alone(made, tmp_path):
    folder, out = made
    with pytest.raises(CheckpointError, match="holds files of something else"):
        convert(folder, folder)
    convert(folder, out)
    other = stock_folder(tmp_path, "kimi-k2")
    # Another model of the same architecture: only its bytes differ.
    twin = build(PLANS["deepseek-v4"], seed=1)
    with pytest.raises(CheckpointError, match="is of a cache with another source"):
        convert(write(tmp_path / "twin", twin.config, twin.tensors), out)
    with pytest.raises(CheckpointError, match="is of a cache with another source"):
        convert(other, out)
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        convert(tmp_path / "nothing", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def listing(folder: Path) -> dict[str, Any]:
    """All that is in a folder, with what is in it."""
    return {p.name: os.readlink(p) if p.is_symlink() else p.is_dir() or p.read_bytes() for p in folder.iterdir()}


def test_a_refusal_changes_no_file(made, tmp_path):
    folder, out = made
    for name in ("mine.unfinished", "layer-00000.safetensors.unfinished", ".lock"):
        (folder / name).write_text("mine")
    before = listing(folder)
    with pytest.raises(CheckpointError, match="holds files of something else"):
        convert(folder, folder)
    assert listing(folder) == before
    (folder / ".lock").unlink()
    with pytest.raises(CheckpointError, match="holds files of something else"):
        convert(folder, folder)
    assert not (folder / ".lock").exists()
    for name in ("notes.txt", "mine.unfinished"):
        other = tmp_path / f"of {name}"
        other.mkdir()
        (other / name).write_text("mine")
        with pytest.raises(CheckpointError, match=f"holds files of something else, as '{name}', wanted an empty"):
            convert(folder, other)
        assert listing(other) == {name: b"mine"}
    twin = build(PLANS["deepseek-v4"], seed=1)
    convert(folder, out)
    (out / "layer-00000.safetensors.unfinished").write_text("of the other one")
    before = listing(out)
    with pytest.raises(CheckpointError, match="is of a cache with another source"):
        convert(write(tmp_path / "twin", twin.config, twin.tensors), out)
    assert listing(out) == before


def test_of_what_is_left_only_the_caches_own_files_go(made):
    folder, out = made
    convert(folder, out)
    (out / ".lock").write_text("kept")
    (out / "mine.unfinished").write_text("mine")
    (out / "layer-00001.safetensors.unfinished").write_text("half")
    (out / "jax_megamoe.json.unfinished").write_text("{")
    convert(folder, out)
    assert (out / ".lock").read_text() == "kept" and (out / "mine.unfinished").read_text() == "mine"
    assert [path.name for path in out.glob("*.unfinished")] == ["mine.unfinished"]


@pytest.mark.parametrize("name", [".lock", "config.json.unfinished", "layer-00000.safetensors.unfinished"])
@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_links_folders_and_pipes_are_not_written_to(name, kind, made, tmp_path):
    folder, out = made
    out.mkdir()
    target = tmp_path / "precious"
    target.write_text("mine")
    make = {"link": lambda p: p.symlink_to(target), "folder": Path.mkdir, "pipe": os.mkfifo}[kind]
    make(out / name)
    with pytest.raises(CheckpointError, match=f"{name}: is no regular file: remove it, or pass another folder"):
        convert(folder, out)
    assert target.read_text() == "mine" and [path.name for path in out.iterdir()] == [name]


@pytest.fixture
def small_samples(monkeypatch):
    monkeypatch.setattr(cache_writing, "_SAMPLE_BYTES", 64)


def repair(folder: Path) -> Path:
    """Writes a byte between the samples of the first file anew, as a download that goes on does."""
    path = sorted(folder.glob("*.safetensors"))[0]
    content = bytearray(path.read_bytes())
    assert len(content) // cache_writing._SAMPLES > cache_writing._SAMPLE_BYTES
    content[cache_writing._SAMPLE_BYTES + len(content) * 20 // cache_writing._SAMPLES] ^= 1
    time.sleep(0.01)
    path.with_name("new").write_bytes(content)
    os.replace(path.with_name("new"), path)
    return path


@pytest.mark.parametrize("is_complete", [True, False])
def test_a_checkpoint_that_was_repaired_is_noticed(is_complete, made, small_samples):
    folder, out = made
    convert(folder, out)
    edit(out / MANIFEST, complete=is_complete)
    before = listing(out)
    times = {path: path.stat() for path in folder.glob("*.safetensors")}
    path = repair(folder)
    with pytest.raises(CheckpointError, match=f"'{path.name}' the first, are not known .* remove the cache"):
        convert(folder, out)
    assert listing(out) == before
    # If they are said to be what they were, they are believed: as by `cp --preserve`.
    os.utime(path, ns=(0, times[path].st_mtime_ns))
    convert(folder, out)


def test_a_cache_needs_its_checkpoint_no_more(made):
    folder, out = made
    wanted = mm.load_experts(folder)
    convert(folder, out)
    for path in folder.iterdir():
        path.unlink()
    assert_alike(mm.load_experts(out), wanted)


def test_a_checkpoint_that_changes_meanwhile_makes_no_cache(made, small_samples):
    folder, out = made
    with pytest.raises(CheckpointError, match="were written while they were read: convert them again"):
        convert(folder, out, progress=lambda done, total: repair(folder) if done == total else None)
    with pytest.raises(CheckpointError, match="not complete"):
        mm.read_checkpoint(out)


def test_a_cache_of_before_that_knows_no_times_is_read_and_not_gone_on_with(made):
    folder, out = made
    convert(folder, out)
    fields = json.loads((out / MANIFEST).read_text())
    del fields["written"]
    (out / MANIFEST).write_text(json.dumps(fields))
    assert_alike(mm.load_experts(out), mm.load_experts(folder))
    with pytest.raises(CheckpointError, match="not known to be what the cache was made of"):
        convert(folder, out)


@pytest.mark.parametrize("name", ["deepseek-v4", "qwen3.5-bf16"])
@pytest.mark.parametrize("format", ["fp4", 8, b"mxfp4"])
def test_formats_that_are_none(format, name, tmp_path):
    with pytest.raises(LayoutError, match="format is .*, wanted one of"):
        convert(stock_folder(tmp_path, name), tmp_path / "cache", format=format)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("path", [None, 5, b"bytes", "a\0b", ["a"]])
def test_paths_that_are_none(path, made):
    with pytest.raises(ArgumentError, match="folder is .*, wanted the path of a folder: pass a string"):
        mm.read_checkpoint(path)
    with pytest.raises(ArgumentError, match="folder is .*, wanted the path of a folder: pass a string"):
        convert(path, made[1])
    with pytest.raises(ArgumentError, match="out is .*, wanted the path of a folder: pass a string"):
        convert(made[0], path)


def test_names_that_are_no_unicode(tmp_path):
    stock = build(PLANS["deepseek-v4"])
    tensors = {**stock.tensors, "\ud800": np.zeros(1, np.float32)}
    folder = write(tmp_path / "stock", stock.config, tensors, num_files=1)
    (path,) = folder.glob("*.safetensors")
    path.rename(folder / os.fsdecode(b"model-\xff.safetensors"))
    for _ in range(2):
        convert(folder, tmp_path / "cache")
    assert_alike(mm.load_experts(tmp_path / "cache"), mm.load_experts(folder))


def test_a_folder_that_cannot_be_written(made, tmp_path, monkeypatch):
    folder, out = made
    file = tmp_path / "file"
    file.write_text("mine")
    for target in (file, file / "below"):
        with pytest.raises(CheckpointError, match=f"{target}: cannot be read, Not a directory: pass a new folder"):
            convert(folder, target)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="dangling: cannot be written, File exists: make room there, or pass"):
        convert(folder, tmp_path / "dangling")
    assert file.read_text() == "mine" and not (tmp_path / "nowhere").exists()

    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CheckpointError, match=r"jax_megamoe\.json: cannot be written, No space left on device: make"):
        convert(folder, out)
    assert [path.name for path in out.iterdir()] == [".lock"]
    monkeypatch.undo()
    convert(folder, out)


def test_a_disk_that_is_full_is_named():
    text = "layer: cannot be written, No space left on device: make room"
    with Path("/dev/full").open("wb", buffering=0) as file, pytest.raises(CheckpointError, match=text):
        writing.write_all(Path("layer"), file, b"x")


def test_arrays_without_elements_are_written(tmp_path):
    group = writing.Group(["a", "b"], ["F32"] * 2, [(0, 3), (2,)], lambda: [[np.zeros((0, 3), "f4"), np.ones(2, "f4")]])
    writing.write_safetensors(tmp_path / "file", [group], {})
    np.testing.assert_array_equal(File(tmp_path / "file").tensors["b"].array(), [1, 1])


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
    path.write_bytes(file_bytes(tensors, {cache.METADATA: json.dumps(header)}))
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
    path.write_bytes(file_bytes(tensors, {cache.METADATA: json.dumps({**held, field: value})}))
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
    path.write_bytes(file_bytes(kept, {cache.METADATA: json.dumps(held)}))
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
    return out, path, path.read_bytes(), json.loads(File(path).metadata[cache.METADATA])


def test_a_truncated_layer_is_named(made):
    out = convert(*made)
    path = out / "layer-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not all there"):
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


def test_the_command_interrupted(made, capsys, monkeypatch):
    folder, out = made

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cache_writing, "_write_layer", interrupt)
    assert main(["convert", str(folder), str(out)]) == 130
    assert "goes on where it was" in capsys.readouterr().err
    monkeypatch.undo()
    command = [sys.executable, "-m", "jax_megamoe", "convert", str(folder), str(out), "--quiet"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "is complete" in done.stdout
    assert_alike(mm.load_experts(out), mm.load_experts(folder))


def test_what_the_command_refuses(made, capsys, tmp_path):
    assert main(["convert", str(tmp_path / "nothing"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    for arguments in (["convert"], ["convert", "a", "b", "--format", "int4"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
