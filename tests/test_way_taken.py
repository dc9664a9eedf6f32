"""Which way a program over several ranks takes, the fused kernel or collectives, and how long ranks wait; no GPU needed."""

import logging
import re
from collections.abc import Callable
from typing import Any

import jax
import pytest
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from jax_megamoe.errors import MegaMoEError
from jax_megamoe.primitives import _library, _reachability, moe_peers
from tests.support.cuda_lowering import FUSED, LOCAL, attribute, calls, cuda_text
from tests.support.expert_layer import make_layer
from tests.support.meshes import AUTO, EXPLICIT, MESHES, make_mesh, place_all
from tests.support.skips import unless, why_no_host_devices

pytestmark = unless(why_no_host_devices())


@pytest.fixture(autouse=True)
def forget_what_was_logged():
    moe_peers._log_once.cache_clear()
    yield
    moe_peers._log_once.cache_clear()


# Which way is taken.


def test_a_cpu_has_no_trace_of_the_kernel():
    mesh, layer = make_mesh(MESHES["data x expert"], AUTO), make_layer()
    texts = [
        cuda_text(lambda *a, i=i: mm.moe(*a, implementation=i), *place_all(mesh, layer), platforms=("cpu",))
        for i in (None, "collective")
    ]
    assert calls(texts[0]) == [] and "all_gather" in texts[0]
    assert texts[0] == texts[1]


@pytest.mark.usefixtures("built")
def test_one_program_for_both_platforms():
    mesh, layer = make_mesh(MESHES["data x expert"], AUTO), make_layer()
    text = cuda_text(mm.moe, *place_all(mesh, layer), platforms=("cpu", "cuda"))
    assert calls(text) == [FUSED] and "stablehlo.dot_general" in text and "all_gather" in text


@pytest.mark.usefixtures("built")
def test_implementations():
    mesh, layer = make_mesh(MESHES["data x expert"], AUTO), make_layer()
    wanted: list[tuple[Any, list[str]]] = [("cuda", [FUSED]), ("collective", [LOCAL]), ("reference", [])]
    for implementation, targets in wanted:
        text = cuda_text(lambda *a, i=implementation: mm.moe(*a, implementation=i), *place_all(mesh, layer))
        assert calls(text) == targets
        assert ("all_gather" in text) == (implementation != "cuda")


def because_of_tokens() -> tuple[Callable, Any, str]:
    mesh = make_mesh(MESHES["data x expert"], AUTO)
    reason = "the tokens are not split over 'expert', of the axes 'expert' of the experts"
    return lambda *a, **k: mm.moe(*a, token_axes="data", **k), place_all(mesh, make_layer(), tokens="data"), reason


def because_of_some_axes() -> tuple[Callable, Any, str]:
    mesh = make_mesh({"a": 2, "b": 2, "c": 2}, EXPLICIT)
    arguments = place_all(mesh, make_layer(), tokens=("b", "c"), experts=("a", "b"))
    return lambda *a, **k: mm.moe(*a, expert_axis=("a", "b"), **k), arguments, "the tokens are not split over 'a', of"


def because_of_check_vma() -> tuple[Callable, Any, str]:
    """Inside a `shard_map` whose marks say that all ranks have the same tokens, whatever `token_axes` says."""
    mesh = make_mesh(MESHES["expert"], AUTO)

    def function(*arguments: Any, **options: Any) -> Any:
        specs: Any = {"in_specs": (P(), P("expert"), P(), P()), "out_specs": P()}
        return jax.shard_map(lambda *a: mm.moe(*a, **options), mesh=mesh, **specs)(*arguments)

    return function, place_all(mesh, make_layer(), tokens=None), "the tokens are not split over 'expert'"


def because_of_peers(monkeypatch) -> tuple[Callable, Any, str]:
    monkeypatch.setattr(
        _reachability, "reason_for_collectives", lambda devices, sizes, axes: f"peers {dict(sizes)} {axes}"
    )
    mesh = make_mesh(MESHES["expert x model"], AUTO)
    return mm.moe, place_all(mesh, make_layer()), "peers {'expert': 4, 'model': 2} ('expert',)"


