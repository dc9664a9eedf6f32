"""A cache: a model's experts packed as the kernel reads them, in files that the next start maps.

| file                    | holds                                                                                   |
|-------------------------|-----------------------------------------------------------------------------------------|
| jax_megamoe.json        | version, layout, format, family, layers, what it is made of, and whether it is complete |
| config.json             | that of the model                                                                       |
| layer-00003.safetensors | the leaves of layer 3, [E, ...], its router, its shared experts, and their options      |

The layout's tag is in the first file and in each layer's; a cache with another one is refused. Files are written under
other names, flushed and renamed, so that one that has its name is whole; the first file says that the cache is complete
when all are there. What a writer leaves that was killed is never read, and the next one goes on after it.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jax_megamoe import weight_checks, weight_layout
from jax_megamoe.checkpoints import router as routers
from jax_megamoe.checkpoints.families import Config
from jax_megamoe.checkpoints.folder import CONFIG, read_json
from jax_megamoe.checkpoints.layers import Layer, Recipe, choose_format, sizes_of
from jax_megamoe.checkpoints.loading import on_purpose
from jax_megamoe.checkpoints.progress import Progress, Report, check_progress
from jax_megamoe.checkpoints.router import Router
from jax_megamoe.checkpoints.safetensors import Array, File, Tensor
from jax_megamoe.checkpoints.stock import StockModel
from jax_megamoe.checkpoints.writing import Group, check_folder, only_writer, write_file, write_safetensors
from jax_megamoe.errors import ArgumentError, CheckpointError, LayoutError
from jax_megamoe.operands import Leaves
from jax_megamoe.quantized_packing import as_bytes
from jax_megamoe.routing import GroupScoring, Scoring
from jax_megamoe.weight_layout import Format

MANIFEST = "jax_megamoe.json"
_VERSION = 1
_METADATA = "jax_megamoe"  # in the header of a layer's file, what it is of, as JSON
_SAMPLES, _SAMPLE_BYTES = 32, 4096  # of each file of a checkpoint, by which it is known again
_FIELDS: Mapping[str, Any] = {
    "version": int,
    "layout": str,
    "layer": int,
    "source": str,
    "sizes": list,
    "route": dict,
    "moe": dict | None,  # None: `moe` of the version that wrote it does not compute the activation
    "shared": dict | None,
}
_ROUTER, _SHARED = "router.", "shared."
# Keywords of `route` and of `moe` that a cache may hold, and what they may be. Whether they go together these say.
_ROUTE: Mapping[str, Callable[[object], bool]] = {
    **dict.fromkeys(("top_k", "num_groups", "top_groups"), lambda value: type(value) is int and 0 < value < 1 << 31),
    "scoring": lambda value: value in get_args(Scoring),
    "group_scoring": lambda value: value in get_args(GroupScoring),
    "renormalize": lambda value: isinstance(value, bool),
}
_MOE: Mapping[str, Callable[[object], bool]] = {
    "activation_clamp": lambda value: type(value) is float and value > 0,
    "routed_scaling_factor": lambda value: type(value) is float,
}
_SAFETENSORS_DTYPES = {"float32": "F32", "int32": "I32", "uint8": "U8", "float8_e4m3fn": "U8"}


def as_path(name: str, value: object) -> Path:
    """The path that an argument is. Raises `ArgumentError` for other things."""
    if isinstance(value, str | os.PathLike):
        path = os.fspath(value)
        if isinstance(path, str) and "\0" not in path:
            return Path(path)
    raise ArgumentError(f"{name} is {_short(value)}, wanted the path of a folder: pass a string or a pathlib.Path.")


def is_cache(folder: Path) -> bool:
    """Whether it is a cache, complete or not, rather than a stock checkpoint."""
    return os.path.exists(folder / MANIFEST)  # False, too, where that cannot be known.


class CachedModel:
    """A complete cache, with what `StockModel` has. Raises `CheckpointError` for others, and for other layouts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / MANIFEST
        self._manifest = read_json(self._path)
        _check_version(self._path, self._manifest)
        if self._manifest.get("complete") is not True:
            raise CheckpointError(
                self._path,
                None,
                "says that the cache is not complete: run python -m jax_megamoe convert again, it goes on.",
            )
        self.config = Config(read_json(folder / CONFIG), str(folder / CONFIG))
        self.name = str(self._manifest.get("family"))
        layers = self._manifest.get("layers")
        if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
            raise CheckpointError(self._path, None, "has no list of layers: make the cache anew.")
        self.moe_layers: list[int] = layers
        self._files: dict[int, LayerFile] = {}

    def layer(self, layer: int) -> "PackedLayer":
        return self._file(layer).experts("")

    def shared(self, layer: int) -> "PackedLayer | None":
        file = self._file(layer)
        return file.experts(_SHARED) if file.header["shared"] is not None else None

    def router(self, layer: int) -> Router:
        return self._file(layer).router()

    def moe_options(self, layer: int) -> dict[str, Any]:
        options = self._file(layer).moe_options()
        # What the model has that `moe` lacks is found again, and named.
        return options if options is not None else routers.moe_options(self.config)

    def _file(self, layer: int) -> "LayerFile":
        if layer not in self._files:
            file = LayerFile(self.folder / _file_name(layer))
            wanted = layer, self._manifest.get("source"), self._manifest["layout"]
            if (file.header["layer"], file.header["source"], file.header["layout"]) != wanted:
                raise CheckpointError(file.file.path, None, "is of another layer or cache: make the cache anew.")
            self._files[layer] = file
        return self._files[layer]


