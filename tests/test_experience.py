"""What settings put into an update: importance weights, old log-probs, loss terms, entropy."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from helpers import documented_metrics, simple_trainer

from ppo_jax.errors import SettingError
from ppo_jax.ops.clips import ratio_clip
from ppo_jax.ops.metrics import importance_metrics, policy_metrics
from ppo_jax.ops.rewards import running_scale
from ppo_jax.ppo.choices import Advantage, Importance, KLLoss, Loss, OldLogprobs
from ppo_jax.ppo.estimators import gae
from ppo_jax.ppo.experience import finish_experience, token_weights
from ppo_jax.ppo.gradients import minibatch_gradient
from ppo_jax.ppo.loss_terms import loss_terms
from ppo_jax.ppo.scoring import make_experience
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.ppo.task_scores import final_scores
from ppo_jax.types import Counts, Experience, LossMetrics, Rollout, Scores

B, R = 12, 6
RNG = np.random.default_rng(1)
MASK = oracles.ragged_mask(RNG, B, R)
NEW, OLD, REF, X = (0.8 * oracles.normal(RNG, B, R) for _ in range(4))
TOKENS = np.ones((B, R + 2), int)
GROUPS = np.arange(B) // 3
close = np.testing.assert_allclose


def rollout_and_scores():
    rollout = Rollout(TOKENS, TOKENS > 0, jnp.array(MASK), OLD, MASK[:, 0], jnp.array(GROUPS))
    return rollout, Scores(jnp.array(NEW), REF, NEW - REF, abs(X), X)


def weights_by_numpy(name):
    """Return the weights of a method, one response at a time."""
    weights = np.zeros((B, R))
    for i in range(B):
        real = MASK[i]
        w = np.exp((NEW - OLD)[i, real])
        product, mean = np.prod(w), np.prod(w) ** (1 / max(real.sum(), 1))
        weights[i, real] = {
            "tis": np.minimum(w, 2),
            "sequence_tis": np.minimum(product, 2),
            "icepop": w * (w >= 0.5) * (w <= 5),
            "sequence_mask": product * (product <= 3),
            "geometric_mask": w * (0.5 <= mean <= 5),
        }[name]
    return weights


@pytest.mark.parametrize("importance", [x for x in Importance if x is not Importance.NONE])
def test_importance_weights_multiply_the_advantages(importance):
    config = PPOConfig(importance=importance)
    rollout, scores = rollout_and_scores()
    weights = token_weights(config, rollout, scores)
    expected = weights_by_numpy(importance.value)
    close(weights, expected, rtol=1e-4)
    assert (expected[MASK] == 0).any() or importance in (Importance.TIS, Importance.SEQUENCE_TIS)
    make = lambda weights: make_experience(
        rollout, scores, X[:, 0], kl_coef=0.1, advantage_fn=gae(gamma=1.0, lam=0.9), weights=weights
    )[0]
    close(make(weights).advantages, make(None).advantages * expected, rtol=1e-4, atol=1e-5)
    metrics = importance_metrics(weights, MASK)
    real = expected[MASK]
    close(metrics["importance/mean"], real.mean(), rtol=1e-4)
    close(metrics["importance/max"], real.max(), rtol=1e-4)
    size = real.sum() ** 2 / (real**2).sum() / len(real)
    close(metrics["importance/effective_sample_size"], size, rtol=1e-4)


def test_the_bounds_of_importance_weights_can_be_set():
    weights = token_weights(
        PPOConfig(importance=Importance.TIS, importance_range=(0.9, 1.1)), *rollout_and_scores()
    )
    close([weights[MASK].min(), weights[MASK].max()], [0.9, 1.1])


def finished(config, scores=X[:, 0]):
    rollout, scored = rollout_and_scores()
    experience, _ = make_experience(
        rollout, scored, scores, kl_coef=0.0, advantage_fn=gae(gamma=1.0, lam=0.9)
    )
    return finish_experience(config, experience, rollout, jnp.asarray(scores), None)


def test_an_experience_holds_what_functions_need():
    experience, metrics = finished(PPOConfig())
    for found, expected in (
        (experience.logprobs, NEW),
        (experience.ref_logprobs, REF),
        (experience.sampler_logprobs, OLD),
        (experience.groups, GROUPS),
        (experience.scores, X[:, 0]),
    ):
        close(found, expected)
    assert metrics == {}
    close(finished(PPOConfig(old_logprobs=OldLogprobs.SAMPLER))[0].logprobs, OLD)


def test_groups_with_equal_scores_are_counted_and_left_out():
    scores = np.array([1, 1, 1, 0, 1, 0, np.nan, 2, 2, 0, 0, 0.5], np.float32)
    config = PPOConfig(batch_size=12, group_size=3)
    mask = MASK & ~np.isnan(scores)[:, None]
    rollout, scored = rollout_and_scores()
    rollout = rollout.replace(response_mask=jnp.array(mask))
    experience, _ = make_experience(
        rollout, scored, jnp.array(scores), kl_coef=0.0, advantage_fn=gae(gamma=1.0, lam=0.9)
    )
    rows = mask.any(axis=1)
    alike = np.isin(GROUPS, (0, 2)) & rows
    for keep in (False, True):
        config = dataclasses.replace(config, filter_groups=keep)
        made, metrics = finish_experience(config, experience, rollout, jnp.array(scores), None)
        close(metrics["groups/uninformative"], alike.sum() / rows.sum())
        kept = mask & ~(alike & keep)[:, None]
        np.testing.assert_array_equal(made.response_mask, kept)


def test_a_long_response_loses_score():
    rollout, _ = rollout_and_scores()
    config = PPOConfig(max_new_tokens=R, overlong_buffer=4, overlong_penalty=0.5)
    _, final = final_scores(config, running_scale().init(), rollout, jnp.zeros(B))
    length = MASK.sum(axis=1)
    expected = np.where(length > 0, -0.5 * np.clip((length - 2) / 4, 0, 1), np.nan)
    close(final, expected, rtol=1e-6)


def batch_of(scores):
    return Experience(TOKENS, TOKENS > 0, MASK, MASK, OLD, X, X, X, REF, OLD, GROUPS, scores)


@pytest.mark.parametrize("kind", KLLoss)
def test_the_kl_in_the_loss_has_the_gradient_of_its_kind(kind):
    (term,) = loss_terms(PPOConfig(kl_loss_coef=0.3, kl_loss=kind))
    n = float(MASK.sum())
    batch, counts = batch_of(X[:, 0]), Counts(n, n, n, n)
    of = lambda logprobs: term(logprobs, batch, counts)
    (value, metrics), slope = jax.value_and_grad(of, has_aux=True)(jnp.array(NEW))
    d, ratio = NEW - REF, np.exp(NEW - OLD)
    kl = {"k1+": d * ratio, "k2": d**2 / 2 * ratio, "k3": np.exp(-d) - 1 + d}
    kl["k3+"] = kl["k3"] * ratio
    expected = (1 - np.exp(-d)) if kind is KLLoss.K3 else ratio * d
    close(slope, np.where(MASK, 0.3 * expected / n, 0), rtol=1e-4, atol=1e-6)
    close(metrics["loss/kl"], kl[kind.value][MASK].sum() / n, rtol=1e-4)
    close(value, 0.3 * metrics["loss/kl"], rtol=1e-6)


def test_the_likelihood_of_good_responses_does_not_depend_on_micro_batches():
    (term,) = loss_terms(PPOConfig(positive_nll_coef=0.5))
    scores = np.where(np.arange(B) == 5, np.nan, X[:, 0])

    def loss_fn(params, batch, counts):
        value, metrics = term(params * batch.returns, batch, counts)
        return value, LossMetrics(metrics, {})

    good = MASK & (scores > 0)[:, None]
    for micro_batches in (1, 4):
        slope, metrics = minibatch_gradient(
            loss_fn, jnp.float32(2.0), batch_of(scores), micro_batches=micro_batches
        )
        close(slope, -0.5 * X[good].sum() / good.sum(), rtol=1e-4)
        close(metrics.mean["loss/positive_nll"], -2 * X[good].sum() / good.sum(), rtol=1e-4)


def test_the_clipped_share_by_sign_of_the_advantage():
    clip = partial(ratio_clip, clip_low=0.2, clip_high=0.3, dual_clip=2.0)
    found = policy_metrics(NEW, OLD, MASK, clip=clip, advantages=X).mean
    ratio = np.exp(NEW - OLD)[MASK]
    close(found["policy/clipfrac_positive"], ((ratio > 1.3) & (X[MASK] > 0)).mean(), rtol=1e-5)
    close(found["policy/clipfrac_negative"], ((ratio < 0.8) & (X[MASK] < 0)).mean(), rtol=1e-5)
    close(found["policy/clipfrac_dual"], ((ratio > 2) & (X[MASK] < 0)).mean(), rtol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"importance": Importance.TIS, "old_logprobs": OldLogprobs.SAMPLER},
            "importance=tis needs old_logprobs=scored",
        ),
        (
            {"importance": Importance.TIS, "importance_range": (2.0, 0.5)},
            "importance_range must be two numbers",
        ),
        (
            {"importance": Importance.ICEPOP, "loss": Loss.GSPO},
            "importance=icepop weighs tokens, but loss=gspo",
        ),
        ({"filter_groups": True}, "filter_groups compares"),
        ({"overlong_buffer": 25}, "overlong_buffer=25 must be at most max_new_tokens=24"),
        ({"entropy_target": 0.2, "entropy_coef": 0.01}, "entropy_coef=0.01 must be at most 0.005"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(SettingError, match=message):
        PPOConfig(**changes)


@pytest.mark.slow
def test_a_run_with_everything_resumes_to_the_same_bits(tmp_path):
    """Groups, weights, terms of the loss and the adaptive weight of the entropy together."""
    ppo = PPOConfig(
        batch_size=16,
        group_size=4,
        filter_groups=True,
        epochs=1,
        minibatches=2,
        micro_batch=4,
        max_new_tokens=6,
        advantage=Advantage.GRPO,
        whiten_advantages=False,
        importance=Importance.TIS,
        kl_loss_coef=0.1,
        positive_nll_coef=0.1,
        entropy_target=10.0,
        overlong_buffer=2,
        learning_rate=1e-2,
    )
    run = partial(simple_trainer, ppo=ppo, shared=True)
    whole = run(tmp_path / "whole", updates=3).run()
    run(tmp_path / "half", updates=2).run()
    again = run(tmp_path / "half", updates=3, resume="yes").run()
    for x, y in ((again.train.params, whole.train.params), (again.entropy, whole.entropy)):
        jax.tree.map(np.testing.assert_array_equal, x, y)
    lines = (tmp_path / "whole/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines if "policy/ratio" in line]
    assert set(rows[0]) - {"update"} < documented_metrics()
    for name in ("groups/uninformative", "importance/effective_sample_size", "loss/kl"):
        assert name in rows[0]
    weights = [row["objective/entropy_coef"] for row in rows]
    close(weights, [0, 1e-4, 2e-4], rtol=1e-5)  # the step of adaptive_entropy
    with pytest.raises(SettingError, match=r"entropy_target=10.0 has no effect with this loss"):
        run(tmp_path / "own", loss_fn=lambda *args: None)
