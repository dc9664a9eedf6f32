"""What this package raises: every class is a `ValueError` whose text says what came, what is wanted and what to do."""


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


class PlatformError(MegaMoEError):
    """This platform, this GPU or this build of the package cannot run what is wanted."""


class GroupError(MegaMoEError):
    """The GPUs of an expert group cannot work together as is wanted."""
