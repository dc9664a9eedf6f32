import io
import json

import jax
import numpy as np
import pytest

import jax_megamoe as mm
from bench import plot, presets, progress, records, timing
from bench.__main__ import main
from bench.compare import compare
from bench.inputs import make_inputs, make_weights
from bench.measure import dense_layer, ragged_layer
from bench.presets import MODELS, ROUTINGS, SHAPES
from bench.shape import Shape
from bench.timing import NUM_CALLS, time_per_call
from tests.support.bench_cases import SMALL, row_of


@pytest.fixture
def few_runs(monkeypatch):
    """A dry run shows that everything runs; its times are nobody's."""
    monkeypatch.setattr(timing, "NUM_RUNS", 2)


# Presets


def test_expert_bytes_counts_weights_and_packed_scales():
    # 3 * 256 * 128 weights; gate/up: 2 tiles x 2 blocks, down: 4 tiles x 1 stage, 16 bytes of scales each.
    assert Shape(256, 128, 8, 2).expert_bytes == 3 * 256 * 128 + 16 * (2 * 2 + 4)


def test_expert_bytes_are_those_of_the_packed_leaves():
    weights = make_weights(SMALL)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(weights)) == SMALL.weight_bytes == weights.nbytes


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        # hidden, intermediate, experts of one rank of eight, top-k
        ("deepseek-v3", (7168, 2048, 32, 8)),
        ("flash", (4096, 2048, 32, 6)),
        ("pro", (7168, 3072, 48, 6)),
        ("qwen3-30b", (2048, 768, 16, 8)),
        ("qwen3-235b", (4096, 1536, 16, 8)),
        ("glm-5", (6144, 2048, 32, 8)),
        ("kimi-k2", (7168, 2048, 48, 8)),
        ("minimax-m2", (3072, 1536, 32, 8)),
    ],
)
def test_presets_are_the_models(name, shape):
    assert SHAPES[name] == shape
    assert SHAPES[f"{name}-ep1"] == (*shape[:2], 8 * shape[2], shape[3])
    assert MODELS[name].source


def test_groups_hold_every_model_that_fits():
    assert len(presets.GROUPS["ep8"]) == len(MODELS)
    assert all(SHAPES[name].weight_bytes < presets.GPU_BYTES for name in presets.GROUPS["ep1"])


def test_selecting_shapes_and_routings():
    assert presets.select_shapes("pro,tiny,pro") == ["pro", "tiny"]
    assert presets.select_shapes("ep8")[:2] == ["flash", "pro"]
    assert presets.select_routings("all") == list(ROUTINGS)
    assert presets.select_routings("hot,zipf") == ["hot", "zipf"]
    assert presets.select_formats("mxfp4,fp8_block,mxfp4") == ["mxfp4", "fp8_block"]
    assert presets.select_formats("all") == list(presets.FORMATS) == ["fp8_block", "fp8_channel", "mxfp4"]


WRONG_ARGUMENTS = {
    "--shapes flush": "wanted some of flash",
    "--routing unifrom": "wanted some of uniform",
    "--weights fp8_block,fp4": "--weights has 'fp4', wanted some of fp8_block",
    "--tokens 8,-1": "wanted positive numbers",
    "layers --variants fast": "wanted some of default",
    "layers --stack 3 --layers 2": "wanted 1 to --layers (2)",
    "ranks --shapes flush": "wanted some of flash",
    "ranks --weights fp4": "wanted some of fp8_block",
    "ranks --ranks 0": "--ranks is 0, wanted numbers up to the",
    "ranks --ranks 2,99": "--ranks is 2,99, wanted numbers up to the",
    "compare no-such-file no-such-file": "No such file",
}


@pytest.mark.parametrize(("arguments", "message"), WRONG_ARGUMENTS.items(), ids=WRONG_ARGUMENTS)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments.split())
    assert message in capsys.readouterr().err


# Inputs


