"""The benchmark's other tables: many layers in one program, groups of ranks, and what their buffers take."""

import json

import jax
import numpy as np
import pytest

import jax_megamoe as mm
from bench import buffer_sizes, layers, ranks, timing
from bench.__main__ import main
from bench.presets import MODELS, SHAPES
from bench.timing import NUM_CALLS

# Layers


def layers_result(**variants):
    """added by program for each variant -> a result as `layers.main` collects it."""
    names = ("unrolled", "lax.scan", "lax.while_loop")
    reports = {
        name: {
            "programs": {
                "calls": {"us": 100.0, "captured": name != "off"},
                **{program: {"us": 100.0 + us} for program, us in zip(names, added, strict=True)},
            },
            "about": {"device": "d"},
        }
        for name, added in variants.items()
    }
    return layers.summarize({"shape": "flash", "tokens": 8, "layers": 32, "variants": reports})


def test_recommendation_follows_the_figures():
    default, size_1, off = (2.0, 16.0, 17.0), (2.1, 3.0, 3.5), (5.0, 15.0, 15.0)
    result = layers_result(default=default, **{"size-1": size_1}, off=off)
    assert result["alone_us"] == 100.0
    line = layers.recommendation(result)
    assert "XLA_FLAGS='--xla_gpu_graph_min_graph_size=1'" in line
    assert "adds 3.5 us a layer at most (lax.while_loop)" in line
    assert "default up to 17.0 (lax.while_loop)" in line
    # The other way round, no flags.
    assert "set no flags" in layers.recommendation(layers_result(default=size_1, **{"size-1": default}))
    # What is within the noise is not worth a flag.
    assert "set no flags" in layers.recommendation(layers_result(default=(3.0, 3.0, 3.9), **{"size-1": size_1}))


def test_variant_that_fails_is_named():
    result = layers_result(default=(1.0, 2.0, 3.0))
    result["variants"]["while"] = {"error": "unknown flag"}
    lines = layers.lines_of(layers.summarize(result))
    assert any("while failed: unknown flag" in line for line in lines)
    assert "2 layers" in lines[0] and lines[-1].startswith("Recommendation: set no flags")


def test_layers_dry_run(tmp_path, capsys):
    path = tmp_path / "layers.json"
    arguments = ["layers", "--shape", "tiny", "--tokens", "2", "--layers", "3", "--commit", "abc"]
    assert main([*arguments, "--variants", "size-1", "--output", str(path)]) == 0
    result = json.loads(path.read_text())
    programs = result["variants"]["size-1"]["programs"]
    assert list(programs) == ["calls", "unrolled", "lax.scan", "lax.while_loop"]
    assert all(programs[name]["us"] > 0 for name in programs)
    assert all(programs[name]["diff"] < 1e-4 for name in programs if name != "calls")
    assert result["variants"]["size-1"]["about"]["xla_flags"].endswith("--xla_gpu_graph_min_graph_size=1")
    assert result["commit"] == "abc"
    assert "nothing was measured on a GPU" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["compare", str(path), str(path)])


# Ranks


def test_most_touched_counts_the_fullest_rank():
    # Two ranks of four experts: 1 and 2 on one, 4, 6 and 7 on the other.
    ids = np.array([[1, 2], [4, 6], [7, 4], [-1, 8]])
    assert ranks._most_touched(ids, num_local_experts=4, num_ranks=2) == 3
    assert ranks._most_touched(ids, num_local_experts=2, num_ranks=4) == 2
    assert ranks._most_touched(np.full((3, 2), -1), num_local_experts=4, num_ranks=2) == 0


def test_programs_of_few_tokens_have_more_calls():
    assert [ranks._calls_of(tokens) for tokens in (1, 7, 8, 512)] == [48, 48, NUM_CALLS, NUM_CALLS]


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs 2 devices")
def test_ranks_dry_run(tmp_path, capsys, monkeypatch):
    path = tmp_path / "ranks.json"
    monkeypatch.setattr(timing, "NUM_RUNS", 2)  # times of a dry run are nobody's
    monkeypatch.setattr(ranks, "_calls_of", lambda tokens: 2)  # each is compiled
    arguments = ["ranks", "--shapes", "tiny", "--ranks", "2", "--tokens", "8", "--routing", "masked30"]
    arguments += ["--batch-invariant"]
    arguments += ["--weights", "mxfp4"]
    assert main([*arguments, "--commit", "abc", "--output", str(path)]) == 0
    printed = capsys.readouterr()
    assert "tiny" in printed.out and "collective_us" in printed.out
    assert "[1/1] tiny, masked30, mxfp4: 2 ranks, 8 tokens" in printed.err
    result = json.loads(path.read_text())
    assert result["commit"] == "abc" and "collective" in result["method"]
    (row,) = result["rows"]["tiny"]
    assert (row["ranks"], row["tokens"], row["routing"], row["format"]) == (2, 8, "masked30", "mxfp4")
    assert 0 < row["us_least"] <= row["us"] <= row["us_most"] and row["collective_us"] > 0
    assert 0 < row["touched"] <= SHAPES["tiny"].num_experts
    assert row["diff"] < 1e-5
    assert ("ceiling_us" in row) == (jax.default_backend() == "gpu")


# Memory of expert parallelism


def test_buffers(monkeypatch, capsys):
    monkeypatch.setattr(buffer_sizes, "buffer_bytes", lambda tokens, k, h, i, e, ranks: (tokens << 20, ranks << 18))
    assert main(["buffers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["| model | 8 tokens | 128 tokens | 512 tokens | 8192 tokens |", "|---|---|---|---|---|"]
    assert lines[2] == "| flash | 8.0 + 2.0 | 128 + 2.0 | 512 + 2.0 | 8192 + 2.0 |"
    assert len(lines) == 2 + len(MODELS)


def test_buffers_that_cannot_be_told(monkeypatch, capsys):
    def refuse(*sizes: int) -> None:
        raise mm.errors.MegaMoEError("an old build")

    monkeypatch.setattr(buffer_sizes, "buffer_bytes", refuse)
    assert main(["buffers", "--ranks", "4", "--tokens", "8"]) == 1
    assert capsys.readouterr().err == "an old build\n"

    def unsupported(*sizes: int) -> None:
        raise ValueError("too many tokens")

    monkeypatch.setattr(buffer_sizes, "buffer_bytes", unsupported)
    assert main(["buffers", "--tokens", "8"]) == 0
    assert "| flash | too many tokens |" in capsys.readouterr().out
