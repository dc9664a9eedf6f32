"""Writing caches: whole or not believed, gone on with, and nothing of anybody else's changed."""

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

import jax_megamoe as mm
from jax_megamoe.__main__ import main
from jax_megamoe.checkpoints import cache_writing, convert, writing
from jax_megamoe.checkpoints.folder import MANIFEST
from jax_megamoe.checkpoints.safetensors import File
from jax_megamoe.errors import CheckpointError, LayoutError
from tests.support.caches import assert_alike, edit, listing, stock_folder
from tests.support.checkpoints import build, write
from tests.support.families import PLANS


@pytest.fixture
def made(tmp_path) -> tuple[Path, Path]:
    """A checkpoint and the folder for its cache."""
    return stock_folder(tmp_path, "deepseek-v4"), tmp_path / "cache"


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