class LayerFile:
    """A layer's file of a cache, its header checked. Raises `CheckpointError` for another one."""

    def __init__(self, path: Path) -> None:
        self.file = File(path)
        try:
            header = json.loads(self.file.metadata[_METADATA])
        except (KeyError, ValueError) as error:
            raise CheckpointError(path, None, "is no file of a cache: make the cache anew.") from error
        if not isinstance(header, dict) or not all(isinstance(header.get(name, ()), k) for name, k in _FIELDS.items()):
            raise CheckpointError(path, None, "has other fields than a cache: make the cache anew.")
        _check_version(path, header)
        self.header: Mapping[str, Any] = header

    def experts(self, prefix: str) -> "PackedLayer":
        """The routed experts, or the shared ones, after checking their shapes."""
        format, sizes = self._sizes(self.header if not prefix else self.header["shared"])
        tensors = [
            self._tensor(prefix + name, _SAFETENSORS_DTYPES[jnp.dtype(dtype).name], shape)
            for name, shape, dtype in zip(
                Leaves._fields,
                weight_layout.leaf_shapes(format, *sizes),
                weight_layout.LEAF_DTYPES[format],
                strict=True,
            )
        ]
        return PackedLayer(Leaves(*tensors), format, sizes)

    def router(self) -> Router:
        """The router, after checking its arrays and options."""
        _, (num_experts, *_) = self._sizes(self.header)
        options = self.header["route"]
        if "top_k" not in options or not all(name in _ROUTE and _ROUTE[name](value) for name, value in options.items()):
            self._fail_options("route", options)
        weight = self._tensor(_ROUTER + "weight", "F32", (num_experts, None))
        kinds: Mapping[str, tuple[str, tuple[int | None, ...]]] = {
            "weight": ("F32", weight.shape),
            "bias": ("F32", (num_experts,)),
            "hash_table": ("I32", (None, options["top_k"])),
            "image_bias": ("F32", (num_experts,)),
            "shared_gate": ("F32", (1, weight.shape[1])),
        }
        arrays = {
            name: self._tensor(_ROUTER + name, *kinds[name]).array() if _ROUTER + name in self.file.tensors else None
            for name in routers.ARRAYS
        }
        table = arrays["hash_table"]
        if table is not None and table.size and not 0 <= table.min() <= table.max() < num_experts:
            raise CheckpointError(
                self.file.path,
                _ROUTER + "hash_table",
                f"names experts {table.min()} to {table.max()}, wanted 0 to {num_experts - 1}: make the cache anew.",
            )
        placed = {name: None if array is None else jax.device_put(np.array(array)) for name, array in arrays.items()}
        return Router(**placed, options=dict(options))  # type: ignore[arg-type]

    def moe_options(self) -> dict[str, Any] | None:
        """Keywords of `moe`, after checking them; None where the version that wrote them does not compute it."""
        options = self.header["moe"]
        if options is None:
            return None
        if not all(name in _MOE and _MOE[name](value) for name, value in options.items()):
            self._fail_options("moe", options)
        return dict(options)

    def _fail_options(self, function: str, options: object) -> NoReturn:
        raise CheckpointError(
            self.file.path, None, f"has options of {function}, {_short(options)}, that it lacks: make the cache anew."
        )

    def _sizes(self, held: Any) -> tuple[Format, tuple[int, int, int]]:
        """The format, and E, H and I, of the routed or of the shared experts."""
        try:
            sizes, format = tuple(held["sizes"]), weight_layout.format_of_tag(held["layout"])
            if len(sizes) != 3 or not all(type(size) is int and 0 < size < 1 << 31 for size in sizes):
                raise ValueError
            weight_layout.leaf_shapes(format, *sizes)  # raises for those that are no multiples
        except (TypeError, ValueError, KeyError, LayoutError) as error:
            raise CheckpointError(self.file.path, None, "has no sizes of experts: make the cache anew.") from error
        return format, sizes

    def _tensor(self, name: str, dtype: str, shape: tuple[int | None, ...]) -> Tensor:
        """A tensor of this type and shape, None being any size."""
        tensor = self.file.tensors.get(name)
        if (
            tensor is None
            or tensor.dtype != dtype
            or len(tensor.shape) != len(shape)
            or any(size not in (None, found) for size, found in zip(shape, tensor.shape, strict=True))
        ):
            found = "missing" if tensor is None else f"{tensor.dtype} {tensor.shape}"
            wanted = f"{dtype} {shape}".replace("None", "any")
            raise CheckpointError(self.file.path, name, f"is {found}, wanted {wanted}: make the cache anew.")
        return tensor


