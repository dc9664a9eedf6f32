"""Safetensors files and folders that are damaged, incomplete or hostile: always a `CheckpointError`, never much memory."""

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jax_megamoe.checkpoints.folder import INDEX, Tensors
from jax_megamoe.checkpoints.header import DTYPE_BITS
from jax_megamoe.checkpoints.safetensors import MAX_HEADER_BYTES, File
from jax_megamoe.errors import CheckpointError, MegaMoEError
from tests.support.checkpoints import DTYPES, file_bytes

RNG = np.random.default_rng(0)
GOOD: dict[str, np.ndarray[Any, Any]] = {
    "a": RNG.integers(0, 256, (4, 6)).astype(np.uint8),
    "b.weight": RNG.standard_normal((2, 3)).astype(ml_dtypes.bfloat16),
    "c": np.full((), 3.5, np.float32),
    "empty": np.zeros((0, 5), np.float32),
    "d": RNG.standard_normal((3, 2, 2)).astype(np.float32),
}
GOOD_BYTES = file_bytes(GOOD, {"format": "pt"})


def with_header(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    shape = list(shape) if isinstance(shape, tuple) else shape
    offsets = list(offsets) if isinstance(offsets, tuple) else offsets
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def test_every_tensor_comes_back(tmp_path):
    file = File(put(tmp_path / "good.safetensors", GOOD_BYTES))
    assert file.metadata == {"format": "pt"} and list(file.tensors) == list(GOOD)
    for name, array in GOOD.items():
        tensor = file.tensors[name]
        assert (tensor.dtype, tensor.shape, tensor.nbytes) == (DTYPES[array.dtype], array.shape, array.nbytes)
        np.testing.assert_array_equal(tensor.array(), array)
        assert not tensor.array().flags.writeable or tensor.offset % array.itemsize
    np.testing.assert_array_equal(file.tensors["d"].array(1), GOOD["d"][1])
    file.release_pages()
    np.testing.assert_array_equal(file.tensors["a"].array(), GOOD["a"])


def test_types_of_one_byte_and_less_are_bytes(tmp_path):
    fp8 = np.arange(8, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    tensors = {
        "w": fp8.reshape(2, 4),
        "s": fp8.view(ml_dtypes.float8_e8m0fnu),
        "f": np.arange(6, dtype=np.uint8).reshape(2, 3),
    }
    file = File(put(tmp_path / "a.safetensors", file_bytes(tensors, dtypes={"f": "F4"})))
    assert file.tensors["f"].shape == (2, 6)
    for name, array in tensors.items():
        found = file.tensors[name].array()
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, array.view(np.uint8))


def test_the_safetensors_library_writes_what_is_read(tmp_path):
    library = pytest.importorskip("safetensors.numpy", reason="compares with the library where it is installed")
    arrays = {name: GOOD[name] for name in ("a", "d")}
    library.save_file(arrays, tmp_path / "a.safetensors")
    file = File(tmp_path / "a.safetensors")
    for name, array in arrays.items():
        np.testing.assert_array_equal(file.tensors[name].array(), array)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "has 0 bytes, wanted 8"),
    "seven bytes": (b"\0" * 7, "has 7 bytes, wanted 8"),
    "no header": (b"\0" * 8, "header has 0 bytes, wanted 2 to 0"),
    "length of everything": (with_header({}, length=1 << 63), "has 9223372036854775808 bytes, wanted 2 to 2"),
    "length past the end": (with_header({}, length=3), "has 3 bytes, wanted 2 to 2"),
    "no JSON": (with_header(b"{nothing"), "no JSON"),
    "no object": (with_header(b"[]"), "does not begin with {"),
    "no text": (with_header(b'{"\xff\xfe": 1}'), "no JSON"),
    "deep": (with_header(b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"), "more than 3 levels"),
    "deep objects": (with_header(b'{"a":' * 4000 + b"1" + b"}" * 4000), "more than 3 levels"),
    "closed twice": (with_header(b"{}}"), "no JSON"),
    "NaN": (with_header(b'{"a": NaN}'), "NaN in it"),
    "a number of 5000 digits": (with_header(b'{"a": ' + b"1" * 5000 + b"}"), "no JSON"),
    "a list": (with_header({"a": [1]}), "other fields"),
    "fields missing": (with_header({"a": {"dtype": "U8", "shape": [1]}}, b"1"), "other fields"),
    "fields more": (with_header({"a": entry(extra=1)}, b"1234"), "other fields"),
    "twice": (with_header(b'{"a":%b,"b":%b,"a":%b}' % (3 * (json.dumps(entry(shape=[0], offsets=(0, 0))).encode(),))), "tensor 'a' is twice in the header"),
    "metadata twice": (with_header(b'{"__metadata__":{},"__metadata__":{}}'), "tensor '__metadata__' is twice in the header"),
    "field twice": (with_header(b'{"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "is twice"),
    "metadata": (with_header({"__metadata__": {"a": 1}}), "no object of strings"),
    "metadata of a list": (with_header({"__metadata__": []}), "no object of strings"),
    "dtype": (with_header({"a": entry("F9")}, b"1234"), "has dtype 'F9'"),
    "dtype of a number": (with_header({"a": entry(3)}, b"1234"), "has dtype 3"),
    "negative size": (with_header({"a": entry(shape=[-4])}, b"1234"), r"has shape \[-4\]"),
    "size of a float": (with_header({"a": entry(shape=[4.0])}, b"1234"), r"has shape \[4.0\]"),
    "size of a bool": (with_header({"a": entry(shape=[True], offsets=(0, 1))}, b"1"), r"has shape \[True\]"),
    "huge size": (with_header({"a": entry(shape=[1 << 64])}, b"1234"), "has shape"),
    "overflowing sizes": (with_header({"a": entry(shape=[1 << 62, 4])}, b"1234"), "has 4 bytes, wanted those of U8"),
    "no bytes of too many": (with_header({"a": entry(shape=[0, 1 << 62, 4], offsets=(0, 0))}), "wanted that of an array"),
    "many dimensions": (with_header({"a": entry(shape=[1] * 9)}, b"1234"), "wanted up to 8"),
    "offsets backwards": (with_header({"a": entry(offsets=(4, 0))}, b"1234"), "lies from 4 to 0"),
    "offsets past the end": (with_header({"a": entry(shape=[8], offsets=(0, 8))}, b"1234"), "lies from 0 to 8"),
    "negative offsets": (with_header({"a": entry(offsets=[-4, 0])}, b"1234"), "has data_offsets"),
    "three offsets": (with_header({"a": entry(offsets=[0, 2, 4])}, b"1234"), "has data_offsets"),
    "wrong size": (with_header({"a": entry(shape=[3])}, b"1234"), "has 4 bytes, wanted those of U8"),
    "half of a byte": (with_header({"a": entry("F4", [1], (0, 1))}, b"1"), "has 1 bytes, wanted those of F4"),
    "overlap": (with_header({"a": entry(), "b": entry(offsets=(2, 6))}, b"123456"), "tensor 'b' begins at byte"),
    "the same bytes": (with_header({"a": entry(), "b": entry()}, b"1234"), "begins at byte"),
    "gap": (with_header({"a": entry(), "b": entry(offsets=(5, 9))}, b"123456789"), "tensor 'b' begins at byte"),
    "gap in front": (with_header({"a": entry(offsets=(1, 5))}, b"12345"), "tensor 'a' begins at byte"),
    "bytes left": (with_header({"a": entry()}, b"12345"), "where its tensors end"),
    "truncated": (GOOD_BYTES[:-1], "not all there"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_named(name, tmp_path):
    content, text = HOSTILE[name]
    with pytest.raises(CheckpointError, match=text) as caught:
        File(put(tmp_path / "x.safetensors", content))
    assert caught.value.file.endswith("x.safetensors") and isinstance(caught.value, MegaMoEError)
    # One sentence that ends with what to do.
    assert str(caught.value).endswith(".") and ": " in caught.value.problem


def test_messages_are_short_whatever_is_in_the_file(tmp_path):
    for header in ({"a" * 100_000: 1}, {"a": entry(shape=list(range(100_000)))}, {"a": entry("F" * 100_000)}):
        with pytest.raises(CheckpointError) as caught:
            File(put(tmp_path / "x.safetensors", with_header(header, b"1234")))
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("dtype", ["F6_E2M3", "F6_E3M2", "C64"])
def test_what_no_array_is_made_of_is_named(dtype, tmp_path):
    nbytes = 8 * DTYPE_BITS[dtype] // 8
    file = File(put(tmp_path / "a.safetensors", with_header({"a": entry(dtype, (8,), (0, nbytes))}, bytes(nbytes))))
    with pytest.raises(CheckpointError, match=f"tensor 'a' is of {dtype}, wanted a type that arrays have: convert it."):
        file.tensors["a"].array()


def test_brackets_in_names_do_not_nest(tmp_path):
    name = '[[[[{{{{\\"\\\\' + "]" * 9
    file = File(put(tmp_path / "a.safetensors", with_header({name: entry()}, b"1234")))
    assert list(file.tensors) == [name]


def test_files_that_are_not_there_or_change(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read, No such file"):
        File(tmp_path / "none.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in (tmp_path, tmp_path / "pipe.safetensors"):
        with pytest.raises(CheckpointError, match="is no regular file"):
            File(path)
    file = File(put(tmp_path / "a.safetensors", GOOD_BYTES))
    put(tmp_path / "a.safetensors", GOOD_BYTES[:-4])
    with pytest.raises(CheckpointError, match="bytes and had"):
        file.tensors["a"].array()


def check(path: Path, content: bytes) -> None:
    """Reads everything, or says what is wrong, in little memory."""
    put(path, content)
    tracemalloc.start()
    try:
        file = File(path)
        for tensor in file.tensors.values():
            tensor.array()
    except CheckpointError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    # What Python makes of a header of a few hundred bytes, and of an error; never what a header claims.
    assert peak < len(content) + 300_000


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutated_files_are_read_or_named(tmp_path, data):
    content = bytearray(GOOD_BYTES)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["byte", "cut", "insert", "remove", "digit"])):
            case "byte":
                content[at] = data.draw(st.integers(0, 255))
            case "cut":
                del content[max(at, 1) :]
            case "insert":
                content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
            case "remove":
                del content[at : at + data.draw(st.integers(1, 9))]
            case "digit":
                digits = [i for i, byte in enumerate(content) if chr(byte).isdigit()]
                if digits:
                    content[data.draw(st.sampled_from(digits))] = data.draw(st.sampled_from(b"0123456789-"))
        if not content:
            break
    check(tmp_path / "x.safetensors", bytes(content))


NUMBERS = st.one_of(st.integers(-2, 2**66), st.floats(), st.booleans(), st.none(), st.text(max_size=3))
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from(["U8", "F4", "BF16", "F32", "F8_E4M3"]), NUMBERS),
        "shape": st.one_of(st.lists(NUMBERS, max_size=10), NUMBERS),
        "data_offsets": st.one_of(st.lists(st.integers(0, 40), min_size=2, max_size=2), st.lists(NUMBERS), NUMBERS),
        "more": NUMBERS,
    },
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.dictionaries(st.text(max_size=5), st.one_of(ENTRIES, NUMBERS), max_size=5), data=st.binary(max_size=40)
)
@example(header={"__metadata__": {"dtype": "U8"}}, data=b"")
def test_invented_headers_are_read_or_named(tmp_path, header, data):
    check(tmp_path / "x.safetensors", with_header(header, data))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200), length=st.one_of(st.none(), st.integers(0, 2**64 - 1)))