def because_of_ranks(monkeypatch) -> tuple[Callable, Any, str]:
    def refuse(*sizes: int) -> int:
        raise ValueError("jax_megamoe.moe: the expert group has 8 ranks; the kernel serves 1 to 4.")

    monkeypatch.setattr(_library._core, "peer_workspace_bytes", refuse)
    reason = "the expert group has 8 ranks; the kernel serves 1 to 4"
    return mm.moe, place_all(make_mesh(MESHES["expert"], AUTO), make_layer()), reason


CASES = [because_of_tokens, because_of_some_axes, because_of_check_vma, because_of_peers, because_of_ranks]


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("case", CASES)
def test_reasons_for_collectives(case, monkeypatch, caplog):
    function, arguments, reason = case(monkeypatch) if case.__code__.co_argcount else case()
    with caplog.at_level(logging.WARNING, "jax_megamoe"):
        for _ in range(2):
            assert calls(cuda_text(function, *arguments)) == [LOCAL]
    (record,) = (r for r in caplog.records if "implementation='collective' is used instead" in r.message)  # once
    assert reason in record.message
    with pytest.raises(MegaMoEError, match="implementation is 'cuda' and .*" + re.escape(reason)):
        cuda_text(lambda *a: function(*a, implementation="cuda"), *arguments)
    caplog.clear()
    moe_peers._log_once.cache_clear()
    # Asked for, or on another platform, it is nothing to report.
    assert calls(cuda_text(lambda *a: function(*a, implementation="collective"), *arguments)) == [LOCAL]
    assert calls(cuda_text(function, *arguments, platforms=("cpu",))) == []
    assert not [record for record in caplog.records if "implementation=" in record.message]


def test_cuda_on_a_cpu_is_an_error():
    mesh, layer = make_mesh(MESHES["expert"], AUTO), make_layer()
    with pytest.raises(MegaMoEError, match="implementation is 'cuda' on a CPU, wanted None, 'collective' or"):
        jax.jit(lambda *a: mm.moe(*a, implementation="cuda"))(*place_all(mesh, layer))


def test_other_platforms_are_an_error():
    mesh, layer = make_mesh(MESHES["expert"], AUTO), make_layer()
    with pytest.raises(MegaMoEError, match="the platform is tpu, wanted cuda or cpu"):
        cuda_text(mm.moe, *place_all(mesh, layer), platforms=("tpu",))


def test_old_builds_are_errors(built):
    arguments = place_all(make_mesh(MESHES["expert"], AUTO), make_layer())
    del built.peer_workspace_bytes
    with pytest.raises(MegaMoEError, match="_core has no peer_workspace_bytes, wanted a build of the same version"):
        cuda_text(mm.moe, *arguments)


# How long a rank waits.


VARIABLES = {
    "JAX_MEGAMOE_TIMEOUT_SECONDS": (" timeout_microseconds", "30000000"),
    "JAX_MEGAMOE_SETUP_TIMEOUT_SECONDS": ("setup_timeout_microseconds", "120000000"),
}


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("variable", VARIABLES)
def test_timeout_variables(monkeypatch, variable):
    arguments = place_all(make_mesh(MESHES["expert"], AUTO), make_layer())
    name, default = VARIABLES[variable]
    for text, wanted in (("2.5", "2500000"), ("600", "600000000"), ("", default)):
        monkeypatch.setenv(variable, text)
        lowered = cuda_text(mm.moe, *arguments)
        assert attribute(lowered, name) == wanted
        for other, (other_name, other_default) in VARIABLES.items():
            assert other == variable or attribute(lowered, other_name) == other_default


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf", "1e9"])
def test_timeout_variables_are_checked(monkeypatch, variable, text):
    layer = make_layer()
    monkeypatch.setenv(variable, text)
    with pytest.raises(MegaMoEError, match=f"{variable} is '{text}', wanted a number of seconds"):
        mm.moe(*layer[:4])


@pytest.mark.parametrize("variable", VARIABLES)
def test_timeouts_are_part_of_what_jax_remembers(monkeypatch, variable):
    """Eager calls and new traces see a change, although the program is otherwise one that JAX has lowered."""
    arguments = place_all(make_mesh(MESHES["expert"], AUTO), make_layer())
    name = VARIABLES[variable][0]
    for text, wanted in (("30", "30000000"), ("7", "7000000")):
        monkeypatch.setenv(variable, text)
        assert f"{name}={wanted}" in str(jax.make_jaxpr(lambda *a: mm.moe(*a))(*arguments))
