"""A critic with an optimizer of its own: what it learns, and what it leaves alone."""

import dataclasses
import functools
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax.traverse_util import flatten_dict
from helpers import (
    FULL_PPO,
    command_line,
    full_trainer,
    has_zero_gradient,
    init_params,
    init_scorer,
    tiny_config,
    tiny_policy,
)
from helpers import word_tokenizer as tokenizer

from ppo_jax import cli
from ppo_jax.distributed import meshes, placement
from ppo_jax.errors import GradientError, SettingError
from ppo_jax.hashing import digest
from ppo_jax.models.heads import separate_critic, shared_critic, zero_head
from ppo_jax.models.io.pretrained import load_policy, save_policy
from ppo_jax.models.transformer import language_model
from ppo_jax.ops.value_losses import value_clipfrac
from ppo_jax.ppo import iteration
from ppo_jax.ppo.choices import Advantage
from ppo_jax.ppo.critic import no_critic
from ppo_jax.ppo.critic_settings import CriticConfig, choose_critic
from ppo_jax.ppo.experience import prepare
from ppo_jax.ppo.presets import PRESETS
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.ppo.state import Agent, PPOState, init_state
from ppo_jax.run.assembly import assemble
from ppo_jax.run.differences import setting_differences
from ppo_jax.run.faults import check_steps
from ppo_jax.run.files import read_lines
from ppo_jax.run.logging import measured
from ppo_jax.run.report import make_report
from ppo_jax.types import Metrics

compiled = partial(jax.jit, static_argnames="agent")
sample, score, learn = (compiled(f) for f in (iteration.sample, iteration.score, iteration.learn))
MODEL_CONFIG = tiny_config(init_std=0.3, layers=1)
OWN = CriticConfig(learning_rate=1e-2, max_grad_norm=None)
PLAIN = {
    "batch_size": 8,
    "minibatches": 1,
    "epochs": 2,
    "max_new_tokens": 6,
    "learning_rate": 1e-2,
    "vf_coef": 1.0,
    "max_grad_norm": None,
}
PROMPTS = np.array([[7, 3, 4], [5, 6, 2]] * 4)


@functools.cache
def initial_policy():
    return init_params(MODEL_CONFIG, jax.random.key(0))


@jax.jit
def task_scores(rollout):
    return (rollout.responses == 5).sum(axis=1).astype(jnp.float32)


class Learned(NamedTuple):
    """The states before, between and after three updates, and the metrics of each update."""

    states: list[PPOState]
    metrics: list[Metrics]


def agent_of(shared, **settings):
    critic = shared_critic() if shared else separate_critic(MODEL_CONFIG)
    return Agent(language_model(MODEL_CONFIG), critic, PPOConfig(**(PLAIN | settings)), (0, 1), 0)


def three_updates(*, shared=False, **settings):
    """Make three updates; tests with equal settings share them."""
    return learned(agent_of(shared, **settings), shared)


@functools.cache
def learned(agent, shared):
    head = init_scorer(MODEL_CONFIG, jax.random.key(1))
    params = {"policy": initial_policy(), "critic": {"head": zero_head(16)} if shared else head}
    found = Learned([init_state(agent, params, jax.random.key(2), updates=3)], [])
    for _ in range(3):
        state = found.states[-1]
        rollout = sample(agent, state, PROMPTS, PROMPTS > 0)
        scores = score(agent, state, initial_policy(), rollout)
        state, metrics = learn(agent, state, rollout, scores, task_scores(rollout))
        found.states.append(state)
        found.metrics.append(metrics)
    return found


