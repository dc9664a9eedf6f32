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

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jax_megamoe import weight_layout
from jax_megamoe.activations import SiTU, SwiGLU, can_bound
from jax_megamoe.arrays import text_of
from jax_megamoe.checkpoints import router as routers
from jax_megamoe.checkpoints.families import FAMILIES, Config, families_of
from jax_megamoe.checkpoints.folder import CONFIG, MANIFEST, METADATA, read_json
from jax_megamoe.checkpoints.layers import Recipe
from jax_megamoe.checkpoints.router import Router
from jax_megamoe.checkpoints.safetensors import File, Tensor
from jax_megamoe.errors import ArgumentError, CheckpointError, LayoutError
from jax_megamoe.operands import Leaves
from jax_megamoe.routing_arrays import GroupScoring, Scoring
from jax_megamoe.weight_layout import Format

VERSION = 1
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
ROUTER, SHARED = "router.", "shared."
# Keywords of `route` and of `moe` that a cache may hold, and what they may be. Whether they go together these say.
_ROUTE: Mapping[str, Callable[[object], bool]] = {
    **dict.fromkeys(("top_k", "num_groups", "top_groups"), lambda value: type(value) is int and 0 < value < 1 << 31),
    "scoring": lambda value: value in get_args(Scoring),
    "group_scoring": lambda value: value in get_args(GroupScoring),
    "renormalize": lambda value: isinstance(value, bool),
}
_ACTIVATIONS: Mapping[frozenset[str], tuple[type[SiTU | SwiGLU], Callable[[float], bool]]] = {
    frozenset({"beta", "linear_beta"}): (SiTU, can_bound),
    frozenset({"alpha", "up_offset"}): (SwiGLU, math.isfinite),
}
_MOE: Mapping[str, Callable[[object], bool]] = {
    "activation": lambda value: (
        isinstance(value, dict)
        and frozenset(value) in _ACTIVATIONS
        and all(type(number) is float and _ACTIVATIONS[frozenset(value)][1](number) for number in value.values())
    ),
    "activation_clamp": lambda value: type(value) is float and value > 0,
    "routed_scaling_factor": lambda value: type(value) is float,
}
SAFETENSORS_DTYPES = {"float32": "F32", "int32": "I32", "uint8": "U8", "float8_e4m3fn": "U8"}
_ANEW = "make the cache anew"  # the remedy where a cache is not what `convert` writes


def as_path(name: str, value: object) -> Path:
    """The path that an argument is. Raises `ArgumentError` for other things."""
    if isinstance(value, str | os.PathLike):
        try:
            path = os.fspath(value)
            # Without surrogates, which no file system takes. An empty one is the current folder to `Path`.
            if isinstance(path, str) and path and b"\0" not in os.fsencode(path):
                return Path(path)
        except (TypeError, ValueError):  # of somebody else's class; of a path that cannot be encoded
            pass
    raise ArgumentError(f"{name} is {short(value)}, wanted the path of a folder: pass a string or a pathlib.Path.")


def is_cache(folder: Path) -> bool:
    """Whether it is a cache, complete or not, rather than a stock checkpoint."""
    return os.path.exists(folder / MANIFEST)  # False, too, where that cannot be known.


