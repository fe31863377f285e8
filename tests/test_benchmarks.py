"""The benchmarks run on a tiny shape and write the figures they promise; no timing is asserted."""

import dataclasses
import json

import pytest

from experiments import precision
from experiments.benchmarks import long, peer_ours, phases, tpu
from experiments.benchmarks import work as work_
from ppo_jax import load_model
from ppo_jax.plan.compile import TooLarge
from ppo_jax.plan.topology import CHIPS


@pytest.mark.slow
def test_phases_writes_every_figure(tmp_path):
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
    # Policy and critic each take a forward pass and a backward pass of twice its cost. Counting
    # only the matrix products of the blocks gives a lower bound.
    tokens, read = (
        work.prompts * (work.prompt_tokens + work.new_tokens - 1),
        work.prompts * work.new_tokens,
    )
    # The last layer computes keys and values at all positions, and the rest where states are read.
    rows = 12 * (work.layers - 1) * tokens + 2 * tokens + 10 * read
    assert found["update_gflop"] * 1e9 > work.epochs * 2 * 6 * work.width**2 * rows


@pytest.mark.slow
def test_peer_ours_times_every_run():
    settings = {**vars(work_.WORKS["tiny"]), "runs": 2}
    found = peer_ours.main(settings)
    assert len(found["iteration_s"]) == 2 and min(found["rollout_s"]) > 0


@pytest.mark.slow
def test_long_reports_memory_and_time_over_the_run(tmp_path):
    found = long.main(long.Long(out=tmp_path, updates=10))
    assert len(found["resident_bytes/by_fifth"]) == 5 and found["iteration_s/last_fifth"] > 0


@pytest.mark.slow
def test_higher_precision_is_closer_to_float32(tmp_path, monkeypatch):
    """Of the first four layers, which compile faster than all thirty."""

    def first_layers(file):
        policy, tokenizer = load_model(file)
        config = dataclasses.replace(policy.config, layers=4)
        left_out = {f"layer_{i}" for i in range(config.layers, policy.config.layers)}
        params = {name: x for name, x in policy.params.items() if name not in left_out}
        return policy._replace(config=config, params=params), tokenizer

    monkeypatch.setattr(precision, "load_model", first_layers)
    found = precision.main(precision.Precision(out=tmp_path, texts=2))
    assert 1e-4 < found["default"]["mean"] < 0.1
    assert found["highest"]["mean"] < found["high"]["mean"] < 0.01 * found["default"]["mean"]
    assert found["highest"]["max"] == pytest.approx(0, abs=1e-4)


def test_a_program_that_does_not_fit_is_reported(tmp_path, monkeypatch):
    found = {"update": TooLarge("Ran out of memory.")}
    monkeypatch.setattr(tpu, "compile_iteration", lambda *args, **options: found)
    monkeypatch.setattr(tpu, "make_topology", lambda name: [])
    monkeypatch.setattr(tpu, "make_mesh", lambda shape, devices: None)
    case = tpu.run("gpt2-update", tpu.CASES["gpt2-update"], tpu.Options(out=tmp_path))
    assert tpu.shown(case) == {"too_large": "Ran out of memory."}


def test_the_time_of_logits_is_that_of_their_scopes_without_the_product():
    text = """HloModule m
ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %a = f32[8]{0} negate(%p), metadata={op_name="f/vmap(jvp(Decoder.logits))/nd,vd->nv/dot"}, CYCLES
  %b = f32[8]{0} negate(%a), metadata={op_name="f/jvp(logprobs)/exp"}, CYCLES
  %c = f32[8]{0} negate(%b), metadata={op_name="f/transpose(jvp(Decoder.logits))/nd,nv->vd"}, CYCLES
  ROOT %d = f32[8]{0} negate(%c), metadata={op_name="f/mlp"}, CYCLES
}
""".replace("CYCLES", 'backend_config={"estimated_cycles":"1500"}')
    assert tpu.logits_seconds(text, CHIPS["v5e"]) == pytest.approx(2e-6)
