"""Generated arguments of checkpoints: each is refused in a sentence, or serves; nothing is read that is not wanted."""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

import jax_megamoe as mm
from jax_megamoe.checkpoints import checkpoint as implementation
from jax_megamoe.errors import CheckpointError
from tests.support.checkpoints import build, write
from tests.support.families import PLANS
from tests.support.hostile import BUT_NONE, NOTHING, SENTENCE, cases, judge
from tests.support.meshes import AUTO, mesh_of


@functools.cache
def stock() -> Any:
    return build(PLANS["deepseek-v3"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("checkpoint") / "model", stock().config, stock().tensors)


@pytest.fixture
def checkpoint(folder, monkeypatch) -> Any:
    """What is loaded is not looked at here, and takes far longer than everything else."""
    monkeypatch.setattr(implementation, "load_layers", lambda layers, **_: layers)
    return mm.read_checkpoint(folder)


ODD: list[Any] = [*(-1, 0, 10**5000, 1.0, "1", True, np.True_, np.int64(1), np.array(1), np.array([1]), [1], b"1", {})]


def is_layer(value: Any, layers: list[int]) -> bool:
    if isinstance(value, bool | np.bool_):
        return False
    if isinstance(value, np.ndarray):
        return value.shape == () and value.dtype.kind in "iu" and int(value) in layers
    return isinstance(value, int | np.integer) and int(value) in layers


@cases(200)
@given(data=st.data())
def test_options_of_experts(data, checkpoint):
    draw, numbers = data.draw, checkpoint.moe_layers
    one = st.sampled_from([*numbers, *numbers, numbers[-1] + 1, *ODD])
    options: dict[str, Any] = {}
    which, right = draw(st.sampled_from(["layer", "layer", "layers", "neither", "both"])), True
    if which in ("layer", "both"):
        options["layer"] = draw(one)
        right &= is_layer(options["layer"], numbers)
    if which in ("layers", "both"):
        options["layers"] = draw(st.lists(one, max_size=3) | BUT_NONE)
        are_layers = isinstance(options["layers"], list) and options["layers"] and which == "layers"
        right &= bool(are_layers) and all(is_layer(value, numbers) for value in options["layers"])
    if draw(st.booleans()):
        options["format"] = draw(st.sampled_from([None, "fp8_block", "mxfp4", "fp8", 0, ["mxfp4"], b"mxfp4"]))
        right &= options["format"] in (None, "fp8_block", "mxfp4")
    if draw(st.booleans()):
        options["progress"] = draw(st.sampled_from([None, True, False, print, 1, "yes"]))
        right &= options["progress"] is None or isinstance(options["progress"], bool) or options["progress"] is print
    if draw(st.booleans()):
        options["mesh"] = draw(st.sampled_from([None, mesh_of(jax.devices(), {"expert": 2}, AUTO), "mesh", {}, (2, 4)]))
        options["expert_axis"] = draw(
            st.sampled_from(["expert", ("expert",), None, "nowhere", 0, ("expert", "expert")])
        )
        is_mesh = options["mesh"] is None or not isinstance(options["mesh"], str | dict | tuple)
        right &= is_mesh and (options["mesh"] is None or options["expert_axis"] in ("expert", ("expert",), None))
    event("right" if right else "wrong")
    found = judge(lambda: checkpoint.experts(**options), right)
    if right:
        wanted = [options["layer"]] if which == "layer" else options.get("layers", numbers)
        assert len(found) == len(wanted)


@cases(60)
@given(data=st.data())
def test_layers_of_routers(data, checkpoint):
    what = data.draw(st.sampled_from(["router", "moe_options", "shared_experts"]))
    layer = data.draw(st.sampled_from([*checkpoint.moe_layers, *ODD]) | BUT_NONE)
    judge(lambda: getattr(checkpoint, what)(layer), is_layer(layer, checkpoint.moe_layers))


@cases(60)
@given(thing=NOTHING | st.text(max_size=30) | st.binary(max_size=10))
def test_what_is_no_folder(thing):
    for function in (mm.read_checkpoint, mm.load_experts):
        with pytest.raises((mm.errors.ArgumentError, CheckpointError)) as raised:
            function(thing)
        text = str(raised.value)
        assert text.isprintable() and (SENTENCE.match(text) or isinstance(raised.value, CheckpointError))
