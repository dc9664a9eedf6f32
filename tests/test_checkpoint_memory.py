"""Opening a file takes at most its size and a constant, whatever is in it; and it says what `json.loads` says."""

import io
import itertools
import json
import pickle
import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jax_megamoe.checkpoints import json_entries, tensor_table
from jax_megamoe.checkpoints.cache import LayerFile
from jax_megamoe.checkpoints.folder import INDEX, MAX_JSON_BYTES, METADATA, Tensors, read_json
from jax_megamoe.checkpoints.json_entries import JsonEntries
from jax_megamoe.checkpoints.safetensors import File
from jax_megamoe.checkpoints.stock import StockModel
from jax_megamoe.errors import CheckpointError
from tests.support.hostile_json import EMPTY, HEADERS, INDICES, VALUES, file_of

SIZE = 1_000_000
# docs/reliability.md promises these.
CONSTANT, CONSTANT_OF_INDEX, CONSTANT_OF_CONFIG = 16_000_000, 8_000_000, 32_000_000


def peak_of(action: Callable[[], Any]) -> tuple[int, str]:
    """Bytes, with what is kept at the end, and the error if there was one."""
    problem, kept = "", None
    tracemalloc.start()
    try:
        kept = action()
    except CheckpointError as error:
        problem = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    del kept
    return peak, problem


def octets(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


@pytest.mark.parametrize("name", HEADERS)
def test_headers(name, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of(HEADERS[name](SIZE)))
    peak, problem = peak_of(lambda: File(path))
    assert peak <= path.stat().st_size + CONSTANT and len(problem) < 1000


def test_the_bound_is_that_of_the_size(tmp_path):
    """Of the file that comes closest: twice as many tensors take no more than twice the bytes more."""
    path, peaks = tmp_path / "x.safetensors", []
    for size in (SIZE, 2 * SIZE):
        path.write_bytes(file_of(HEADERS["small tensors"](size)))
        peak, problem = peak_of(lambda: File(path))
        assert not problem
        peaks.append(peak)
    assert peaks[1] - peaks[0] <= SIZE


@pytest.mark.parametrize("name", INDICES)
def test_indices(name, tmp_path):
    (tmp_path / "one.safetensors").write_bytes(file_of('{"a":' + EMPTY + "}"))
    path = tmp_path / INDEX
    path.write_bytes(octets(INDICES[name](SIZE)))
    peak, problem = peak_of(lambda: Tensors(tmp_path))
    # Nothing is kept of an index but names of files.
    assert peak <= CONSTANT_OF_INDEX and len(problem) < 1000


@pytest.mark.parametrize("name", VALUES)
def test_configurations(name, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(octets(VALUES[name](MAX_JSON_BYTES - 1)))
    peak, problem = peak_of(lambda: read_json(path))
    assert peak <= path.stat().st_size + CONSTANT_OF_CONFIG and len(problem) < 1000
    path.write_bytes(b" " * (MAX_JSON_BYTES + 1))
    with pytest.raises(CheckpointError, match="has 1000001 bytes, wanted up to 1000000: look what it is"):
        read_json(path)


@pytest.mark.parametrize("name", VALUES)
def test_what_a_cache_says_of_a_layer(name, tmp_path):
    path = tmp_path / "layer-00000.safetensors"
    text = json.dumps(VALUES[name](120_000), ensure_ascii=False)
    path.write_bytes(file_of(f'{{"__metadata__":{{"{METADATA}":{text}}}}}'))
    peak, problem = peak_of(lambda: LayerFile(path))
    assert peak <= path.stat().st_size + CONSTANT and "make the cache anew" in problem and len(problem) < 1000


CONFIG = {"model_type": "qwen3_moe", "num_hidden_layers": 2, "num_experts_per_tok": 1, "hidden_size": 1}


def test_layers_of_a_configuration(tmp_path):
    """A number that is no place for the first of them, and a long list of those without experts."""
    (tmp_path / "x.safetensors").write_bytes(file_of('{"model.layers.1.mlp.experts.0.gate_proj.weight":' + EMPTY + "}"))
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**CONFIG, "num_experts": 1, "first_k_dense_replace": -1_000_000}))
    peak, problem = peak_of(lambda: StockModel(tmp_path))
    assert not problem and peak <= CONSTANT_OF_CONFIG and StockModel(tmp_path).moe_layers == [0, 1]
    path.write_text(json.dumps({**CONFIG, "num_experts": 1, "mlp_only_layers": [0, [1], "1", {}, *range(2, 1000)]}))
    assert StockModel(tmp_path).moe_layers == [1]