@pytest.mark.parametrize("format", presets.FORMATS)
def test_weights_of_every_format_are_what_the_packer_makes(format):
    weights = make_weights(SMALL, format)
    assert (weights.format, weights.num_experts) == (format, SMALL.num_experts)
    again = mm.pack_experts(*weights.unpack())
    assert again.format == format
    for ours, packed in zip(weights.leaves, again.leaves, strict=True):
        np.testing.assert_array_equal(np.asarray(ours).view(np.uint8), np.asarray(packed).view(np.uint8))
    # Most values and scales of two experts differ, so that what is in a wrong place shows.
    assert all(np.mean(array[0] != array[1]) > 0.5 for array in map(np.asarray, weights.unpack()))
    assert np.mean(np.asarray(weights.down_scale[0] != weights.down_scale[1])) > 0.2  # in blocks, padding is most of it
    call = (inputs := make_inputs(SMALL, 5, "uniform", seed=1)).x[0], weights, inputs.topk_ids[0]
    result = np.asarray(mm.reference.moe(*call, inputs.topk_weights[0]), np.float32)
    assert np.isfinite(result).all() and 1e-3 < result.std() < 1e3


def test_routings_are_what_their_descriptions_say():
    ids = {routing: np.stack(make_inputs(SMALL, 200, routing, seed=1).topk_ids) for routing in ROUTINGS}
    for routing in ("uniform", "zipf", "hot"):
        flat = ids[routing].reshape(-1, SMALL.top_k)
        assert flat.min() >= 0 and flat.max() < SMALL.num_experts
        assert all(len(set(row)) == SMALL.top_k for row in flat)
    counts = {routing: np.bincount(array[array >= 0], minlength=SMALL.num_experts) for routing, array in ids.items()}
    assert counts["uniform"].max() < 1.2 * counts["uniform"].min()
    assert counts["zipf"][0] > 2 * counts["zipf"][-1]
    assert counts["hot"][0] == NUM_CALLS * 200
    assert (ids["masked30"] == -1).mean() == pytest.approx(0.3, abs=0.02)


def test_inputs_differ_between_calls_and_repeat_for_a_seed():
    first, again = (make_inputs(SMALL, 5, "uniform", seed=3) for _ in range(2))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first.x[0], first.x[1])
    assert first.pairs(SMALL.num_experts) == 5 * SMALL.top_k


def test_unknown_routing_is_an_error():
    with pytest.raises(ValueError, match="wanted one of uniform"):
        make_inputs(SMALL, 2, "even", seed=0)


def test_alternatives_ignore_unused_slots():
    inputs = make_inputs(SMALL, 6, "masked30", seed=0)
    keys = jax.random.split(jax.random.key(0))
    weights = jax.random.normal(keys[0], (16, 256, 256)) / 16, jax.random.normal(keys[1], (16, 128, 256)) / 11
    call = (inputs.x[0], weights, inputs.topk_ids[0], inputs.topk_weights[0])
    ragged, dense = (np.asarray(layer(*call), np.float32) for layer in (ragged_layer, dense_layer))
    np.testing.assert_allclose(ragged, dense, atol=0.05)


# Timing and progress


def test_time_per_call_divides_by_the_calls():
    waited: list[str] = []
    timing = time_per_call(lambda: "result", waited.append, num_calls=4)
    assert set(waited) == {"result"}
    assert 0 < timing.us_least <= timing.us <= timing.us_most < 1e4


