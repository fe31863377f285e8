"""Responses that are sampled some updates before the update that learns from them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FULL_PPO, full_trainer, likes_b

from ppo_jax import data
from ppo_jax.distributed import placement
from ppo_jax.errors import SettingError
from ppo_jax.hashing import digest
from ppo_jax.run.collection import response_texts
from ppo_jax.run.compare import compare
from ppo_jax.run.files import read_lines
from ppo_jax.run.settings import Faults, LoopConfig

BROKEN = 2  # The update whose reward fails.


def fails_once():
    """Return a reward that fails at its call for the update `BROKEN`."""
    calls = iter(range(-1, 99))  # The first call is for the evaluation before the first update.
    return lambda prompts, responses: None if next(calls) == BROKEN else likes_b(prompts, responses)


def learn_by_hand(run, updates, staleness, broken=None):
    """Run the schedule of a staleness by its definition, with all earlier parameters at hand."""
    state = jax.tree.map(jnp.copy, run.state.replace(pending=()))  # `learn` donates it.
    steps, agent = run.collector.steps, run.learner.agent
    frozen, kept, tokens = run.collector.frozen, [], []
    for update in range(updates):
        kept.append(jax.tree.map(jnp.copy, state.train))
        rows = data.batch_rows(len(run.prompts), FULL_PPO.batch_size, update, seed=0)
        prompts = run.prompts.take(rows)
        sampler = state.replace(train=kept[max(update - staleness, 0)])
        rollout = steps.sample(sampler, prompts.tokens, prompts.mask, frozen=frozen)
        scores = steps.score(state, run.collector.ref_params, rollout, frozen=frozen)
        texts = response_texts(agent, run.learner.tokenizer, jax.device_get(rollout))
        tokens.append(np.asarray(rollout.responses)[0][np.asarray(rollout.response_mask)[0]])
        if update == broken:
            state = state.replace(update=state.update + 1)
            continue
        task_scores = np.array(likes_b(prompts.texts, texts), np.float32)
        state, _ = steps.learn(state, rollout, scores, task_scores, None, frozen=frozen)
    return state, tokens


@pytest.mark.parametrize("staleness, broken", [(1, None), (2, BROKEN), (9, None)])
def test_an_update_learns_from_the_policy_of_its_schedule(tmp_path, staleness, broken):
    reward = likes_b if broken is None else fails_once()
    options = {"updates": 5, "save_every": 0, "eval_every": 9, "faults": Faults(reward="skip")}
    run = full_trainer(tmp_path / "run", reward=reward, staleness=staleness, **options)
    expected, tokens = learn_by_hand(run, 5, staleness, broken)
    state = run.run()
    assert digest(state.train) == digest(expected.train)
    assert digest((state.kl, state.scale)) == digest((expected.kl, expected.scale))
    rows = read_lines(tmp_path / "run/metrics.jsonl")
    ages = {row["update"]: row["rollout/age"] for row in rows if "rollout/age" in row}
    assert ages == {u: min(u, staleness) for u in range(5) if u != broken}
    first = {
        row["update"]: row["tokens"] for row in read_lines(tmp_path / "run/samples.jsonl")[::-1]
    }
    assert all(first[u] == tokens[u].tolist() for u in first) and len(first) >= 4
    assert len(state.pending) == staleness


def test_no_staleness_is_the_default(tmp_path):
    plain = full_trainer(tmp_path / "plain", updates=2)
    given = full_trainer(tmp_path / "given", updates=2, staleness=0)
    assert digest(plain.run()) == digest(given.run()) and given.state.pending == ()
    assert compare(plain.out, given.out) == []
    assert not (given.out / "checkpoints/2/pending").exists()
    with pytest.raises(SettingError, match="staleness must not be negative, but is -1"):
        LoopConfig(staleness=-1)


@pytest.mark.slow
def test_replicas_learn_from_the_older_responses_of_one_device(tmp_path):
    ppo = dataclasses.replace(FULL_PPO, micro_batch=None)  # A replica has a single row.
    one, many = (
        full_trainer(tmp_path / name, ppo=ppo, updates=3, staleness=1, pmap=name == "many")
        for name in ("one", "many")
    )
    one.run(), many.run()
    tokens = [read_lines(tmp_path / name / "samples.jsonl") for name in ("one", "many")]
    assert [row["response"] for row in tokens[0]] == [row["response"] for row in tokens[1]]
    params, same = (placement.to_host(run.state.train.params) for run in (one, many))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), params, same)


def test_the_next_responses_are_sampled_while_the_reward_scores(tmp_path):
    events = []

    def reward(prompts, responses):
        events.append("reward")
        return likes_b(prompts, responses)

    run = full_trainer(tmp_path / "run", reward=reward, staleness=1)
    steps = run.collector.steps

    def sample(state, *args, **kwargs):
        events.append(int(state.update))
        return steps.sample(state, *args, **kwargs)

    collector = run.collector._replace(steps=steps._replace(sample=sample))
    run.schedule = run.schedule._replace(collector=collector)
    run.step(), run.step()
    assert events == [0, 1, "reward", 2, "reward"]
