"""Test the stages of an iteration on data at the edge: NaN, padding, positions, and 64-bit mode."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import full_trainer, generate, init_params, init_scorer, tiny_config

from ppo_jax.errors import SettingError
from ppo_jax.models.heads import separate_critic
from ppo_jax.models.transformer import language_model
from ppo_jax.ops.score_rules import ScoreAt
from ppo_jax.ppo import iteration
from ppo_jax.ppo.choices import Advantage
from ppo_jax.ppo.critic import no_critic
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.ppo.state import Agent, init_state

compiled = partial(jax.jit, static_argnames="agent")
sample, score, learn = (compiled(f) for f in (iteration.sample, iteration.score, iteration.learn))
close = np.testing.assert_allclose
CONFIG = tiny_config(init_std=0.3, layers=1)
MODEL, CRITIC = language_model(CONFIG), separate_critic(CONFIG)
PROMPTS = jnp.array([[7, 7, 3, 4], [7, 5, 6, 2], [1, 2, 3, 4], [7, 7, 7, 9]] * 2)
MASK = PROMPTS != 7


def problem(pad_id=0, stop_ids=(0, 1, 2), **settings):
    """Return an agent, its first state, a rollout and the scores of it."""
    settings = {"batch_size": 8, "minibatches": 2, "epochs": 2, "max_new_tokens": 6, **settings}
    config = PPOConfig(learning_rate=1e-2, **settings)
    agent = Agent(MODEL, CRITIC, config, stop_ids, pad_id)
    policy = init_params(CONFIG, jax.random.key(0))
    params = {"policy": policy, "critic": init_scorer(CONFIG, jax.random.key(1))}
    state = init_state(agent, params, jax.random.key(2), updates=3)
    prompts = jnp.where(MASK, PROMPTS, pad_id)
    rollout = sample(agent, state, prompts, MASK)
    return agent, state, rollout, score(agent, state, policy, rollout)


def step(agent, state, rollout, scores, task_scores=None):
    task_scores = jnp.arange(8.0) if task_scores is None else task_scores
    return learn(agent, state, rollout, scores, task_scores)


@pytest.mark.slow
def test_without_a_critic_the_loss_has_no_value_term():
    """Its values of 0 differ from the returns, and would count with the weight `vf_coef`."""
    settings = {"vf_coef": 0.5, "advantage": Advantage.MONTE_CARLO, "epochs": 1}
    agent, state, rollout, scores = problem(**settings)
    metrics = step(agent._replace(critic=no_critic), state, rollout, scores)[1]
    np.testing.assert_allclose(metrics["loss/total"], metrics["loss/policy"], atol=1e-6)


@pytest.mark.slow
def test_a_nan_does_not_spoil_the_state():
    """An update with a NaN is skipped, and the next one learns as if it had not been."""
    agent, state, rollout, scores = problem(kl_target=6.0)
    bad = scores.replace(ref_logprobs=scores.ref_logprobs.at[0, 0].set(jnp.nan))
    bad = bad.replace(kl=bad.logprobs - bad.ref_logprobs)
    skipped, metrics = step(agent, state, rollout, bad)
    assert metrics["optimizer/skipped"] == 4
    assert skipped.kl.coef == state.kl.coef
    _, metrics = step(agent, skipped, rollout, scores)
    assert metrics["optimizer/steps"] == 4


@pytest.mark.slow
def test_the_controller_counts_the_rows_that_it_got():
    """A caller may pass fewer rows than `batch_size`."""
    agent, state, rollout, scores = problem(kl_target=6.0)
    half = jax.tree.map(lambda x: x[:4], (rollout, scores))
    for count, arrays in ((8, (rollout, scores)), (4, half)):
        after, metrics = step(agent, state, *arrays, jnp.arange(float(count)))
        error = np.clip(metrics["objective/kl"] / 6 - 1, -0.2, 0.2)
        np.testing.assert_allclose(after.kl.coef, 0.05 * (1 + error * count / 1e4), rtol=1e-6)


def test_an_adaptive_weight_of_0_is_refused():
    with pytest.raises(SettingError, match="kl_coef must be positive with kl_target"):
        PPOConfig(kl_target=6.0, kl_coef=0.0)


def test_a_loop_may_donate_its_state():
    """The policy that the state starts from stays, for example as the reference."""
    agent, params = problem()[0], {"policy": init_params(CONFIG, jax.random.key(0)), "critic": {}}
    key = jax.random.key(2)
    state = init_state(agent, params, key, updates=3)
    jax.jit(lambda state: state.replace(update=state.update + 1), donate_argnums=0)(state)
    assert state.policy["embedding"].is_deleted()
    assert not params["policy"]["embedding"].is_deleted() and not key.is_deleted()


@pytest.mark.slow
def test_a_row_without_a_token_to_learn_from_changes_nothing():
    """Its score is in no mean, and the other rows learn what they learn without it."""
    agent, state, rollout, scores = problem(minibatches=1, epochs=1, scale_scores=True)
    rest = jax.tree.map(lambda x: x[:-1], (rollout, scores))
    masked = rollout.replace(response_mask=rollout.response_mask.at[-1].set(False))
    expected, without = step(agent, state, *rest, jnp.arange(7.0))
    unscored = jnp.array([*range(7), jnp.nan])
    for arrays in ((masked, scores, jnp.arange(8.0)), (rollout, scores, unscored)):
        after, metrics = step(agent, state, *arrays)
        jax.tree.map(np.testing.assert_array_equal, after.scale, expected.scale)
        assert metrics.pop("response/scored") == 7 / 8
        for name, value in metrics.items():
            close(value, without[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_the_pad_id_is_never_read():
    """Any id may fill the padding, even one beyond the vocabulary and at the step of the score."""
    losses, samples = [], []
    for pad_id in (0, 3, 10**6):
        agent, state, rollout, scores = problem(pad_id, score_at=ScoreAt.LAST_INDEX)
        assert (rollout.tokens[:, 4:] == pad_id).any()
        _, metrics = step(agent, state, rollout, scores)
        losses.append([float(metrics[name]) for name in ("loss/total", "value/mean")])
        samples.append(np.where(rollout.mask, rollout.tokens, 0))
    assert np.isfinite(losses).all()
    for other, sample_ in zip(losses[1:], samples[1:], strict=True):
        np.testing.assert_array_equal(sample_, samples[0])
        np.testing.assert_allclose(other, losses[0], rtol=1e-6)


def test_more_tokens_than_positions_are_refused():
    """A model has no positions beyond its table, and an index beyond it reads the last one."""
    agent, state, _, _ = problem()
    long = agent._replace(config=PPOConfig(batch_size=8, max_new_tokens=14))
    with pytest.raises(ValueError, match=r"max_new_tokens=14 need 17 positions.* the model has 16"):
        sample(long, state, PROMPTS, MASK)
    whole = agent._replace(config=PPOConfig(batch_size=8, max_new_tokens=13, min_new_tokens=13))
    rollout = sample(whole, state, PROMPTS, MASK)  # The last token is never read.
    score(whole, state, state.policy, rollout)
    longer = rollout.replace(
        tokens=jnp.pad(rollout.tokens, ((0, 0), (0, 1))),
        mask=jnp.pad(rollout.mask, ((0, 0), (0, 1))),
    )
    with pytest.raises(ValueError, match="17 tokens does not fit positions=16"):
        score(whole, state, state.policy, longer)


def test_a_policy_without_a_cache_samples_the_same():
    """A model whose `init_cache` returns None reads all tokens again at each step."""
    model, params = MODEL, init_params(CONFIG, jax.random.key(0))
    options = {"max_new_tokens": 6, "stop_ids": (0, 1), "temperature": 0.5}
    without = model._replace(init_cache=lambda rows, slots: None)
    a, b = (
        generate(m, params, jax.random.key(3), PROMPTS, MASK, **options) for m in (model, without)
    )
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_a_policy_that_ignores_last_is_refused():
    model, params = MODEL, init_params(CONFIG, jax.random.key(0))
    ignores = model._replace(hidden=lambda *args, last=None: model.hidden(*args))
    with pytest.raises(AssertionError):
        generate(ignores, params, jax.random.key(3), PROMPTS, MASK, max_new_tokens=2)


@pytest.mark.parametrize("reads_cache", [True, False])
def test_a_policy_that_returns_the_cache_unchanged_is_refused(reads_cache):
    model, params = MODEL, init_params(CONFIG, jax.random.key(0))

    def hidden(params, tokens, mask, cache=None, **options):
        return model.hidden(params, tokens, mask, cache if reads_cache else None, **options)[
            0
        ], cache

    with pytest.raises(ValueError, match="returned the cache that it was given"):
        forgets = model._replace(hidden=hidden)
        generate(forgets, params, jax.random.key(3), PROMPTS, MASK, max_new_tokens=2)


@pytest.mark.slow
def test_an_iteration_in_64_bit_mode():
    """Sampling, scoring and learning give the float32 numbers of 32-bit mode."""
    expected = step(*problem())[1]
    with jax.enable_x64(True):
        metrics = step(*problem())[1]
    for name in ("loss/total", "objective/kl", "objective/entropy", "response/length_mean"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-4, err_msg=name)


@pytest.mark.slow
def test_a_run_in_64_bit_mode(tmp_path):
    """Training, evaluation and checkpoints work, and the parameters stay float32."""
    with jax.enable_x64(True):
        state = full_trainer(tmp_path / "run", updates=2, eval_every=1).run()
    assert {x.dtype.name for x in jax.tree.leaves(state.train.params)} == {"float32"}
    assert {x.dtype.name for x in jax.tree.leaves((state.kl, state.scale))} == {"float32"}