def test_progress_counts_and_estimates(monkeypatch):
    clock = iter([0.0, 30.0, 60.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    report = progress.Progress(2, stream)
    report.step("one")
    report.step("two")
    assert stream.getvalue() == "[1/2] one (30s so far, about 30s left)\n[2/2] two (1m00s so far)\n"


# Results


def result_of(*rows, device="d"):
    return {"device": device, "commit": "c", "shapes": {"flash": list(rows)}}


@pytest.mark.usefixtures("few_runs")
def test_dry_run_writes_results_that_compare(tmp_path, capsys):
    path = tmp_path / "result.json"
    arguments = ["--shapes", "tiny", "--tokens", "3", "--routing", "masked30,uniform", "--output", str(path)]
    assert main([*arguments, "--rivals", "--rival-python", str(tmp_path / "none"), "--commit", "abc"]) == 0
    printed = capsys.readouterr()
    assert "no figures of the kernel" in printed.out
    assert "The rival has no figure" in printed.out
    assert "[2/2] tiny: 3 tokens" in printed.err
    result = json.loads(path.read_text())
    assert result["commit"] == "abc"
    masked, uniform = result["shapes"]["tiny"]
    assert [masked["routing"], uniform["routing"]] == ["masked30", "uniform"]
    for row in (masked, uniform):
        assert row["tokens"] == 3
        assert row["us"] > 0
        assert row["diff"] == 0
        assert 0 < row["touched"] <= SHAPES["tiny"].num_experts
        assert "error" in row["rival"] and row["winner"] == "-"
    assert main(["compare", str(path), str(path)]) == 0
    assert "tiny, masked30     3 tokens" in (out := capsys.readouterr().out)
    assert out.count("x1.000 (within the spread)") == 2


@pytest.mark.exhaustive
@pytest.mark.usefixtures("few_runs")
def test_rows_have_the_cost_of_batch_invariance(tmp_path, capsys):
    path = tmp_path / "result.json"
    assert main(["--shapes", "tiny", "--tokens", "3", "--batch-invariant", "--output", str(path)]) == 0
    header, line = capsys.readouterr().out.splitlines()[-2:]
    (row,) = json.loads(path.read_text())["shapes"]["tiny"]
    assert row["invariant_us_least"] <= row["invariant_us"] <= row["invariant_us_most"]
    cells = dict(zip(header.split(), line.split(), strict=True))
    assert float(cells["invariant/us"]) == pytest.approx(row["invariant_us"] / row["us"], rel=1e-3)


@pytest.mark.exhaustive
@pytest.mark.usefixtures("few_runs")
def test_rows_of_several_formats(tmp_path, capsys):
    path = tmp_path / "result.json"
    arguments = ["--shapes", "tiny", "--tokens", "3", "--weights", "fp8_channel,mxfp4,fp8_block", "--output", str(path)]
    assert main([*arguments, "--rivals", "--rival-python", str(tmp_path / "none")]) == 0
    printed = capsys.readouterr()
    assert "of mxfp4 on" in printed.out
    assert "[2/3] tiny, mxfp4: 3 tokens" in printed.err
    rows = {row["format"]: row for row in json.loads(path.read_text())["shapes"]["tiny"]}
    assert list(rows) == ["fp8_channel", "mxfp4", "fp8_block"]
    assert [name for name, row in rows.items() if "rival" in row] == ["fp8_block"]
    shape, touched = SHAPES["tiny"], rows["mxfp4"]["touched"]
    num_weights = 3 * shape.hidden_size * shape.intermediate_size
    row_terms = 8 * (2 * shape.intermediate_size + shape.hidden_size)  # a scale and a bias for each
    assert all(row["touched"] == touched and row["diff"] == 0 for row in rows.values())
    assert rows["fp8_block"]["megabytes"] == round(touched * shape.expert_bytes) / 1e6
    assert rows["fp8_channel"]["megabytes"] == round(touched * (num_weights + row_terms)) / 1e6
    assert rows["mxfp4"]["megabytes"] == round(touched * (num_weights * 17 / 32 + row_terms)) / 1e6
    assert main(["compare", str(path), str(path)]) == 0
    assert capsys.readouterr().out.count("x1.000 (within the spread)") == 3


def test_formats_are_compared_and_drawn_apart():
    old = row_of(100.0, ceiling_us=80.0)
    block, fp4 = (row_of(us, ceiling_us=40.0, format=name) for us, name in ((90.0, "fp8_block"), (60.0, "mxfp4")))
    assert compare(result_of(old), result_of(block, fp4))[1:] == ["flash     8 tokens: 100.0 -> 90.0 us, x0.900"]
    (line,) = compare(result_of(old, fp4), result_of(fp4))[1:]
    assert line == "flash, mxfp4     8 tokens: 60.0 -> 60.0 us, x1.000 (within the spread)"
    drawn = plot.panels([result_of(old, fp4)])
    assert {title: line.ratios for title, (line,) in drawn.items()} == {"flash": [1.25], "flash, mxfp4": [1.5]}


def test_compare_says_what_is_outside_the_spread():
    assert compare(result_of(row_of(100.0)), result_of(row_of(80.0)))[1] == (
        "flash     8 tokens: 100.0 -> 80.0 us, x0.800"
    )


def test_compare_has_the_rival_and_names_what_does_not_match():
    rows = [row_of(us, rival=row_of(2 * us)) for us in (100.0, 90.0)]
    lines = compare(result_of(rows[0]), result_of(rows[1], device="e"))
    assert "not those of the code" in lines[1]
    assert lines[3] == "flash     8 tokens, rival: 200.0 -> 180.0 us, x0.900"
    # Another routing is another row.
    assert "no rows in common" in compare(result_of(row_of(1.0)), result_of(row_of(1.0, routing="zipf")))[-1]


def test_older_files_can_be_read(tmp_path):
    path = tmp_path / "old.json"
    path.write_text(json.dumps({**result_of(row_of(1.0)), "routing": "zipf"}))
    (row,) = records.read(path)["shapes"]["flash"]
    assert (row["routing"], row["format"]) == ("zipf", "fp8_block")
    path.write_text("{}")
    with pytest.raises(ValueError, match="holds no shapes"):
        records.read(path)


def test_older_files_name_the_rival_as_new_ones_do(tmp_path, capsys):
    row = row_of(100.0, peer=row_of(120.0), ours_over_peer=0.83, winner="ours or peer", ceiling_us=80.0)
    path = tmp_path / "old.json"
    path.write_text(json.dumps(result_of(row)))
    (read,) = records.read(path)["shapes"]["flash"]
    assert read == row_of(
        100.0,
        rival=row_of(120.0),
        ours_over_rival=0.83,
        winner="ours or rival",
        ceiling_us=80.0,
        routing="uniform",
        format="fp8_block",
    )
    assert main(["compare", str(path), str(path)]) == 0
    assert "flash     8 tokens, rival: 120.0 -> 120.0 us" in capsys.readouterr().out
    assert [line.name for line in plot.panels([records.read(path)])["flash"]] == ["jax_megamoe, d", "sgl-deep-gemm, d"]


def test_plot_has_a_panel_for_each_shape_with_ours_first(tmp_path):
    rows = [row_of(10.0 * n, tokens=n, ceiling_us=8.0 * n, rival=row_of(12.0 * n), ragged_us=80.0 * n) for n in (1, 4)]
    zipf = row_of(10.0, tokens=1, ceiling_us=5.0, routing="zipf", rival={"error": "absent"})
    drawn = plot.panels([result_of(*rows, zipf)])
    assert list(drawn) == ["flash", "flash, zipf"]
    assert [line.name for line in drawn["flash"]] == ["jax_megamoe, d", "sgl-deep-gemm, d", "ragged_dot, bf16, d"]
    assert drawn["flash"][0].ratios == pytest.approx([1.25, 1.25])
    assert drawn["flash"][1].ratios == pytest.approx([1.5, 1.5])
    assert [line.ratios for line in drawn["flash, zipf"]] == [[2.0]]

    pytest.importorskip("matplotlib")
    source, image = tmp_path / "result.json", tmp_path / "plot.png"
    source.write_text(json.dumps(result_of(*rows, zipf)))
    assert main(["plot", str(source), "-o", str(image)]) == 0
    assert image.stat().st_size > 1000


def test_plot_names_the_rivals_version_and_leaves_wrong_results_out():
    wrong = row_of(10.0, tokens=2, ceiling_us=8.0, rival={**row_of(1.0), "error": "wrong result"})
    result = result_of(row_of(10.0, tokens=1, ceiling_us=8.0, rival=row_of(12.0)), wrong)
    drawn = plot.panels([{**result, "rivals": {"sgl-deep-gemm": "0.2.9"}}])["flash"]
    assert [(line.name, line.ratios) for line in drawn[1:]] == [("sgl-deep-gemm 0.2.9, d", [1.5])]


def test_plot_without_a_ceiling_is_refused(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    source = tmp_path / "result.json"
    source.write_text(json.dumps(result_of(row_of(1.0))))
    with pytest.raises(SystemExit):
        main(["plot", str(source), "-o", str(tmp_path / "plot.png")])
    assert "nothing to plot" in capsys.readouterr().err
