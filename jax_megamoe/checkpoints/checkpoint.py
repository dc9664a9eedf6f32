"""`read_checkpoint` and `load_experts`: experts, routers and options of a model's layers from its files."""

import logging
import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jax_megamoe import weight_checks
from jax_megamoe.arrays import text_of
from jax_megamoe.checkpoints import cache
from jax_megamoe.checkpoints.layers import Layer
from jax_megamoe.checkpoints.loading import load_layers
from jax_megamoe.checkpoints.progress import Progress, check_progress
from jax_megamoe.checkpoints.router import Router
from jax_megamoe.checkpoints.stock import StockModel
from jax_megamoe.errors import ArgumentError, CheckpointError, ShardingError
from jax_megamoe.placement import EXPERT_AXIS, AxisNames, DefaultAxes, axes_in_mesh, mesh_text
from jax_megamoe.weight_layout import Format
from jax_megamoe.weights import ExpertWeights

_log = logging.getLogger("jax_megamoe")


class Checkpoint:
    """A model's files, of which the headers are read: made by `read_checkpoint`."""

    def __init__(self, model: "StockModel | cache.CachedModel") -> None:
        self._model = model

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self._model.folder

    @property
    def family(self) -> str:
        """The family of models, as docs/checkpoints.md names it."""
        return self._model.name

    @property
    def config(self) -> Mapping[str, Any]:
        """The fields of config.json; those of its text_config, if it has one, come first."""
        return self._model.config.fields

    @property
    def moe_layers(self) -> list[int]:
        """The numbers of the layers that have experts."""
        return list(self._model.moe_layers)

    def __repr__(self) -> str:
        layers = self.moe_layers
        span = f"layers {layers[0]} to {layers[-1]}" if layers else "no layers"
        return f"Checkpoint({str(self.folder)!r}, {self.family}, experts in {span})"

    def experts(
        self,
        layer: int | None = None,
        *,
        layers: Sequence[int] | None = None,
        mesh: Mesh | None = None,
        expert_axis: AxisNames = EXPERT_AXIS,
        format: Format | None = None,
        progress: Progress = None,
    ) -> ExpertWeights:
        """The experts of a layer, or of several stacked for `moe(..., layer=i)`; of all layers if neither.

        Files are mapped, and of them only the experts of this process's devices are read: one after the other, packed
        on the device and put into its place. So there is little more in memory than the result and an expert for each
        device.

        Args:
          layer: a number of `moe_layers`.
          layers: several of them, in the order of the stack.
          mesh: where the experts go, split over `expert_axis` and the same on all other axes; None: the default device.
            With several processes, all call this alike.
          expert_axis: as of `moe`: an axis of the mesh or several; None for all experts on each device.
          format: what they become. None for what the checkpoint holds, and for floats fp8_block, or beside biases
            fp8_channel. Floats become any format; mxfp4 also fp8_block, where that holds its values exactly, else it is
            an error; with biases nothing becomes fp8_block. What a format holds exactly is never rounded.
          progress: True prints how many GB are read, GB/s and the time left; a function is called after each expert
            with (bytes read, of how many), which counts what this process reads.

        Raises:
          CheckpointError: names file and tensor, for what is missing, damaged, or cannot be served.
          ArgumentError: for layers that are no numbers. ShapeError, ShardingError: for layers, or a mesh, that do not
            fit.
        """
        numbers = self._numbers(layer, layers)
        if format is not None:
            weight_checks.check_format(format)
        check_progress(progress)
        _check_mesh(mesh)
        axes = () if mesh is None else axes_in_mesh("expert_axis", expert_axis, mesh.abstract_mesh)
        if mesh is not None and mesh.size > 1 and not axes and isinstance(expert_axis, DefaultAxes):
            _log.warning(
                "The mesh (%s) has no axis 'expert', so that each of its devices gets all experts: pass the axis that "
                "splits them as expert_axis, or None.",
                mesh_text(mesh.abstract_mesh),
            )
        found: list[Layer] = [self._model.layer(number) for number in numbers]
        weights = load_layers(
            found, stacked=layer is None, format=format, mesh=mesh, axes=tuple(axes), progress=progress
        )
        try:
            self._model.moe_options(numbers[0])
        except CheckpointError as error:
            # The weights are right, what `moe` would do with them is not.
            _log.warning("%s The experts are loaded all the same.", error)
        return weights

    def shared_experts(
        self,
        layer: int | None = None,
        *,
        layers: Sequence[int] | None = None,
        mesh: Mesh | None = None,
        format: Format | None = None,
    ) -> ExpertWeights | None:
        """The shared experts of a layer, or of several or all of them stacked, as of `experts`; None if there are none.

        Each is of the routed ones' size where that divides theirs. With a mesh they are on each of its devices.
        `format` as of `experts`: they may be held in another one than the routed experts. Raises as `experts`, also
        where some of the layers have shared experts and others have none.
        """
        numbers = self._numbers(layer, layers)
        if format is not None:
            weight_checks.check_format(format)
        _check_mesh(mesh)
        shared = {number: self._model.shared(number) for number in numbers}
        found = [each for number in numbers if (each := shared[number]) is not None]
        without = [number for number in numbers if shared[number] is None]
        if not found:
            return None
        if without:
            raise self._model.config.error(
                f"is of a model that has shared experts in some of the layers {numbers} and none in {without}: "
                "load those that have them."
            )
        return load_layers(found, stacked=layer is None, format=format, mesh=mesh)

    def router(self, layer: int) -> Router:
        """The router of a layer, whose `options` are keywords of `route`."""
        number = self._number("layer is", layer)
        return self._model.router(number)

    def moe_options(self, layer: int) -> dict[str, Any]:
        """Keywords of `moe` for a layer: `activation`, `activation_clamp`, `routed_scaling_factor`, as the model has.

        Raises `CheckpointError` where the model has an activation that `moe` does not compute.
        """
        number = self._number("layer is", layer)
        return self._model.moe_options(number)

    def _numbers(self, layer: object, layers: Sequence[int] | None) -> list[int]:
        """The layers that are meant. Raises `CheckpointError` for one without experts, `ArgumentError` for none."""
        if layer is not None and layers is not None:
            raise ArgumentError(
                f"layer is {text_of(layer)} and layers {text_of(layers)}, wanted one of them: pass layer, or layers."
            )
        if layer is not None:
            return [self._number("layer is", layer)]
        try:
            if isinstance(layers, str | bytes):
                raise TypeError
            wanted = self.moe_layers if layers is None else list(layers)
        except TypeError as error:
            raise ArgumentError(
                f"layers is {text_of(layers)}, wanted a list of numbers of moe_layers: pass [layer] for one."
            ) from error
        numbers = [self._number("layers has", number) for number in wanted]
        if not numbers:
            if layers is not None:
                raise ArgumentError("layers is empty, wanted at least one number of moe_layers: pass some.")
            raise CheckpointError(self.folder, None, "has no layer with experts: pass the folder of another model.")
        return numbers

    def _number(self, what: str, value: Any) -> int:
        """The number of a layer with experts. Raises `CheckpointError` for another, `ArgumentError` for no number."""
        try:
            if isinstance(value, bool | np.bool_):
                raise TypeError
            number = operator.index(value)
        except TypeError as error:
            raise ArgumentError(
                f"{what} {text_of(value)}, wanted a number of moe_layers ({self._held()}): pass an int."
            ) from error
        if number not in self._model.moe_layers:
            raise CheckpointError(
                self.folder,
                None,
                f"has no experts in layer {text_of(number)}, wanted one of moe_layers ({self._held()}): pass one.",
            )
        return number

    def _held(self) -> str:
        return ", ".join(map(str, self.moe_layers[:3])) + (" ..." if len(self.moe_layers) > 3 else "")