class PackedLayer:
    """A layer's experts in a cache."""

    def __init__(self, tensors: Leaves, format: Format, sizes: tuple[int, ...]) -> None:
        self._tensors = tensors
        self._format: Format = format
        self.num_experts, self.hidden_size, self.intermediate_size = sizes
        self.nbytes = sum(tensor.nbytes for tensor in tensors) // self.num_experts

    @property
    def is_packed(self) -> bool:
        return True

    @property
    def format(self) -> Format:
        return self._format

    def recipe(self, format: Format) -> Recipe:
        if format != self._format:
            tensor: Tensor = self._tensors.gate_up
            raise tensor.error(
                f"is packed as {self._format}, wanted {format}: load it as it is, or convert the model anew."
            )
        return _UnpackRecipe(format)

    def read(self, first: int, count: int) -> Leaves:
        return Leaves(*(tensor.array()[first : first + count] for tensor in self._tensors))

    def prefetch(self, first: int, count: int) -> None:
        for tensor in self._tensors:
            (start, _), (last, size) = tensor.place(first), tensor.place(first + count - 1)
            tensor.file.prefetch(start, last + size - start)

    def release_pages(self) -> None:
        self._tensors.gate_up.file.release_pages()

    def explain(self, expert: int, format: Format) -> None:
        """Nothing that is packed is wrong."""


