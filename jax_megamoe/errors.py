"""What this package raises: every class is a `ValueError` whose text says what came, what is wanted and what to do."""

from os import PathLike


class MegaMoEError(ValueError):
    """Whatever the package refuses."""


class ArgumentError(MegaMoEError):
    """An argument cannot be served, nowhere."""


class ShapeError(ArgumentError):
    """An argument has the wrong shape, or a number that describes a shape does not fit."""


class DTypeError(ArgumentError):
    """An argument has the wrong element type."""


class ShardingError(ArgumentError):
    """An argument is split over devices, or lies in a memory, in a way that cannot be served."""


class LayoutError(ArgumentError):
    """Weights are in the wrong memory layout."""


class CheckpointError(MegaMoEError):
    """A checkpoint, or a cache of one, cannot be read: `file`, `tensor` (None where it is no single one), `problem`."""

    def __init__(self, file: str | PathLike[str], tensor: str | None, problem: str) -> None:
        super().__init__(str(file), tensor, problem)
        self.file, self.tensor, self.problem = str(file), tensor, problem

    def __str__(self) -> str:
        # A name may be of any length in a file that means harm.
        tensor = "" if self.tensor is None else f"tensor {self.tensor[:300]!r} "
        file = self.file[:1000]  # more than a path may have on most systems; an index may name one of any text
        return f"{file if file.isprintable() else repr(file)}: {tensor}{self.problem}"


class PlatformError(MegaMoEError):
    """This platform, this GPU or this build of the package cannot run what is wanted."""


class GroupError(MegaMoEError):
    """The GPUs of an expert group cannot work together as is wanted."""
