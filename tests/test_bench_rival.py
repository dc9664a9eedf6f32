"""The benchmark's column of the rival, with stand-ins for its process."""

import itertools
import json
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jax_megamoe as mm
from bench import ranks, table
from bench.__main__ import main
from bench.inputs import make_inputs, make_weights
from bench.rival import INSTALL, client, process
from bench.rival.place import Place
from bench.timing import NUM_CALLS, NUM_RUNS, Timing, time_per_call
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


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs 2 devices")
def test_weights_and_tokens_of_a_group_are_those_of_its_ranks(tmp_path):
    """As files hold them: experts in the order of the ranks, and each rank's tokens beside those of the others."""
    mesh = jax.make_mesh((2,), ("expert",), devices=jax.devices()[:2])
    weights = make_weights(SMALL)
    client.write_weights(tmp_path, jax.device_put(weights, NamedSharding(mesh, PartitionSpec("expert"))))
    for name, array in zip(("gate_up", "gate_up_scale", "down", "down_scale"), weights.unpack(), strict=True):
        assert (tmp_path / f"{name}.bin").read_bytes() == np.asarray(array).tobytes()
    inputs = make_inputs(SMALL, 6, "uniform", seed=3)
    client.write_case(tmp_path, "uniform-3", inputs, inputs.x, inputs.x[0])
    for place in Place.all_of(2):
        mine = slice(3 * place.rank, 3 * place.rank + 3)
        case = process.read_case(tmp_path / "uniform-3.npz", place)
        np.testing.assert_array_equal(case["topk_ids"], np.stack(inputs.topk_ids)[:, mine])
        np.testing.assert_array_equal(case["x"], np.stack(inputs.x)[:, mine].view(np.uint16))
        np.testing.assert_array_equal(case["reference"], case["ours"][0])


def test_a_group_has_a_process_for_each_rank(tmp_path):
    client.write_request(tmp_path, SMALL, [("uniform", 1)])
    body = """
rank, ranks, port = sys.argv[-1].split(",")
(folder / f"rank-{rank}").write_text(f"{ranks} {port}")
if rank == "0":
    print(json.dumps({"case": "uniform-1", "us": 1.0}))
print(json.dumps({"done": True}))
"""
    found = client.run_rival(python_that(tmp_path, body), tmp_path, ranks=3)
    assert found == {"uniform-1": {"us": 1.0}}
    places = {(tmp_path / f"rank-{rank}").read_text() for rank in range(3)}
    assert len(places) == 1 and places.pop().startswith("3 ")


@pytest.mark.parametrize("end", ['print(json.dumps({"error": "no memory"}))', "os._exit(9)"])
def test_a_rank_that_fails_ends_its_group(tmp_path, end):
    client.write_request(tmp_path, SMALL, [("uniform", 1), ("uniform", 8)])
    body = f"""
import os, time
if sys.argv[-1].startswith("0,"):
    print(json.dumps({{"case": "uniform-1", "us": 1.0}}), flush=True)
    (folder / "reported").touch()
    time.sleep(60)
while not (folder / "reported").exists():
    time.sleep(0.01)
time.sleep(0.1)
{end}
"""
    started = time.monotonic()
    found = client.run_rival(python_that(tmp_path, body), tmp_path, ranks=2)
    assert time.monotonic() - started < 30
    why = "no memory" if "error" in end else "the process ended with status 9"
    assert found == {"uniform-1": {"us": 1.0}, "uniform-8": {"error": why}}


def test_what_does_not_compile_is_named(tmp_path, capsys):
    body = 'print(json.dumps({"error": "no nvcc"} if sys.argv[5] == "8" else {"done": True}))'
    client.compile_ahead(python_that(tmp_path, body), tmp_path, SMALL, [1, 8], ranks=2)
    assert capsys.readouterr().err == "rival, 8 tokens, while compiling: no nvcc\n"


def test_a_run_takes_as_long_as_the_slowest_process():
    started = []
    timing = time_per_call(lambda: started.append(1), lambda _: None, num_calls=10, slowest=lambda seconds: 0.02)
    # Two programs fill 30 ms, by the slowest; three and one before, to compile and to choose that.
    assert len(started) == 3 + 1 + NUM_RUNS * 2
    assert timing == pytest.approx((1e3, 1e3, 1e3))


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs 2 devices")
def test_ranks_beside_the_rival(tmp_path, monkeypatch, capsys):
    def measure(plan, folder=None):
        assert (folder is not None) == (plan.format == "fp8_block")
        for routing, tokens in itertools.product(plan.routings, plan.tokens):
            yield row_of(3.0, tokens, ranks=plan.num_ranks, routing=routing, format=plan.format, ceiling_us=1.0)

    monkeypatch.setattr(ranks, "measure", measure)
    path = tmp_path / "result.json"
    arguments = ["ranks", "--shapes", "tiny", "--ranks", "1,2", "--tokens", "2,8", "--weights", "mxfp4,fp8_block"]
    python = python_that(tmp_path, WHOLE_RUN)
    assert main([*arguments, "--rivals", "--rival-python", python, "--output", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["rivals"] == {"sgl-deep-gemm": "0.2.5"}
    rows = result["rows"]["tiny"]
    beside = [row for row in rows if "rival" in row]
    assert [(row["ranks"], row["tokens"]) for row in beside] == [(1, 2), (1, 8), (2, 2), (2, 8)] and len(rows) == 8
    assert all(row["ours_over_rival"] == 3.0 and row["winner"] == "rival" for row in beside)
    printed = capsys.readouterr()
    assert "tiny: ours and sgl-deep-gemm 0.2.5" in printed.out and "diff to ours" in printed.out
    assert "[12/12] tiny: the rival, 2 ranks, uniform-8 tokens" in printed.err


def test_ranks_without_the_rival_say_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ranks, "measure", lambda plan: [row_of(3.0, ranks=1, routing="uniform", format=plan.format)])
    arguments = ["ranks", "--shapes", "tiny", "--ranks", "1", "--tokens", "8"]
    assert main([*arguments, "--rivals", "--rival-python", str(tmp_path / "none")]) == 0
    assert "The rival has no figure: [Errno 2]" in capsys.readouterr().out


def test_rival_says_what_is_missing():
    report = client.versions_of(sys.executable)
    assert "error" in report or report["sgl-deep-gemm"]


WHOLE_RUN = """
if sys.argv[3] == "--versions":
    print(json.dumps({"sgl-deep-gemm": "0.2.5"}))
elif "--compile" not in sys.argv and sys.argv[-1].startswith("0,"):
    for case in json.loads((folder / "request.json").read_text())["cases"]:
        print(json.dumps({"case": case["name"], "us": 1.0, "us_least": 0.9, "us_most": 1.1, "diff": 0, "diff_to_ours": 0}))
"""


def test_whole_run_with_a_rival(tmp_path, capsys):
    checks = "assert (folder / f\"{case['name']}.npz\").exists()"
    body = WHOLE_RUN.replace('["cases"]:\n', f'["cases"]:\n        {checks}\n')
    path = tmp_path / "result.json"
    arguments = ["--shapes", "tiny", "--tokens", "2", "--rivals", "--output", str(path)]
    assert main([*arguments, "--rival-python", python_that(tmp_path, body)]) == 0
    (row,) = json.loads(path.read_text())["shapes"]["tiny"]
    assert row["ours_over_rival"] == pytest.approx(row["us"])
    assert row["winner"] == "rival"
    printed = capsys.readouterr()
    assert "tiny: ours and sgl-deep-gemm 0.2.5" in printed.out
    assert "[2/2] tiny: the rival, uniform-2 tokens" in printed.err
