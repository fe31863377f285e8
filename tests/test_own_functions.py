"""`ppo_jax.ppo.own_functions`: mistakes in a user's functions are found before a run starts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_problem

from ppo_jax.errors import SettingError
from ppo_jax.ppo.loss import agent_loss_fn
from ppo_jax.ppo.own_functions import check_advantage_fn, check_policy_loss, takes_experience
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.ppo.state import Agent
from ppo_jax.types import Counts

PPO = PPOConfig(batch_size=8, minibatches=2, max_new_tokens=5)


def good(rewards, values, mask, *, rollout, scores):
    assert rollout.tokens.shape == (8, 8) and rollout.groups.shape == (8,)
    return rewards - values, rewards


def one(rewards, values, mask, *, rollout, scores):
    return rewards


def narrow(rewards, values, mask, *, rollout, scores):
    return rewards[:, :1], values


def signature(rewards):
    return rewards, rewards


def mistake(rewards, values, mask, *, rollout, scores):
    return rewards @ values, values


@pytest.mark.parametrize(
    "function, message",
    [
        (one, r"f must return two arrays of \[8, 5\], not one of \[8, 5\]\."),
        (narrow, r"f must return two arrays of \[8, 5\], not \[8, 1\] and \[8, 5\]\."),
        (lambda *args, **named: None, r"f must return two arrays of \[8, 5\], not one of None\."),
        (
            signature,
            r"f is called as advantage\(rewards, .* fails: TypeError: signature",
        ),
        (mistake, r"f is called as .*, which fails: TypeError: .*dot_general"),
    ],
)
def test_an_advantage_estimator_with_a_mistake_is_refused(function, message):
    check = functools.partial(check_advantage_fn, config=PPO, prompt_tokens=3, name="f")
    check(good)
    with pytest.raises(SettingError, match=message):
        check(function)


def reinforce(logprobs, old_logprobs, advantages, mask, *, aggregate):
    return -aggregate(logprobs * advantages, mask)


def unreduced(logprobs, old_logprobs, advantages, mask, *, aggregate):
    return logprobs * advantages


def to_reference(logprobs, old_logprobs, advantages, mask, *, aggregate, experience, weight=0.1):
    distance = (logprobs - experience.ref_logprobs) ** 2
    return -aggregate(logprobs * advantages - weight * distance, mask)


@pytest.mark.parametrize(
    "function, message",
    [
        (unreduced, r"f must return one number, as aggregate\(terms, mask\) does, not \[4, 5\]\."),
        (lambda x: x, r"f is called as loss\(logprobs, .* fails: TypeError"),
        (lambda *arrays, aggregate: None, "f must return one number, .*, not None"),
    ],
)
def test_a_loss_with_a_mistake_is_refused(function, message):
    for right in (reinforce, to_reference, functools.partial(to_reference, weight=1.0)):
        check_policy_loss(right, PPO, name="f")
    with pytest.raises(SettingError, match=message):
        check_policy_loss(function, PPO, name="f")


def test_a_loss_may_have_the_experience():
    assert takes_experience(functools.partial(to_reference, weight=1.0))
    assert not takes_experience(reinforce)
    model, critic, params, batch = small_problem()
    batch = batch.replace(ref_logprobs=batch.logprobs - 0.5)
    agent = Agent(model, critic, PPO, (0,), 0)
    counts = Counts(*[jnp.float32(batch.response_mask.sum())] * 2, batch.value_mask.sum())

    def value(policy_loss):
        return jax.jit(agent_loss_fn(agent, policy_loss=policy_loss))(params, batch, counts)[0]

    def by_hand(logprobs, old_logprobs, advantages, mask, *, aggregate):
        distance = (logprobs - (old_logprobs - 0.5)) ** 2
        return -aggregate(logprobs * advantages - 2.0 * distance, mask)

    np.testing.assert_allclose(
        value(functools.partial(to_reference, weight=2.0)), value(by_hand), rtol=1e-5
    )
    assert value(reinforce) != value(by_hand)
