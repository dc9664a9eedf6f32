"""`python -m jax_megamoe`: the list of commands, and that each is one."""

import importlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import types

import pytest

import jax_megamoe as mm
from jax_megamoe.__main__ import COMMANDS, main


def test_version():
    assert mm.__version__ == importlib.metadata.version("jax_megamoe")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_without_a_command_it_lists_them(arguments, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["jax_megamoe"])
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in COMMANDS.items():
        assert any(line.split() == [name, *command.help.split()] for line in lines)


def test_it_says_its_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{mm.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_have_help(name, capsys):
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0 and "usage: " in capsys.readouterr().out


def test_a_command_gets_its_arguments_and_gives_its_status(monkeypatch):
    got: list[list[str]] = []

    def run(arguments: list[str]) -> int:
        got.append(arguments)
        return 7

    monkeypatch.setattr(importlib, "import_module", lambda name: types.SimpleNamespace(main=run))
    assert main(["peers", "--processes", "2"]) == 7
    assert got == [["--processes", "2"]]


def test_what_is_no_command(capsys):
    assert main(["docter"]) == 2
    assert "the command is 'docter', wanted one of doctor, convert, peers, demo" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["peers", "demo"])
def test_a_machine_without_the_devices_that_are_asked_for(name):
    environment = {**os.environ, "JAX_PLATFORMS": "cuda", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "jax_megamoe", name]
    if any(importlib.util.find_spec(f"jax_cuda{major}_plugin") for major in (12, 13, 14)):
        pytest.skip("there may be a GPU")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("error: JAX has no devices (") == 1
    assert "Traceback" not in done.stderr


def test_a_reader_that_has_seen_enough(monkeypatch):
    def run(arguments: list[str]) -> int:
        raise BrokenPipeError

    closed: list[int] = []
    monkeypatch.setattr(importlib, "import_module", lambda name: types.SimpleNamespace(main=run))
    monkeypatch.setattr(os, "dup2", lambda null, out: closed.append(out))
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(fileno=lambda: 17))
    assert main(["doctor"]) == 1 and closed == [17]


def test_an_interruption_is_no_traceback(monkeypatch, capsys):
    def run(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", lambda name: types.SimpleNamespace(main=run))
    assert main(["demo"]) == 130 and capsys.readouterr().err == "error: interrupted\n"


def test_faults_of_commands_stay_what_they_are(monkeypatch):
    def run(arguments: list[str]) -> int:
        raise AssertionError("a bug")

    monkeypatch.setattr(importlib, "import_module", lambda name: types.SimpleNamespace(main=run))
    with pytest.raises(AssertionError, match="a bug"):
        main(["demo"])