class CachedModel:
    """A complete cache, with what `StockModel` has. Raises `CheckpointError` for others, and for other layouts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / MANIFEST
        self._manifest = read_json(self._path, _ANEW)
        check_version(self._path, self._manifest)
        if self._manifest.get("complete") is not True:
            raise CheckpointError(
                self._path,
                None,
                "says that the cache is not complete: run python -m jax_megamoe convert again, it goes on.",
            )
        self.config = Config(read_json(folder / CONFIG, _ANEW), str(folder / CONFIG))
        if not any(self._manifest.get("family") == family.name for family in FAMILIES):
            raise CheckpointError(self._path, None, f"has no family of models: {_ANEW}.")
        if self._manifest.get("format") not in get_args(Format):
            raise CheckpointError(self._path, None, f"has no format of weights: {_ANEW}.")
        self.name = str(self._manifest["family"])
        layers = self._manifest.get("layers")
        if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
            raise CheckpointError(self._path, None, f"has no list of layers: {_ANEW}.")
        self.moe_layers: list[int] = layers
        self._files: dict[int, LayerFile] = {}

    def layer(self, layer: int) -> "PackedLayer":
        return self._file(layer).experts("")

    def shared(self, layer: int) -> "PackedLayer | None":
        file = self._file(layer)
        return file.experts(SHARED) if file.header["shared"] is not None else None

    def router(self, layer: int) -> Router:
        return self._file(layer).router()

    def moe_options(self, layer: int) -> dict[str, Any]:
        options = self._file(layer).moe_options()
        # What the model has that `moe` lacks is found again, and named.
        return options if options is not None else routers.moe_options(families_of(self.config)[0], self.config)

    def _file(self, layer: int) -> "LayerFile":
        if layer not in self._files:
            file = LayerFile(self.folder / file_name(layer))
            if not file.belongs_to(self._manifest, layer):
                raise CheckpointError(file.file.path, None, f"is of another layer or cache: {_ANEW}.")
            self._files[layer] = file
        return self._files[layer]


class LayerFile:
    """A layer's file of a cache, its header checked. Raises `CheckpointError` for another one."""

    def __init__(self, path: Path) -> None:
        try:
            self.file = File(path)
        except CheckpointError as error:  # whose remedy is that of a file which comes from somewhere else
            problem = error.problem.rpartition(": ")[0]
            raise CheckpointError(path, error.tensor, f"{problem}: remove it, and make the cache again.") from error
        try:
            header = json.loads(self.file.metadata[METADATA])
        except (KeyError, ValueError, RecursionError) as error:
            raise CheckpointError(path, None, f"is no file of a cache: {_ANEW}.") from error
        if not isinstance(header, dict) or not all(isinstance(header.get(name, ()), k) for name, k in _FIELDS.items()):
            raise CheckpointError(path, None, f"has other fields than a cache: {_ANEW}.")
        check_version(path, header)
        self.header: Mapping[str, Any] = header

    def belongs_to(self, manifest: Mapping[str, Any], layer: int) -> bool:
        """Whether it is that layer's of the cache with this manifest."""
        wanted = layer, manifest.get("source"), manifest["layout"]
        return (self.header["layer"], self.header["source"], self.header["layout"]) == wanted

    def experts(self, prefix: str) -> "PackedLayer":
        """The routed experts, or the shared ones, after checking their shapes."""
        format, sizes = self._sizes(self.header if not prefix else self.header["shared"])
        tensors = [
            self._tensor(prefix + name, SAFETENSORS_DTYPES[jnp.dtype(dtype).name], shape)
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
        weight = self._tensor(ROUTER + "weight", "F32", (num_experts, None))
        kinds: Mapping[str, tuple[str, tuple[int | None, ...]]] = {
            "weight": ("F32", weight.shape),
            "bias": ("F32", (num_experts,)),
            "hash_table": ("I32", (None, options["top_k"])),
            "image_bias": ("F32", (num_experts,)),
            "shared_gate": ("F32", (self._num_shared(), weight.shape[1])),
            "logit_bias": ("F32", (num_experts,)),
        }
        arrays = {
            name: self._tensor(ROUTER + name, *kinds[name]).array() if ROUTER + name in self.file.tensors else None
            for name in routers.ARRAYS
        }
        table = arrays["hash_table"]
        if table is not None and table.size and not 0 <= table.min() <= table.max() < num_experts:
            raise CheckpointError(
                self.file.path,
                ROUTER + "hash_table",
                f"names experts {table.min()} to {table.max()}, wanted 0 to {num_experts - 1}: {_ANEW}.",
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
        numbers = options.get("activation")
        if numbers is None:
            return dict(options)
        return {**options, "activation": _ACTIVATIONS[frozenset(numbers)][0](**numbers)}

    def _fail_options(self, function: str, options: object) -> NoReturn:
        raise CheckpointError(
            self.file.path, None, f"has options of {function}, {short(options)}, that it lacks: {_ANEW}."
        )

    def _num_shared(self) -> int:
        """The shared experts, each of which has a row of the gate; one where there are none, which have no gate."""
        shared = self.header["shared"]
        return 1 if shared is None else self._sizes(shared)[1][0]

    def _sizes(self, held: Any) -> tuple[Format, tuple[int, int, int]]:
        """The format, and E, H and I, of the routed or of the shared experts."""
        try:
            sizes, format = tuple(held["sizes"]), weight_layout.format_of_tag(held["layout"])
            if len(sizes) != 3 or not all(type(size) is int and 0 < size < 1 << 31 for size in sizes):
                raise ValueError
        except (TypeError, ValueError, KeyError, LayoutError) as error:
            raise CheckpointError(self.file.path, None, f"has no sizes of experts: {_ANEW}.") from error
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
            raise CheckpointError(self.file.path, name, f"is {found}, wanted {wanted}: {_ANEW}.")
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


def file_name(layer: int) -> str:
    """Of a layer's file."""
    return f"layer-{layer:05}.safetensors"


def check_version(path: Path, fields: Mapping[str, Any]) -> None:
    """Raises `CheckpointError` for a cache, or a file of one, of another version of this package."""
    remedy = "remove the folder and run python -m jax_megamoe convert anew"
    if fields.get("version") != VERSION:
        raise CheckpointError(
            path, None, f"has version {short(fields.get('version'))} of caches, wanted {VERSION}: {remedy}."
        )
    try:
        weight_layout.format_of_tag(str(fields.get("layout")))
    except LayoutError as error:
        known = ", ".join(map(repr, weight_layout.LAYOUT_TAGS.values()))
        raise CheckpointError(
            path,
            None,
            f"has layout {short(fields.get('layout'))}, this version of the package wants one of {known}: {remedy}.",
        ) from error


def short(value: object) -> str:
    """As errors show a value that may be long."""
    return text_of(value, 40)
