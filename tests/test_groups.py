"""Groups of responses to the same prompt: in a batch, on devices, in estimators and in a run."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from helpers import DEVICES, SIMPLE_PPO, on_devices, simple_trainer

from ppo_jax import data
from ppo_jax.distributed.meshes import check_rows
from ppo_jax.errors import SettingError
from ppo_jax.ppo.choices import Advantage
from ppo_jax.ppo.groups import check_groups
from ppo_jax.ppo.scoring import make_experience
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.types import Rollout, Scores

B, R, SIZE = 32, 5, 4
close = np.testing.assert_allclose


def test_a_batch_repeats_the_prompts_of_a_smaller_one():
    for update in range(5):
        rows = data.batch_rows(7, 12, update, seed=3, group_size=4)
        np.testing.assert_array_equal(
            rows.reshape(3, 4)[:, 0], data.batch_rows(7, 3, update, seed=3)
        )
        assert (rows.reshape(3, 4) == rows.reshape(3, 4)[:, :1]).all()


def batch():
    """Return rewards `[B, R]`, values, a mask and groups; one row is empty, one group all equal."""
    rng = np.random.default_rng(0)
    mask = oracles.ragged_mask(rng, B, R)
    rewards, values = oracles.normal(rng, B, R), oracles.normal(rng, B, R)
    mask[5] = False
    mask[8:12], rewards[8:12] = True, 0.5
    return rewards, values, mask, np.arange(B) // SIZE


def advantages_of(config, rewards, values, mask, groups, axis_name=None):
    x = jnp.zeros(rewards.shape)
    tokens = jnp.ones((len(x), R + 1), int)
    made = make_experience(
        Rollout(tokens, tokens > 0, mask, x, mask[:, 0], groups),
        Scores(x, x, x, x, values),
        jnp.zeros(len(x)),
        kl_coef=0.0,
        advantage_fn=config.advantage.function(config, axis_name),
        token_scores=rewards,
        whiten_advantages=False,
        axis_name=axis_name,
    )[0]
    return made.advantages, made.returns


def config_of(advantage, **changes):
    size = SIZE if advantage.reads_groups else 1
    gamma = 0.9 if "gamma" in advantage.reads else 1.0
    return PPOConfig(advantage=advantage, group_size=size, batch_size=B, gamma=gamma, **changes)


@pytest.mark.parametrize("advantage", Advantage)
def test_devices_change_no_advantage(advantage):
    """Every estimator gives on 8 devices what it gives on one."""
    of = lambda *arrays, axis_name=None: advantages_of(
        config_of(advantage), *arrays, axis_name=axis_name
    )
    for found, expected in zip(
        on_devices("vmap", lambda *arrays: of(*arrays, axis_name="devices"), *batch()),
        of(*batch()),
        strict=True,
    ):
        close(found.reshape(B, R), expected, rtol=1e-5, atol=1e-6)


def test_group_estimators_leave_out_responses_without_a_score():
    rewards, values, mask, groups = batch()
    scores = np.where(mask, rewards, 0).sum(axis=1)
    expected = {x: np.zeros(B) for x in ("grpo", "dr_grpo", "rloo")}
    for rows in np.split(np.arange(B), B // SIZE):
        real = [i for i in rows if mask[i].any()]
        assert len(real) == (3 if 5 in rows else 4)
        for i in real:
            others = np.mean([scores[j] for j in real if j != i])
            expected["dr_grpo"][i] = scores[i] - scores[real].mean()
            expected["grpo"][i] = expected["dr_grpo"][i] / (scores[real].std(ddof=1) + 1e-6)
            expected["rloo"][i] = scores[i] - others
    for name, response in expected.items():
        config = config_of(Advantage(name))
        found = advantages_of(config, rewards, values, mask, groups)[0]
        close(found, np.where(mask, response[:, None], 0), rtol=1e-4, atol=1e-5)


def test_groups_that_cannot_be_compared_are_refused():
    for advantage in Advantage:
        assert not (advantage.reads_values and advantage.reads_groups)
        if advantage.reads_groups:
            with pytest.raises(
                SettingError, match=f"advantage={advantage.value} compares.*at least 2"
            ):
                PPOConfig(advantage=advantage)
    with pytest.raises(SettingError, match="group_size=3 must divide batch_size=64"):
        PPOConfig(group_size=3)
    whole = PPOConfig(batch_size=16, group_size=4, minibatches=1)
    check_rows(whole, 4)
    with pytest.raises(SettingError, match=r"group_size=4 must divide.*which is 2"):
        check_rows(whole, DEVICES)
    with pytest.raises(SettingError, match="which is 6"):
        check_groups(whole, 6)


@pytest.mark.slow
def test_a_run_compares_responses_to_the_same_prompt(tmp_path):
    """It takes each prompt `group_size` times, and once in an evaluation."""
    ppo = dataclasses.replace(
        SIMPLE_PPO, advantage=Advantage.GRPO, group_size=4, whiten_advantages=False, rollout_rows=8
    )
    run = simple_trainer(tmp_path / "run", ppo=ppo, updates=2, samples=32, eval_every=1)
    run.run()
    rows = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    first = [row for row in rows if row["update"] == 0]
    prompts = np.array([row["prompt"] for row in first]).reshape(8, 4)
    assert (prompts == prompts[:, :1]).all()
    assert len({tuple(row["tokens"]) for row in first}) > 8
    collected = run.collector.collect(run.state, run.prompts.take(np.arange(32) % 4))
    np.testing.assert_array_equal(collected.host_rollout.groups, np.arange(32) // 4)
    assert len(run.evaluate(run.prompts)[1]) == len(run.prompts) == 4
