"""The script that runs the kernel under compute-sanitizer, with a shell script in the place of the tool."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "sanitize_kernels.py"
CLEAN = "ok   H 512\n========= ERROR SUMMARY: 0 errors"
HAZARD = "ok   H 512\n========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"
UNSUPPORTED = "========= Error: Device not supported. Please refer to the documentation."


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sanitize_kernels", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


script = load()


@pytest.fixture
def tool(monkeypatch, tmp_path):
    """tool(shell commands): what compute-sanitizer is from now on; it gets the script's arguments."""
    (tmp_path / "build").mkdir()
    for name in ("probe", "ranks", "probe_racecheck", "ranks_racecheck"):
        (tmp_path / "build" / name).touch()
    monkeypatch.setattr(script, "ROOT", tmp_path)

    def make(commands: str) -> None:
        path = tmp_path / "tool"
        path.write_text(f"#!/bin/sh\n{commands}\n")
        path.chmod(0o755)
        monkeypatch.setenv("COMPUTE_SANITIZER", str(path))

    return make


@pytest.mark.parametrize(
    ("status", "text", "outcome"),
    [
        (0, CLEAN, script.CLEAN),
        (0, CLEAN.replace("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed"), script.CLEAN),
        (script.FOUND_STATUS, CLEAN.replace("0 errors", "3 errors"), script.FOUND),
        (0, HAZARD, script.FOUND),  # whatever the status is
        (1, CLEAN.replace("ok ", "BAD"), script.FAILED),  # a wrong result
        (0, "ok   H 512", script.FAILED),  # the tool has said nothing
        (0, "========= ERROR SUMMARY: 0 errors", script.FAILED),  # the program has said nothing
        (-9, "half a line", script.FAILED),
    ],
)
def test_what_is_clean(status, text, outcome):
    job = script.Job("memcheck", "mxfp4", "swapAB")
    found = script.judge(job, status, text, 1.0)
    assert found.outcome == outcome and (found.text == "") == (outcome == script.CLEAN)


def test_every_case_is_run_once():
    tools, formats = list(script.TOOLS), list(script.FORMATS)
    everything = script.choose(tools, formats, "", "1/1")
    assert len(everything) == len(set(everything)) == len(script.CASES) * 3 * 4
    parts = [job for part in ("1/3", "2/3", "3/3") for job in script.choose(tools, formats, "", part)]
    assert sorted(map(str, parts)) == sorted(map(str, everything))
    assert {job.case for job in script.choose(["racecheck"], formats, "ranks", "1/1")} == {
        case for case in script.CASES if "ranks" in case
    }
    with pytest.raises(SystemExit, match="'leakcheck' is none of memcheck"):
        script.choose(["leakcheck"], formats, "", "1/1")


def test_a_matrix_with_a_finding(tool, capsys, tmp_path):
    tool(f'case "$*" in *racecheck*) echo "{HAZARD}"; exit {script.FOUND_STATUS};; *) echo "{CLEAN}";; esac')
    output = tmp_path / "found.json"
    arguments = ["--cases", "^swapAB$", "--tools", "memcheck,racecheck", "--output", str(output)]
    assert script.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "RACECHECK SUMMARY: 1 hazard" in printed and "3 clean, 3 FOUND" in printed
    rows = json.loads(output.read_text())
    assert [row["outcome"] for row in rows] == [script.CLEAN, script.FOUND] * 3
    assert {row["command"] for row in rows} == {script.CASES["swapAB"]}


def test_the_programs_are_bare(tool, tmp_path):
    """Their own bands and poison would hide what the tools look for."""
    tool(f'echo "$PROBE_BARE $PROBE_FORMAT $*" >>"{tmp_path}/seen"; echo "{CLEAN}"')
    assert script.main(["--cases", "^swapAB$", "--tools", "racecheck", "--formats", "mxfp4"]) == 0
    *_, last = (tmp_path / "seen").read_text().splitlines()
    assert last.startswith("1 mxfp4 ") and "--tool racecheck build/probe_racecheck check 512 384 8 4 5" in last


def test_what_does_not_end_is_ended(tool, capsys):
    tool(f'case "$*" in *synccheck*) sleep 60;; *) echo "{CLEAN}";; esac')
    arguments = ["--cases", "^swapAB$", "--tools", "synccheck", "--formats", "mxfp4", "--limit", "0.3"]
    assert script.main(arguments) == 2
    assert "NOT IN TIME" in capsys.readouterr().out
    assert script.main([*arguments, "--total", "0"]) == 2
    assert "not run" in capsys.readouterr().out


def test_a_machine_on_which_it_does_not_work(tool, capsys, monkeypatch, tmp_path):
    tool(f'echo "{UNSUPPORTED}"; exit 1')
    assert script.main([]) == 2
    assert "does not work on this machine" in capsys.readouterr().err
    monkeypatch.setenv("COMPUTE_SANITIZER", "no-such-tool")
    assert script.main([]) == 2
    assert "There is no no-such-tool on PATH" in capsys.readouterr().err
    (tmp_path / "build" / "ranks").unlink()
    assert script.main([]) == 2
    assert "There is no build/ranks: run scripts/probe build checks." in capsys.readouterr().err
