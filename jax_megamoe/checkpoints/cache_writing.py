"""Making a cache of a stock checkpoint: `python -m jax_megamoe convert`. What a cache is: cache.py.

A checkpoint is known again by samples of its files' bytes, and by when they were written. So what is left of a run that
was killed is gone on with for the same files alone.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_megamoe import weight_checks, weight_layout
from jax_megamoe.checkpoints import router as routers
from jax_megamoe.checkpoints.cache import (
    ROUTER,
    SAFETENSORS_DTYPES,
    SHARED,
    VERSION,
    LayerFile,
    as_path,
    check_version,
    file_name,
    is_cache,
    short,
)
from jax_megamoe.checkpoints.folder import CONFIG, MANIFEST, METADATA, read_json
from jax_megamoe.checkpoints.layers import Layer, Recipe, StockLayer, choose_format, sizes_of
from jax_megamoe.checkpoints.loading import on_purpose
from jax_megamoe.checkpoints.progress import Progress, Report, check_progress
from jax_megamoe.checkpoints.safetensors import Array
from jax_megamoe.checkpoints.stock import StockModel
from jax_megamoe.checkpoints.writing import Group, check_folder, only_writer, write_file, write_safetensors
from jax_megamoe.errors import CheckpointError
from jax_megamoe.operands import Leaves
from jax_megamoe.quantized_packing import as_bytes
from jax_megamoe.weight_layout import Format

_SAMPLES, _SAMPLE_BYTES = 32, 4096  # of each file of a checkpoint, by which it is known again


def convert(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: Format | None = None,
    progress: Progress = None,
) -> Path:
    """Writes a cache of a stock checkpoint to a folder, which `read_checkpoint` reads like the checkpoint itself.

    One layer after the other, one expert at a time. A run that was killed may be repeated, and goes on at the layer
    where it was. Raises `CheckpointError` where `out` holds something else: a cache of another model, format or layout,
    or of files that have been written again since; and where it cannot be written.
    """
    target = as_path("out", out)
    if format is not None:
        weight_checks.check_format(format)
    check_progress(progress)
    model = StockModel(as_path("folder", folder))
    config = (model.folder / CONFIG).read_bytes()
    source, written = _fingerprint(model, config), _times(model)
    layers = [model.layer(layer) for layer in model.moe_layers]
    if not layers:
        raise CheckpointError(model.folder, None, "has no layer with experts: pass the folder of another model.")
    chosen = choose_format(layers, format)
    for layer in layers:
        layer.recipe(chosen)
    # What a configuration says that tensors do not have, before anything is written: of routers, alike in all layers.
    for number, layer in zip(model.moe_layers, layers, strict=True):
        model.shared(number, layer)
    with on_purpose(None):
        model.router(model.moe_layers[-1])
    manifest = {
        "version": VERSION,
        "layout": weight_layout.LAYOUT_TAGS[chosen],
        "format": chosen,
        "family": model.name,
        "layers": model.moe_layers,
        "source": source,
        "written": written,
        "complete": False,
    }
    names = [MANIFEST, CONFIG, *map(file_name, model.moe_layers)]
    # Before anything is written, and again when nobody else can.
    _is_begun(target, names, manifest)
    with only_writer(target, names), on_purpose(None):
        if not _is_begun(target, names, manifest):
            _write_manifest(target, manifest)
        report = Report(progress, sum(layer.nbytes * layer.num_experts for layer in layers), what="experts packed,")
        for number, layer in zip(model.moe_layers, layers, strict=True):
            if _is_written(target, number, manifest):
                report.add(layer.nbytes * layer.num_experts)
            else:
                _write_layer(target, model, number, layer, manifest, report)
                layer.release_pages()
        _check_times(model.folder, _times(model), written, "were written while they were read: convert them again")
        write_file(target / CONFIG, config)
        _write_manifest(target, {**manifest, "complete": True})
    return target


def _is_begun(out: Path, names: Sequence[str], manifest: Mapping[str, Any]) -> bool:
    """Whether the folder says already that it is going to be this cache. Changes nothing.

    Raises `CheckpointError` where it is something else than such a cache, an empty folder, or none.
    """
    path = out / MANIFEST
    if not is_cache(out):
        check_folder(out, names)
        return False
    found = read_json(path, "remove the folder, or pass another one")
    check_version(path, found)
    for key in ("source", "format", "layers"):
        if found.get(key) != manifest[key]:
            raise CheckpointError(
                path,
                None,
                f"is of a cache with another {key}, {short(found.get(key))}, wanted {short(manifest[key])}: "
                "pass another folder, or remove this one.",
            )
    # A repair may leave the samples of the fingerprint as they were.
    _check_times(
        path,
        manifest["written"],
        found.get("written"),
        "are not known to be what the cache was made of, having been written since, or copied: remove the cache and "
        "convert them anew, or give them their times again (cp --preserve) if they have not changed",
    )
    return True


def _is_written(out: Path, number: int, manifest: Mapping[str, Any]) -> bool:
    """Whether a layer's file is there: whole, if so. Raises `CheckpointError` for one of another cache."""
    path = out / file_name(number)
    if not path.exists():
        return False
    if not LayerFile(path).belongs_to(manifest, number):
        raise CheckpointError(path, None, "is of another cache: pass another folder, or remove this one.")
    return True