@pytest.mark.parametrize(
    "field", ["model_type", "num_hidden_layers", "num_experts", "hidden_act", "num_experts_per_tok", "scoring_func"]
)
@pytest.mark.parametrize(
    "value", ["z" * 100_000, [1] * 100_000, 10**4200, -(10**4200)], ids=lambda value: str(type(value))
)
def test_messages_about_a_configuration_are_short(field, value, tmp_path):
    stem = "model.layers.1.mlp."
    (tmp_path / "x.safetensors").write_bytes(
        file_of(
            f'{{"{stem}gate.weight":{{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}},'
            f'"{stem}experts.0.gate_proj.weight":{{"dtype":"U8","shape":[0],"data_offsets":[4,4]}}}}',
            bytes(4),
        )
    )
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "num_experts": 1, field: value}))

    def read() -> None:
        model = StockModel(tmp_path)
        model.moe_options(1), model.router(1)

    with pytest.raises(CheckpointError) as caught:
        read()
    assert len(str(caught.value)) < 1000


def test_a_layer_of_many_small_experts(tmp_path):
    """What a layer is made of is found again when it is read."""
    count, names = 3000, []
    for expert, matrix in itertools.product(range(count), ("gate", "up", "down")):
        names.append(f"model.layers.1.mlp.experts.{expert}.{matrix}_proj.weight")
    held = {
        name: {"dtype": "F32", "shape": [1, 1], "data_offsets": [4 * at, 4 * at + 4]} for at, name in enumerate(names)
    }
    (tmp_path / "x.safetensors").write_bytes(file_of(json.dumps(held), bytes(4 * len(names))))
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "num_experts": count, "decoder_sparse_step": 1}))
    StockModel(tmp_path).layer(1)  # What is imported or compiled, once.
    peak, problem = peak_of(lambda: StockModel(tmp_path).layer(1))
    assert not problem and peak <= (tmp_path / "x.safetensors").stat().st_size + 500_000


def test_a_layer_of_many_experts_in_one_tensor(tmp_path):
    count = 100_000
    stem = "model.layers.1.mlp.experts."
    held = {
        stem + "gate_up_proj": {"dtype": "F32", "shape": [count, 2, 1], "data_offsets": [0, 8 * count]},
        stem + "down_proj": {"dtype": "F32", "shape": [count, 1, 1], "data_offsets": [8 * count, 12 * count]},
    }
    (tmp_path / "x.safetensors").write_bytes(file_of(json.dumps(held), bytes(12 * count)))
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "num_experts": count, "decoder_sparse_step": 1}))
    peak, problem = peak_of(lambda: StockModel(tmp_path).layer(1))
    assert not problem and peak < 500_000