@dataclass(frozen=True)
class _UnpackRecipe:
    """Bytes of a file -> leaves."""

    format: Format

    def __call__(self, arrays: Leaves) -> tuple[Leaves, jax.Array]:
        dtypes = weight_layout.LEAF_DTYPES[self.format]
        leaves = Leaves(*(jax.lax.bitcast_convert_type(a, d) for a, d in zip(arrays, dtypes, strict=True)))
        return leaves, jnp.logical_and(jnp.isnan(leaves.gate_up_scale[:1, 0, 0, 0]), False)


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
    manifest = {
        "version": _VERSION,
        "layout": weight_layout.LAYOUT_TAGS[chosen],
        "format": chosen,
        "family": model.name,
        "layers": model.moe_layers,
        "source": source,
        "written": written,
        "complete": False,
    }
    names = [MANIFEST, CONFIG, *map(_file_name, model.moe_layers)]
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
    found = read_json(path)
    _check_version(path, found)
    for key in ("source", "format", "layers"):
        if found.get(key) != manifest[key]:
            raise CheckpointError(
                path,
                None,
                f"is of a cache with another {key}, {_short(found.get(key))}, wanted {_short(manifest[key])}: "
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
    path = out / _file_name(number)
    if not path.exists():
        return False
    header = LayerFile(path).header
    if (header["layer"], header["source"], header["layout"]) != (number, manifest["source"], manifest["layout"]):
        raise CheckpointError(path, None, "is of another cache: pass another folder, or remove this one.")
    return True


def _write_manifest(out: Path, manifest: Mapping[str, Any]) -> None:
    write_file(out / MANIFEST, json.dumps(manifest, indent=1).encode())


def _write_layer(
    out: Path, model: StockModel, number: int, layer: Layer, manifest: Mapping[str, Any], report: Report
) -> None:
    format: Format = manifest["format"]
    shared = model.shared(number)
    shared_format: Format = "fp8_block" if shared is None else shared.format or "fp8_block"
    try:
        options: dict[str, Any] | None = model.moe_options(number)
    except CheckpointError:
        options = None  # It is raised again for whoever asks, as by the checkpoint itself.
    router = model.router(number)
    header = {
        "version": _VERSION,
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
            [_ROUTER + name for name in arrays],
            [_SAFETENSORS_DTYPES[array.dtype.name] for array in arrays.values()],
            [array.shape for array in arrays.values()],
            lambda: [list(arrays.values())],
        )
    )
    if shared is not None:
        groups.append(_leaves(_SHARED, shared, shared_format, lambda nbytes: None))
    write_safetensors(out / _file_name(number), groups, {_METADATA: json.dumps(header)})


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
        [_SAFETENSORS_DTYPES[jnp.dtype(dtype).name] for dtype in weight_layout.LEAF_DTYPES[format]],
        weight_layout.leaf_shapes(format, *sizes_of(layer)),
        parts,
    )


@functools.partial(jax.jit, static_argnames="recipe")
def _pack(arrays: Any, *, recipe: Recipe) -> tuple[Leaves, jax.Array]:
    return recipe(arrays)


def _file_name(layer: int) -> str:
    return f"layer-{layer:05}.safetensors"


def _check_version(path: Path, fields: Mapping[str, Any]) -> None:
    """Raises `CheckpointError` for a cache, or a file of one, of another version of this package."""
    remedy = "remove the folder and run python -m jax_megamoe convert anew"
    if fields.get("version") != _VERSION:
        raise CheckpointError(
            path, None, f"has version {fields.get('version')!r} of caches, wanted {_VERSION}: {remedy}."
        )
    try:
        weight_layout.format_of_tag(str(fields.get("layout")))
    except LayoutError as error:
        known = ", ".join(map(repr, weight_layout.LAYOUT_TAGS.values()))
        raise CheckpointError(
            path,
            None,
            f"has layout {fields.get('layout')!r}, this version of the package wants one of {known}: {remedy}.",
        ) from error


def _fingerprint(model: StockModel, config: bytes) -> str:
    """Tells checkpoints apart: by configuration, sizes of files, all headers, and samples of all files' bytes.

    Models of one architecture differ in the bytes alone. Those of an expert layer are trained as a whole.
    """
    digest = hashlib.sha256(config)
    for name, file in sorted(model.tensors.files.items()):
        digest.update(f"{name} {file.size}\n".encode(errors="backslashreplace"))
        for tensor in file.tensors.values():
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


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
