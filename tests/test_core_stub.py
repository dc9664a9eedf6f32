"""The stub of the compiled module says what the module has."""

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

import jax_megamoe

STUB = Path(jax_megamoe.__file__).parent / "_core.pyi"


@pytest.fixture
def core() -> Any:
    try:
        return importlib.import_module("jax_megamoe._core")
    except ModuleNotFoundError:
        pytest.skip("jax_megamoe._core is not built")


def stub() -> dict[str, list[str]]:
    """The names in the stub; of functions, with the names of their parameters."""
    names: dict[str, list[str]] = {}
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            names[node.name] = [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
        elif isinstance(node, ast.AnnAssign):
            assert isinstance(node.target, ast.Name)
            names[node.target.id] = []
    return names


def test_the_stub_has_the_names_of_the_module(core):
    found = {name for name in dir(core) if not name.startswith("_")}
    names = set(stub())
    if not core.has_cuda:
        names -= {"moe_execute_count", "can_access_peer", "symmetric_memories"}
    if not core.has_testing:
        names -= {"hold_sms"}
    assert found == names


def test_parameters_have_the_same_names(core):
    for name, parameters in stub().items():
        if parameters and hasattr(core, name):
            # pybind11 writes the signature into the first line: name(first: type, *, second: type) -> type
            (signature,) = re.findall(rf"^{name}\((.*)\) -> ", getattr(core, name).__doc__, re.MULTILINE)
            assert re.findall(r"(\w+): ", signature) == parameters, name