SPACE = st.text(" \t\n\r", max_size=3)
TEXTS = st.text(max_size=6) | st.sampled_from(["\ud800", '"', "\\", "a\0b", "\u0416", "\U0001f600", "},{"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(TEXTS, JSON, max_size=5)


def parsed(text: bytes, piece: int, inner: str | None = None) -> Any:
    """What the entries come to, the text being read in pieces of this size; None where it is no JSON."""
    held = io.BytesIO(text)
    entries = JsonEntries(lambda count: held.read(min(count, piece)))
    try:
        found = {}
        for name, value in entries.entries(inner):
            found[name] = dict(value) if hasattr(value, "__next__") else value
        entries.check_end()
    except (ValueError, RecursionError):
        return None
    return found


def loaded(text: bytes) -> Any:
    """What `json.loads` makes of it, if that is an object."""
    try:
        found = json.loads(text.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


@settings(max_examples=300, deadline=None)
@given(
    fields=OBJECTS, is_ascii=st.booleans(), indent=st.sampled_from([None, 0, 2]), piece=st.integers(1, 40), end=SPACE
)
def test_an_object_means_what_it_means_to_json(fields, is_ascii, indent, piece, end):
    text = octets(end + json.dumps(fields, ensure_ascii=is_ascii, indent=indent) + end)
    assert repr(parsed(text, piece)) == repr(loaded(text)) != "None"
    for name in fields:
        assert repr(parsed(text, piece, inner=name)) == repr(loaded(text))


@settings(max_examples=500, deadline=None)
@given(fields=OBJECTS, piece=st.integers(1, 40), data=st.data())
@example(fields={"a": 12}, piece=1, data=None)
def test_a_changed_object_means_what_it_means_to_json(fields, piece, data):
    text = bytearray(octets(json.dumps(fields, ensure_ascii=False)))
    for _ in range(0 if data is None else data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        if data.draw(st.booleans()):
            text[at : at + data.draw(st.integers(0, 2))] = data.draw(
                st.sampled_from([b"", b'"', b",", b"{", b"}", b":", b"1"])
            )
        else:
            text[at:at] = data.draw(st.binary(max_size=2))
    assert repr(parsed(bytes(text), piece)) == repr(loaded(bytes(text)))


def test_an_entry_has_a_limit(monkeypatch):
    monkeypatch.setattr(json_entries, "MAX_ENTRY", 1000)
    monkeypatch.setattr(json_entries, "_PIECE_BYTES", 100)
    monkeypatch.setattr(json_entries, "_LEAST_BYTES", 10)
    for first, letter, piece in itertools.product((0, 1, 90, 99, 100, 101, 950), ("a", "\u0416"), (7, 1 << 20)):
        for length, is_read in ((900, True), (995, True), (996, False), (1900, False), (2500, False)):
            entry = f'"{letter * length}": 2'  # Five characters more.
            text = octets(f'{{"{"f" * first}":1,{entry},"last":3}}')
            assert (parsed(text, piece) is not None) == is_read


def test_no_value_is_kept_when_the_next_one_is_made():
    made: list[weakref.ref[Any]] = []

    class Value:
        def __init__(self, _: str) -> None:
            assert all(each() is None for each in made)
            made.append(weakref.ref(self))

    text = io.BytesIO(b'{"a":[0],"b":1,"c":{"d":[2],"e":3},"f":4 ,"g":5}')
    # Each number is made again when what ends it has been read, too.
    entries = JsonEntries(lambda count: text.read(min(count, 1)), decoder=json.JSONDecoder(parse_int=Value))
    for name, value in entries.entries(inner="c"):
        if name == "c":
            for _, each in value:
                del each
        del value
    assert len(made) > 6


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(TEXTS.filter(lambda name: name != "__metadata__"), max_size=30))
def test_tensors_are_found_by_any_name(tmp_path, names):
    header = "{" + ",".join(json.dumps(name) + ":" + EMPTY for name in names) + "}"
    path = Path(tmp_path) / "x.safetensors"
    path.write_bytes(file_of(header))
    if len(set(names)) < len(names):
        with pytest.raises(CheckpointError, match="is twice in the header"):
            File(path)
        return
    tensors = File(path).tensors
    assert list(tensors) == names and [tensors[name].name for name in names] == names
    assert "another" not in tensors and len(tensors) == len(names)


@pytest.mark.parametrize("count", [1, 2])
def test_tensors_go_to_another_process(count, tmp_path, monkeypatch):
    """Which has other hashes of the same names."""
    for number in range(count):
        header = "{" + ",".join(f'"{number}.{name}":{EMPTY}' for name in ("a", "b b", "\ud800")) + "}"
        (tmp_path / f"{number}.safetensors").write_bytes(file_of(header))
    tensors = Tensors(tmp_path)
    file = File(tmp_path / "0.safetensors")
    file.mapped()  # which does not go along
    kept = pickle.dumps((tensors, file))
    monkeypatch.setattr(tensor_table, "hash", lambda name: hash(name + "of another one"), raising=False)
    for found, names in zip(pickle.loads(kept), (list(tensors), list(tensors)[:3]), strict=True):
        held = found if isinstance(found, Tensors) else found.tensors
        assert list(held) == names and [held[name].name for name in names] == names and "c" not in held
