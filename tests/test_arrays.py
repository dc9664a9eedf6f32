"""What the public functions take for an array."""

from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_megamoe as mm
from jax_megamoe.arrays import as_array, unwrap
from jax_megamoe.errors import DTypeError
from tests.support import boxes
from tests.support.expert_layer import packed_weights

ARRAYS = [np.arange(3), jnp.arange(3.0), np.zeros((0, 2), ml_dtypes.bfloat16)]


@pytest.mark.parametrize("array", ARRAYS, ids=["numpy", "jax", "empty"])
def test_arrays_pass_as_they_are_and_out_of_boxes(array):
    assert as_array("x", array) is array
    for box in boxes.ALL:
        assert as_array("x", box(array)) is array and unwrap(box(array)) is array
        assert as_array("x", boxes.Param(box(array))) is array


def test_traced_arrays_pass_as_they_are():
    def double(x):
        assert as_array("x", x) is x and as_array("x", boxes.Param(x)) is x
        return 2 * x

    assert jax.jit(double)(jnp.arange(3)).tolist() == [0, 2, 4]


@pytest.mark.parametrize("scalar", [np.float32(2.5), np.int64(7), ml_dtypes.bfloat16(1.5)])
def test_numpy_scalars_are_arrays_without_dimensions(scalar):
    array = as_array("x", scalar)
    assert (array.shape, array.dtype, array[()]) == ((), scalar.dtype, scalar)


def test_weights_come_out_of_boxes():
    weights = packed_weights()
    assert unwrap(weights) is weights
    for box in boxes.ALL:
        assert unwrap(box(weights)) is weights


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0, 2.0], "bias is a list, wanted an array: convert it with jax.numpy.asarray."),
        ((1.0, 2.0), "bias is a tuple, wanted an array: convert it with jax.numpy.asarray."),
        (3, "bias is an int, wanted an array: convert it with jax.numpy.asarray."),
        (boxes.Param([1.0]), "bias is a list, wanted an array: convert it with jax.numpy.asarray."),
        (None, "bias is None, wanted an array: pass one."),
        (boxes.Partitioned(None), "bias is a Partitioned, wanted an array: pass one."),
        (packed_weights(), "bias is an ExpertWeights, wanted an array: pass one."),
    ],
)
def test_what_is_no_array_is_refused_by_its_name(value, message):
    with pytest.raises(DTypeError) as raised:
        as_array("bias", value)
    assert str(raised.value) == message


@pytest.mark.parametrize("dtype", ["O", "m8[s]", "V1", np.longdouble, "S3"], ids=str)
def test_dtypes_that_jax_lacks_are_refused_by_name(dtype):
    with pytest.raises(DTypeError, match="logits has dtype .*, wanted one that JAX has: "):
        mm.route(np.zeros((2, 4), dtype), 2)


def test_other_byte_orders_serve_and_masked_arrays_do_not():
    logits = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    for a, b in zip(mm.route(logits.astype(">f4"), 2), mm.route(logits, 2), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(DTypeError, match="logits is a MaskedArray, wanted an array: pass one"):
        mm.route(np.ma.masked_array(logits, logits > 0), 2)


class Endless:
    """A box that holds itself."""

    def __jax_array__(self):
        return self


@pytest.mark.parametrize("value", [Endless(), mock.Mock(), mock.MagicMock(), Endless, boxes.Param])
def test_boxes_without_an_end_and_classes_are_no_arrays(value):
    with pytest.raises(DTypeError, match="x is an? .*, wanted an array"):
        as_array("x", value)