def test_noise_is_named(tmp_path, content, length):
    check(tmp_path / "x.safetensors", content if length is None else length.to_bytes(8, "little") + content)


def test_a_header_is_at_most_so_long_as_the_library_allows(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:  # sparse
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER_BYTES + 100)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=f"wanted 2 to {MAX_HEADER_BYTES - 0}|wanted 2 to"):
        File(path)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def index_of(weight_map: Any) -> str:
    return json.dumps({"metadata": {}, "weight_map": weight_map})


INDICES: dict[str, tuple[str, str]] = {
    "traversal": (index_of({"a": "../one.safetensors"}), r"tensor 'a' is said to be in '\.\./one\.safetensors'"),
    "absolute": (index_of({"a": "/etc/passwd"}), "'/etc/passwd'"),
    "dots": (index_of({"a": ".."}), r"'\.\.'"),
    "no name": (index_of({"a": ""}), "is said to be in ''"),
    "a list of names": (index_of({"a": ["one.safetensors"]}), "is said to be in"),
    "a number": (index_of({"a": 3}), "is said to be in '3'"),
    "backslash": (index_of({"a": "..\\one.safetensors"}), "strange name"),
    "null": (index_of({"a": "one\0.safetensors"}), "strange name"),
    "half a pair": (index_of({"a": "\ud800.safetensors"}), "tensor 'a' is said to be in a file with a strange name"),
    "a long name": (index_of({"a": "a" * 256}), "tensor 'a' is said to be in a file with a strange name"),
    "a name of many bytes": (index_of({"a": "\u0416" * 128}), "strange name"),
    "file missing": (index_of({"a": "two.safetensors"}), "two.safetensors: cannot be read"),
    "tensor missing": (index_of({"z": "one.safetensors"}), "one.safetensors: tensor 'z' is missing"),
    "no map": ("{}", "has no weight_map"),
    "a list": ("[]", "no object of JSON"),
    "no JSON": ("{", "is no JSON"),
    "empty": (index_of({}), "has no weight_map"),
    "deep": ("[" * 100_000, "is no JSON"),
}