def assert_close(x, y):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(x), jax.tree.leaves(y), strict=True
    ):
        if not has_zero_gradient(path):
            np.testing.assert_allclose(a, b, atol=2e-5, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
def test_it_learns_what_it_learns_together_with_the_policy():
    """Adam moves each parameter by itself, so apart from shuffles both ways are the same."""
    together, apart = three_updates(epochs=1), three_updates(epochs=1, critic=OWN)
    assert_close(apart.states[2].params, together.states[2].params)
    joint, own = together.metrics[0], apart.metrics[0]
    np.testing.assert_allclose(own["loss/value"], joint["loss/value"], rtol=1e-5)
    np.testing.assert_allclose(own["loss/policy"], joint["loss/policy"], atol=1e-6)
    both = np.hypot(own["critic/grad_norm"], own["optimizer/grad_norm"])
    np.testing.assert_allclose(both, joint["optimizer/grad_norm"], rtol=1e-5)
    assert own["critic/steps"] == own["optimizer/steps"] == 1
    assert own["policy/first_ratio_error_max"] < 2e-6


@pytest.mark.slow
def test_the_policy_waits_for_the_critic_to_warm_up():
    critic = dataclasses.replace(OWN, warmup_updates=2)
    states, found = three_updates(critic=critic, warmup_steps=8)
    assert digest(states[2].train) == digest(states[0].train)
    assert digest(states[3].train) != digest(states[0].train)
    assert [float(x["optimizer/steps"]) for x in found] == [0, 0, 2]
    assert [float(x["critic/steps"]) for x in found] == [2, 2, 2]
    assert all(x["optimizer/finite"] == 1 for x in found)
    for x, waits in zip(found, (True, True, False), strict=True):
        for name in ("policy/ratio", "policy/entropy", "loss/policy", "optimizer/grad_norm"):
            assert np.isnan(x[name]) == waits, name
        assert np.isfinite([x["loss/value"], x["value/clipfrac"], x["critic/grad_norm"]]).all()
    for x in found:
        assert x["value/explained_variance_after"] > x["value/explained_variance"]
    # The policy then learns as in a first update, with its own warm-up of the learning rate.
    alone = three_updates(critic=OWN, warmup_steps=8).states[1]
    moved = [
        np.abs(a["embedding"] - b.policy["embedding"]).max()
        for a, b in ((states[3].policy, states[0]), (alone.policy, states[0]))
    ]
    np.testing.assert_allclose(moved[0], moved[1], rtol=0.3)


@pytest.mark.slow
def test_a_critic_makes_more_passes_and_decays_by_itself():
    critic = dataclasses.replace(OWN, epochs=5, decay_learning_rate=True, weight_decay=0.1)
    states, found = three_updates(critic=critic)
    assert [float(x["critic/steps"]) for x in found] == [5, 5, 5]
    assert [float(x["optimizer/steps"]) for x in found] == [2, 2, 2]
    assert int(states[2].critic.step) == 10 and int(states[2].train.step) == 4
    constant = three_updates(critic=dataclasses.replace(critic, decay_learning_rate=False)).states
    assert digest(constant[1].critic.params) == digest(states[1].critic.params)


@pytest.mark.slow
def test_attention_layers_of_the_critic_can_be_frozen():
    """With the settings of SAO, weight decay moves no parameter of attention either."""
    critic = dataclasses.replace(PRESETS["sao"].critic, learning_rate=1e-2, weight_decay=0.1)
    sao = vars(PRESETS["sao"]) | PLAIN | {"epochs": 1, "critic": critic, "vf_coef": 0.1}
    states, (metrics, *_) = three_updates(**sao)
    before, after = (flatten_dict(s.params["critic"], sep="/") for s in (states[0], states[2]))
    for name in before:
        same = np.array_equal(before[name], after[name])
        assert same == ("/attn/" in name), name
    assert digest(states[2].policy) != digest(states[0].policy)
    assert metrics["critic/steps"] == 2 and metrics["optimizer/steps"] == 1


def test_a_head_on_the_trunk_of_the_policy_leaves_the_trunk_alone():
    critic = CriticConfig(learning_rate=0.1, epochs=20, warmup_updates=1)
    states, (metrics, *_) = three_updates(shared=True, critic=critic, value_clip=None)
    assert digest(states[1].policy) == digest(states[0].policy)
    assert metrics["value/explained_variance_after"] > 0.1


# With a range this narrow, all values that have moved are clipped.
NARROW = {"value_clip": 1e-6}


@pytest.mark.parametrize("shared", [False, True])
def test_a_joint_update_says_what_the_values_of_its_last_epoch_explain(shared):
    """With one minibatch, the values of the second epoch are those after the first."""
    states, (first, *_) = three_updates(shared=shared, epochs=1, **NARROW)
    both = three_updates(shared=shared, epochs=2, **NARROW).metrics[0]
    name = "value/explained_variance"
    np.testing.assert_allclose(first[f"{name}_last_epoch"], first[name], atol=1e-4)
    agent = agent_of(shared, epochs=1, **NARROW)
    rollout = sample(agent, states[0], PROMPTS, PROMPTS > 0)
    estimate = agent.config.advantage.function(agent.config, None)
    scores = score(agent, states[0], initial_policy(), rollout)
    made = prepare(
        agent.config,
        states[0],
        rollout,
        scores,
        task_scores(rollout),
        None,
        advantage_fn=estimate,
        axis_name=None,
    ).experience
    values = score(agent, states[1], initial_policy(), rollout).values
    returns, mask = np.asarray(made.returns), np.asarray(made.value_mask)
    left = np.var((returns - values)[mask]) / np.var(returns[mask])
    np.testing.assert_allclose(both[f"{name}_last_epoch"], 1 - left, atol=1e-4)


def test_a_joint_update_counts_the_clipped_values():
    """The first minibatch has the old values; after it, a narrow range clips nearly all steps."""
    assert three_updates(epochs=1, **NARROW).metrics[0]["value/clipfrac"] == 0
    metrics = three_updates(epochs=2, **NARROW).metrics[0]
    assert 0.2 < metrics["value/clipfrac"] <= 0.5
    assert "value/clipfrac" not in three_updates(epochs=1, vf_coef=0.0).metrics[0]


def test_an_early_stop_leaves_the_values_of_the_steps_that_were_computed():
    metrics = three_updates(epochs=4, target_kl=1e-6, **NARROW).metrics[0]
    assert metrics["optimizer/stopped"] == 1 and metrics["optimizer/steps"] == 1
    both = three_updates(epochs=2, **NARROW).metrics[0]
    name = "value/explained_variance_last_epoch"
    np.testing.assert_allclose(metrics[name], both[name], atol=1e-4)


def test_the_clipped_share_of_values():
    rng = np.random.default_rng(0)
    values, old, returns = rng.normal(size=(3, 4, 5)).astype(np.float32)
    mask = rng.random((4, 5)) < 0.7
    clipped = np.clip(values, old - 0.3, old + 0.3)
    want = (((clipped - returns) ** 2 > (values - returns) ** 2) & mask).sum() / mask.sum()
    np.testing.assert_allclose(value_clipfrac(values, old, returns, mask, clip=0.3), want)
    assert value_clipfrac(values, old, returns, mask, clip=None) == 0
    # Values that have moved less are not clipped, whatever their rounding.
    assert value_clipfrac(values, old, returns, mask, clip=np.abs(values - old).max() + 0.1) == 0


RUN = dataclasses.replace(
    FULL_PPO,
    critic=CriticConfig(learning_rate=0.1, epochs=3, warmup_updates=1),
)


@pytest.mark.slow
def test_a_resumed_run_and_a_mesh_change_nothing(tmp_path):
    whole = full_trainer(tmp_path / "whole", ppo=RUN).run()
    part = placement.to_host(full_trainer(tmp_path / "part", ppo=RUN, updates=2).run())
    resumed = full_trainer(tmp_path / "part", ppo=RUN, resume="yes").run()
    assert digest(resumed) == digest(whole)
    assert int(whole.critic.step) == 4 * 6
    on = full_trainer(
        tmp_path / "mesh", ppo=RUN, mesh=meshes.make_mesh({"data": 2, "fsdp": 2}), updates=2
    )
    assert_close(placement.to_host(on.run().params), part.params)


def test_an_update_of_the_warm_up_logs_what_it_measures(tmp_path, capfd):
    """One program serves both kinds of updates; files, report and callbacks hold no zeros."""
    seen, programs = [], []
    run = full_trainer(tmp_path / "run", ppo=RUN, updates=2, eval_every=0, progress=True)

    def note(row):
        seen.append(row)
        programs.append(run.collector.steps.learn._cache_size())

    run.run(note)
    rows = [row for row in read_lines(tmp_path / "run/metrics.jsonl") if "loss/value" in row]
    of_policy = {"loss/total", "loss/policy", "optimizer/grad_norm"}
    for row in (rows[0], seen[0]):
        assert not of_policy & row.keys() and not any(x.startswith("policy/") for x in row)
        assert row["optimizer/steps"] == 0 and row["critic/steps"] == 6
    for row in (rows[1], seen[1]):
        assert of_policy | {"policy/ratio", "policy/clipfrac"} <= row.keys()
    assert rows[0].keys() < rows[1].keys() and None not in rows[0].values()
    assert programs[0] == programs[1]
    assert "nan" not in capfd.readouterr().err.lower()
    assert "Share of clipped tokens" in make_report([tmp_path / "run"])


def test_a_fault_of_the_critic_is_found_during_its_warm_up():
    row = {"loss/total": np.nan, "critic/grad_norm": np.nan, "loss/value": np.nan}
    kept = measured(row, waits=True)
    assert kept.keys() == {"critic/grad_norm", "loss/value"}
    with pytest.raises(GradientError):
        check_steps(kept | {"optimizer/finite": 1.0, "optimizer/skipped": 0.0})
    assert measured(row, waits=False).keys() == row.keys()


def test_a_run_whose_critic_decays_is_not_made_longer():
    old, new = (
        {"ppo": {"critic": {"decay_learning_rate": True}}, "loop": {"updates": n}} for n in (2, 4)
    )
    assert list(setting_differences(old, new)) == [("loop.updates", 2, 4)]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"epochs": 2}, "critic.epochs=2 is for a critic with its own optimizer; set critic.learn"),
        ({"learning_rate": 0.0}, "critic.learning_rate must be positive, or none, but is 0.0."),
        ({"learning_rate": 1.0, "warmup_steps": -1}, "critic.warmup_steps must not be negative"),
        ({"learning_rate": float("nan")}, "critic.learning_rate must be a finite number"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        CriticConfig(**settings)


@pytest.mark.slow
def test_a_critic_is_trained_before_ppo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_policy(tmp_path / "gpt2", tiny_policy(layers=1), tokenizer())
    Path("prompts.txt").write_text("a b\nc\nd e\nb b\n")
    Path("likes_b.py").write_text(
        "def score(prompts, responses):\n    return [float(x.count('b')) for x in responses]\n"
    )
    given = {
        "model": "gpt2",
        "prompts": "prompts.txt",
        "reward": "likes_b.py:score",
        "ppo.batch-size": 8,
        "ppo.minibatches": 1,
        "ppo.max-new-tokens": 4,
        "ppo.learning-rate": 0.01,
    }
    cli.main(command_line("value", out="value", **{"loop.updates": 3}, **given))
    before, after = (load_policy(folder).params for folder in ("gpt2", "value/model"))
    assert digest(after) == digest(before)
    rows = read_lines(Path("value/metrics.jsonl"))
    assert all(row["optimizer/steps"] == 0 and row["critic/steps"] == 4 for row in rows)
    assert rows[2]["loss/value"] < rows[0]["loss/value"]
    assert not any(name.startswith("policy/") for row in rows for name in row)
    cli.main(
        command_line("train", out="ppo", critic="value/critic", **{"loop.updates": 1}, **given)
    )
    first = read_lines(Path("ppo/metrics.jsonl"))[0]
    assert first["value/explained_variance"] > rows[0]["value/explained_variance"]
    peer = transformers.AutoModelForSequenceClassification.from_pretrained("ppo/critic")
    assert peer.config.num_labels == 1
    for critic in ("shared", "none"):
        with pytest.raises(SystemExit):
            cli.main(command_line("value", out="other", critic=critic, **given))
    assert not Path("other").exists()


GROUPS = {"advantage": Advantage.GRPO, "group_size": 4}


def test_a_method_that_reads_no_values_has_no_critic():
    for settings in ({"advantage": Advantage.MONTE_CARLO}, GROUPS):
        for critic in ("auto", "none"):
            assert choose_critic(critic, PPOConfig(**settings)) == "none"
    learner = assemble(tiny_policy(), tokenizer(), PPOConfig(**GROUPS))
    assert learner.params["critic"] == {} and learner.agent.critic is no_critic
    assert choose_critic("auto", PPOConfig()) == "separate"
    # Whether a function of one's own reads values is not known.
    assert choose_critic("auto", PPOConfig(**GROUPS), own_advantage=True) == "separate"
    own = assemble(tiny_policy(), tokenizer(), PPOConfig(), critic="none", own_advantage=True)
    assert own.params["critic"] == {}


@pytest.mark.parametrize(
    "critic, settings, message",
    [
        (
            "none",
            {},
            "critic=none needs an advantage estimator that reads no values, but advantage",
        ),
        ("shared", GROUPS, "critic=shared needs .* reads values, but advantage=grpo reads none"),
        ("a/folder", GROUPS, "critic=a/folder needs an advantage estimator that reads values"),
        (
            "auto",
            GROUPS | {"critic": OWN},
            "critic.learning_rate=0.01 has no effect with critic",
        ),
        ("auto", GROUPS | {"value_clip": 0.1}, "value_clip=0.1 has no effect with critic=none"),
        (
            "shared",
            {"critic": dataclasses.replace(OWN, freeze_attention=True)},
            "critic.freeze_attention=True has no effect with critic=shared; leave it at False",
        ),
    ],
)
def test_a_critic_that_does_not_go_with_the_settings_is_refused(critic, settings, message):
    with pytest.raises(SettingError, match=message):
        choose_critic(critic, PPOConfig(**settings))


def test_no_value_loss_goes_with_no_critic():
    for config in (PPOConfig(**GROUPS, vf_coef=0.0, value_clip=None), PRESETS["grpo"]):
        assert choose_critic("auto", config) == "none"
