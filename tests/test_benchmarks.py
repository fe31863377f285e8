"""The benchmarks run, on a tiny shape, and write what they say; no time is tested."""

import json

import pytest

from experiments import precision
from experiments.benchmarks import long, peer_ours, phases
from experiments.benchmarks import work as work_


def test_phases_write_their_figures(tmp_path):
    found = phases.main(phases.Phases(out=tmp_path, work="tiny", runs=1))
    assert json.loads((tmp_path / "summary.json").read_text()) == found
    for name in (
        "update/share_of_peak",
        "rollout/share_of_bound",
        "compile_s",
        "compile_cached_s",
        "peak_bytes",
        "predicted_peak_bytes",
        "rollout_s",
        "scoring_s",
        "update_s",
        "iteration_s",
        "update_gflop",
    ):
        assert found[name] > 0
    work = work_.WORKS["tiny"]
    # A forward and twice as much backward for each of policy and critic, at least of what the blocks multiply.
    tokens, read = (
        work.prompts * (work.prompt_tokens + work.new_tokens - 1),
        work.prompts * work.new_tokens,
    )
    # The last layer makes keys and values of all positions, and the states that are read.
    rows = 12 * (work.layers - 1) * tokens + 2 * tokens + 10 * read
    assert found["update_gflop"] * 1e9 > work.epochs * 2 * 6 * work.width**2 * rows


def test_our_side_of_the_peers_is_timed():
    settings = {**vars(work_.WORKS["tiny"]), "runs": 2}
    found = peer_ours.main(settings)
    assert len(found["iteration_s"]) == 2 and min(found["rollout_s"]) > 0


def test_a_long_run_is_watched(tmp_path):
    found = long.main(long.Long(out=tmp_path, updates=10))
    assert len(found["resident_bytes/by_fifth"]) == 5 and found["iteration_s/last_fifth"] > 0


def test_more_passes_are_closer_to_float32(tmp_path):
    found = precision.main(precision.Precision(out=tmp_path, texts=2))
    assert 1e-4 < found["default"]["mean"] < 0.1
    assert found["highest"]["mean"] < found["high"]["mean"] < 0.01 * found["default"]["mean"]
    assert found["highest"]["max"] == pytest.approx(0, abs=1e-4)