def _check_mesh(mesh: object) -> None:
    if mesh is not None and not isinstance(mesh, Mesh):
        raise ShardingError(f"mesh is {text_of(mesh)}, wanted a jax.sharding.Mesh of devices, or None: pass one.")


def read_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Reads the headers of a model's safetensors files, or of a cache that `python -m jax_megamoe convert` has made.

    The folder is one as `huggingface_hub` downloads it, with config.json. docs/checkpoints.md has the families and the
    encodings that are served. Nothing needs torch.

    Raises `CheckpointError`, which names the file and the tensor, for files that are missing or damaged, and for models
    that cannot be served; for a cache that another version of the layout has made. `ArgumentError` for what is no path.
    """
    path = cache.as_path("folder", folder)
    return Checkpoint(cache.CachedModel(path) if cache.is_cache(path) else StockModel(path))


def load_experts(
    folder: str | os.PathLike[str],
    layer: int | None = None,
    *,
    layers: Sequence[int] | None = None,
    mesh: Mesh | None = None,
    expert_axis: AxisNames = EXPERT_AXIS,
    format: Format | None = None,
    progress: Progress = None,
) -> ExpertWeights:
    """`read_checkpoint(folder).experts(...)` in one call: the experts of a layer, or stacked of several, or of all."""
    return read_checkpoint(folder).experts(
        layer, layers=layers, mesh=mesh, expert_axis=expert_axis, format=format, progress=progress
    )