@pytest.mark.parametrize("name", INDICES)
def test_an_index_that_lies_is_named(name, tmp_path):
    put(tmp_path / "one.safetensors", GOOD_BYTES)
    text, problem = INDICES[name]
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=problem):
        Tensors(tmp_path)


def test_a_tensor_in_two_files_is_named(tmp_path):
    for name in ("one", "two"):
        put(tmp_path / f"{name}.safetensors", GOOD_BYTES)
    with pytest.raises(CheckpointError, match="two.safetensors: tensor 'a' is in one.safetensors too"):
        Tensors(tmp_path)
    (tmp_path / INDEX).write_text(index_of({"a": "one.safetensors", "d": "two.safetensors"}))
    with pytest.raises(CheckpointError, match="is in one.safetensors too"):
        Tensors(tmp_path)
    # A file that the index does not name is no part of the checkpoint.
    (tmp_path / INDEX).write_text(index_of({"a": "one.safetensors"}))
    assert len(Tensors(tmp_path)) == len(GOOD)


def test_an_index_that_leads_nowhere_is_missing(tmp_path):
    put(tmp_path / "one.safetensors", GOOD_BYTES)
    for target in ("nothing", INDEX):
        (tmp_path / INDEX).unlink(missing_ok=True)
        (tmp_path / INDEX).symlink_to(target)
        with pytest.raises(CheckpointError, match=f"{INDEX}: cannot be read"):
            Tensors(tmp_path)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="neither model.safetensors.index.json nor"):
        Tensors(tmp_path)


def test_the_error_has_its_parts_and_survives_pickling():
    import pickle

    error = pickle.loads(pickle.dumps(CheckpointError("f", "t", "is bad: do this.")))
    assert (error.file, error.tensor, error.problem, str(error)) == (
        "f",
        "t",
        "is bad: do this.",
        "f: tensor 't' is bad: do this.",
    )
    assert str(CheckpointError("f", None, "is bad.")) == "f: is bad."
