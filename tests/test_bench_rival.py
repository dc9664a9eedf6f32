"""The benchmark's column of the rival, with stand-ins for its process."""

import json
import subprocess
import sys

import numpy as np
import pytest

import jax_megamoe as mm
from bench import table
from bench.__main__ import main
from bench.inputs import make_inputs, make_weights
from bench.rival import INSTALL, client
from bench.timing import NUM_CALLS, Timing
from tests.support.bench_cases import SMALL, row_of


def measured(us, diff=1e-5):
    return {**Timing(us, us - 1, us + 1)._asdict(), "diff": diff, "diff_to_ours": diff}


def test_merge_adds_ratios_and_refuses_wrong_results():
    rows = [row_of(100.0, tokens=n, routing="uniform", ceiling_us=80.0) for n in (1, 2, 3, 4)]
    found = {
        "uniform-1": measured(120.0),
        "uniform-2": measured(50.0, diff=0.5),
        "uniform-3": measured(50.0, diff=float("nan")),
    }
    client.merge(rows, found)
    assert rows[0]["ours_over_rival"] == pytest.approx(100 / 120)
    assert rows[0]["rival"]["ratio"] == 1.5
    assert [table.winner(row) for row in rows] == ["ours", "-", "-", "-"]
    assert "wrong result" in rows[1]["rival"]["error"]
    assert "wrong result" in rows[2]["rival"]["error"]
    assert rows[3]["rival"] == {"error": "not measured"}
    assert "ours_over_rival" not in rows[1]
    json.dumps(rows, allow_nan=False)


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        (row_of(100.0, rival=measured(90.0)), "rival"),
        (row_of(100.0, rival=measured(101.0)), "ours or rival"),
        (row_of(100.0, ragged_us=500.0, dense_us=50.0), "dense"),
        (row_of(100.0), "-"),
    ],
)
def test_winner(row, wanted):
    assert table.winner(row) == wanted


def test_table_of_rivals_says_what_is_missing(capsys):
    rows = [
        row_of(100.0, routing="uniform", winner="-", rival={"error": "not installed: torch"}),
        row_of(100.0, routing="uniform", winner="-", rival={"error": "Traceback\nRuntimeError: it broke\n"}),
    ]
    table.print_rivals("flash", rows, table.RIVALS)
    out = capsys.readouterr().out
    assert "absent" in out and "failed" in out
    assert "RuntimeError: it broke" in out and INSTALL in out


def python_that(tmp_path, body):
    """An executable that stands for the rival's interpreter."""
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\nimport json, pathlib, sys\nfolder = pathlib.Path(sys.argv[3])\n{body}\n")
    script.chmod(0o755)
    return str(script)


def test_rival_gets_natural_weights_and_the_inputs(tmp_path):
    weights = make_weights(SMALL)
    inputs = make_inputs(SMALL, 3, "uniform", seed=3)
    reference = mm.reference.moe(inputs.x[0], weights, inputs.topk_ids[0], inputs.topk_weights[0])
    client.write_weights(tmp_path, weights)
    client.write_case(tmp_path, "uniform-3", inputs, [reference] * NUM_CALLS, reference)
    for name, array in zip(("gate_up", "gate_up_scale", "down", "down_scale"), weights.unpack(), strict=True):
        assert (tmp_path / f"{name}.bin").read_bytes() == np.asarray(array).tobytes()
    with np.load(tmp_path / "uniform-3.npz") as case:
        assert case["x"].shape == (NUM_CALLS, 3, 256) and case["x"].dtype == np.uint16
        np.testing.assert_array_equal(case["topk_ids"][4], inputs.topk_ids[4])
        np.testing.assert_array_equal(case["topk_weights"][4], inputs.topk_weights[4])
        np.testing.assert_array_equal(case["reference"], np.asarray(reference).view(np.uint16))


def test_rival_process_that_dies_leaves_its_records(tmp_path):
    client.write_request(tmp_path, SMALL, [("uniform", 1), ("uniform", 8)])
    body = """
request = json.loads((folder / "request.json").read_text())
assert request["shape"]["num_experts"] == 16
print("a library says hello")
print(json.dumps({"case": request["cases"][0]["name"], "us": 1.0}), flush=True)
sys.exit(3)
"""
    seen: list[str] = []
    found = client.run_rival(python_that(tmp_path, body), tmp_path, seen.append)
    assert found == {"uniform-1": {"us": 1.0}, "uniform-8": {"error": "the process ended with status 3"}}
    assert seen == ["uniform-1"]


def test_rival_that_hangs_is_ended(tmp_path):
    client.write_request(tmp_path, SMALL, [("uniform", 1)])
    found = client.run_rival(python_that(tmp_path, "import time; time.sleep(60)"), tmp_path, timeout=1)
    assert "no result after 1 s" in found["uniform-1"]["error"]


def test_rivals_process_needs_no_jax():
    """Its interpreter has none, and one that has would lend the rival's process a second set of CUDA libraries."""
    code = """
import sys
sys.modules |= {"jax": None, "jaxlib": None, "jax_megamoe": None}  # whoever imports these fails
import bench.rival.__main__
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rival_says_what_is_missing():
    report = client.versions_of(sys.executable)
    assert "error" in report or report["sgl-deep-gemm"]


def test_whole_run_with_a_rival(tmp_path, capsys):
    body = """
if sys.argv[3] == "--versions":
    print(json.dumps({"sgl-deep-gemm": "0"}))
elif "--compile" not in sys.argv:
    for case in json.loads((folder / "request.json").read_text())["cases"]:
        assert (folder / f"{case['name']}.npz").exists()
        print(json.dumps({"case": case["name"], "us": 1.0, "us_least": 0.9, "us_most": 1.1, "diff": 0, "diff_to_ours": 0}))
"""
    path = tmp_path / "result.json"
    arguments = ["--shapes", "tiny", "--tokens", "2", "--rivals", "--output", str(path)]
    assert main([*arguments, "--rival-python", python_that(tmp_path, body)]) == 0
    (row,) = json.loads(path.read_text())["shapes"]["tiny"]
    assert row["ours_over_rival"] == pytest.approx(row["us"])
    assert row["winner"] == "rival"
    assert "[2/2] tiny: the rival, uniform-2 tokens" in capsys.readouterr().err
