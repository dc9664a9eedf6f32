"""What this package raises about its arguments; every class is a `ValueError`."""


class MegaMoEError(ValueError):
    """An argument that the operation cannot serve."""


class ShapeError(MegaMoEError):
    """An argument has the wrong shape, or a number that describes a shape does not fit."""


class DTypeError(MegaMoEError):
    """An argument has the wrong element type."""


class ShardingError(MegaMoEError):
    """An argument is split over devices in a way that cannot be served."""


class LayoutError(MegaMoEError):
    """Weights are in the wrong memory layout."""
