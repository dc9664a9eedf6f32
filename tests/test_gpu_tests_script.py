"""The script that deals the GPU tests out to processes, as far as it goes without a GPU."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

SCRIPT = Path(__file__).parent.parent / "scripts" / "gpu_tests.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_tests", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load()


@given(st.lists(st.text()), st.integers(1, 40))
def test_every_test_is_dealt_once(tests, num_shards):
    shards = script.deal(tests, num_shards)
    assert len(shards) == num_shards
    assert sorted(test for shard in shards for test in shard) == sorted(tests)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_every_file_of_gpu_tests_is_run():
    folder = SCRIPT.parent.parent / "tests"
    marked = {f"tests/gpu/{path.name}" for path in (folder / "gpu").glob("test_*.py")} | {
        "tests/test_sharding.py",
        "tests/test_manual_sharding.py",
        "tests/test_shared_experts.py",
    }
    assert {*script.ONE_GPU, *script.ALL_GPUS} == marked


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert script.main([]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_a_process_that_does_not_end_is_ended(monkeypatch, capsys, tmp_path):
    slow = tmp_path / "test_slow.py"
    slow.write_text("import time, pytest\n@pytest.mark.gpu\ndef test_slow(): time.sleep(60)\n")
    jobs = [("GPU 0", "", "0.1", [os.fspath(slow)])]
    assert script.run(jobs, ["-c", os.fspath(SCRIPT.parent.parent / "pyproject.toml")], limit=3.0) == [2]
    assert "did not end in time" in capsys.readouterr().out


def test_ended_from_outside_it_ends_its_processes_and_says_what_they_did(tmp_path):
    slow, begun = tmp_path / "test_slow.py", tmp_path / "begun"
    slow.write_text(
        "import pathlib, time, pytest\n@pytest.mark.gpu\ndef test_slow():\n"
        f"    print('at work', flush=True); pathlib.Path({os.fspath(begun)!r}).touch(); time.sleep(60)\n"
    )
    code = (
        f"import sys; sys.path.insert(0, {os.fspath(SCRIPT.parent)!r}); import gpu_tests, signal\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))\n"
        f"options = ['-s', '-c', {os.fspath(SCRIPT.parent.parent / 'pyproject.toml')!r}]\n"
        f"gpu_tests.run([('GPU 0', '', '0.1', [{os.fspath(slow)!r}])], options, limit=60.0)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 60
        while not begun.exists() and time.monotonic() < end:
            time.sleep(0.1)
        process.terminate()
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 3
    assert "at work" in output


@pytest.mark.parametrize(
    ("body", "status"),
    [("pass", 0), ("assert False", 1), ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 1)],
)
def test_status_is_that_of_the_tests(body, status, tmp_path, capsys):
    (tmp_path / "test_one.py").write_text(f"import pytest\n@pytest.mark.gpu\ndef test_one(): {body}\n")
    jobs = [("GPU 0", "", "0.1", [os.fspath(tmp_path / "test_one.py")])]
    assert script.run(jobs, ["-c", os.fspath(SCRIPT.parent.parent / "pyproject.toml")], limit=60.0) == [status]
    assert f"GPU 0: status {status}" in capsys.readouterr().out


def test_a_process_without_selected_tests_has_not_failed(tmp_path, capsys):
    (tmp_path / "test_one.py").write_text("import pytest\n@pytest.mark.gpu\ndef test_one(): pass\n")
    jobs = [("GPU 0", "", "0.1", [os.fspath(tmp_path / "test_one.py")])]
    options = ["-k", "other", "-c", os.fspath(SCRIPT.parent.parent / "pyproject.toml")]
    assert script.run(jobs, options, limit=60.0) == [script.NO_TESTS]
    assert "1 deselected" in capsys.readouterr().out
    assert [script.overall(statuses) for statuses in ([0, 5], [5, 1, 0], [2, 5, 1], [5, 5])] == [0, 1, 2, 5]


def test_summary_is_shown_whatever_is_logged_after_it(tmp_path, capsys):
    body = "import atexit; atexit.register(print, 'a library says goodbye')"
    (tmp_path / "test_one.py").write_text(f"import pytest\n@pytest.mark.gpu\ndef test_one(): {body}\n")
    jobs = [("GPU 0", "", "0.1", [os.fspath(tmp_path / "test_one.py")])]
    assert script.run(jobs, ["-c", os.fspath(SCRIPT.parent.parent / "pyproject.toml")], limit=60.0) == [0]
    out = capsys.readouterr().out
    assert "1 passed" in out and "goodbye" not in out
