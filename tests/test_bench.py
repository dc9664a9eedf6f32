import json

import pytest

from bench.__main__ import compare, main
from bench.presets import SHAPES, Shape


def test_expert_bytes_counts_weights_and_packed_scales():
    # 3 * 256 * 128 weights; gate/up: 2 tiles x 2 blocks, down: 4 tiles x 1 stage, 16 bytes of scales each.
    assert Shape(256, 128, 8, 2).expert_bytes == 3 * 256 * 128 + 16 * (2 * 2 + 4)


def test_dry_run_writes_results_that_compare(tmp_path, capsys):
    path = tmp_path / "result.json"
    assert main(["--shapes", "tiny", "--tokens", "3", "--routing", "masked30", "--output", str(path)]) == 0
    assert "no figures of the kernel" in capsys.readouterr().out
    result = json.loads(path.read_text())
    (row,) = result["shapes"]["tiny"]
    assert row["tokens"] == 3
    assert row["us"] > 0
    assert row["diff"] == 0
    assert 0 < row["touched"] <= SHAPES["tiny"].num_experts
    assert main(["compare", str(path), str(path)]) == 0
    assert "x1.000 (within the spread)" in capsys.readouterr().out


def test_compare_says_what_is_outside_the_spread():
    def result(us):
        row = {"tokens": 8, "us": us, "us_least": us - 1, "us_most": us + 1}
        return {"device": "d", "commit": "c", "shapes": {"flash": [row]}}

    assert compare(result(100.0), result(80.0))[1] == "flash     8 tokens: 100.0 -> 80.0 us, x0.800"


def test_unknown_shape_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--shapes", "flush"])
    assert "wanted some of flash" in capsys.readouterr().err
