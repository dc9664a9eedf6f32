"""`python -m jax_megamoe`: the list of commands, and that each is one."""

import importlib
import importlib.metadata
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