def _write_manifest(out: Path, manifest: Mapping[str, Any]) -> None:
    write_file(out / MANIFEST, json.dumps(manifest, indent=1).encode())


def _write_layer(
    out: Path, model: StockModel, number: int, layer: StockLayer, manifest: Mapping[str, Any], report: Report
) -> None:
    format: Format = manifest["format"]
    shared = model.shared(number, layer)
    shared_format: Format = "fp8_block" if shared is None else shared.format
    try:
        options: dict[str, Any] | None = model.moe_options(number)
        if options and "activation" in options:
            options = {**options, "activation": dataclasses.asdict(options["activation"])}
    except CheckpointError:
        options = None  # It is raised again for whoever asks, as by the checkpoint itself.
    router = model.router(number)
    header = {
        "version": VERSION,
        "layout": manifest["layout"],
        "layer": number,
        "source": manifest["source"],
        "sizes": sizes_of(layer),
        "route": router.options,
        "moe": options,
        "shared": None
        if shared is None
        else {"sizes": sizes_of(shared), "layout": weight_layout.LAYOUT_TAGS[shared_format]},
    }
    groups = [_leaves("", layer, format, report.add)]
    arrays = {name: np.asarray(array) for name in routers.ARRAYS if (array := getattr(router, name)) is not None}
    groups.append(
        Group(
            [ROUTER + name for name in arrays],
            [SAFETENSORS_DTYPES[array.dtype.name] for array in arrays.values()],
            [array.shape for array in arrays.values()],
            lambda: [list(arrays.values())],
        )
    )
    if shared is not None:
        groups.append(_leaves(SHARED, shared, shared_format, lambda nbytes: None))
    write_safetensors(out / file_name(number), groups, {METADATA: json.dumps(header)})


def _leaves(prefix: str, layer: Layer, format: Format, report: Callable[[int], None]) -> Group:
    """The four leaves of a layer, which are packed expert by expert as they are written."""
    recipe = layer.recipe(format)

    def parts() -> Iterator[list[Array]]:
        for expert in range(layer.num_experts):
            leaves, is_wrong = _pack(jax.device_put(layer.read(expert, 1)), recipe=recipe)
            if np.asarray(is_wrong).any():
                layer.explain(expert, format)
            yield [np.asarray(as_bytes(leaf)) for leaf in leaves]
            report(layer.nbytes)

    return Group(
        [prefix + name for name in Leaves._fields],
        [SAFETENSORS_DTYPES[jnp.dtype(dtype).name] for dtype in weight_layout.LEAF_DTYPES[format]],
        weight_layout.leaf_shapes(format, *sizes_of(layer)),
        parts,
    )


@functools.partial(jax.jit, static_argnames="recipe")
def _pack(arrays: Any, *, recipe: Recipe) -> tuple[Leaves, jax.Array]:
    return recipe(arrays)


def _fingerprint(model: StockModel, config: bytes) -> str:
    """Tells checkpoints apart: by configuration, sizes of files, all headers, and samples of all files' bytes.

    Models of one architecture differ in the bytes alone. Those of an expert layer are trained as a whole.
    """
    digest = hashlib.sha256(config)
    for name, file in sorted(model.tensors.files.items()):
        digest.update(f"{name} {file.size}\n".encode(errors="backslashreplace"))
        for tensor in map(file.tensor, range(len(file.tensors))):
            text = f"{tensor.name} {tensor.dtype} {tensor.shape} {tensor.offset}\n"
            digest.update(text.encode(errors="backslashreplace"))
        octets = memoryview(file.mapped())
        for number in range(_SAMPLES):
            start = file.size * number // _SAMPLES
            digest.update(octets[start : start + _SAMPLE_BYTES])
    return digest.hexdigest()


def _times(model: StockModel) -> dict[str, list[int]]:
    """By the name of a checkpoint's file, its size and when it was written, in ns: another one if it was repaired."""
    times: dict[str, list[int]] = {}
    for name, file in sorted(model.tensors.files.items()):
        try:
            found = file.path.stat()
        except OSError as error:
            raise CheckpointError(
                file.path, None, f"cannot be read, {error.strerror or error}: download it again."
            ) from error
        times[name] = [found.st_size, found.st_mtime_ns]
    return times


def _check_times(path: Path, found: Mapping[str, list[int]], known: object, problem: str) -> None:
    """Raises `CheckpointError` where files of a checkpoint are not those that are known, naming the first."""
    held = known if isinstance(known, dict) else {}
    if changed := [name for name, times in found.items() if held.get(name) != times]:
        name = changed[0][:80]
        raise CheckpointError(
            path, None, f"is of a checkpoint of which {len(changed)} files, {name!r} the first, {problem}."
        )
