"""Options out of their range, and names that are not known, are refused in one sentence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.ops import (
    advantages,
    baselines,
    clips,
    decoupled,
    dppo,
    group_advantages,
    importance,
    kl,
    likelihood_losses,
    logprobs,
    losses,
    masked,
    options,
    policy_losses,
    rewards,
    sampling,
    scores,
    selection,
    sequence_losses,
    value_losses,
)

X, MASK, GROUPS = jnp.ones((2, 3)), jnp.ones((2, 3), bool), jnp.zeros(2, int)
POLICY = (X, X, X, MASK)
CLIP = {"clip_low": 0.2, "clip_high": 0.2}
RANGE = {"low": 0.5, "high": 2.0}
PROPER = {
    # A function: its arrays, options in their range, and one value out of range for each of them.
    advantages.generalized_advantage_estimation: (
        (X, X, MASK),
        {"gamma": 1.0, "lam": 0.0},
        {"gamma": 1.1, "lam": -0.1},
    ),
    advantages.decoupled_gae: (
        (X, X, MASK),
        {"gamma": 1.0, "lam_policy": 0.5, "lam_value": 1.0},
        {"gamma": -1.0, "lam_policy": 1.5, "lam_value": 2.0},
    ),
    advantages.length_adaptive_lambda: ((MASK,), {"alpha": 0.05}, {"alpha": -1}),
    advantages.discounted_returns: ((X, MASK), {"gamma": 0.0}, {"gamma": 2}),
    baselines.reinforce_plus_plus_advantages: (
        (X, MASK),
        {"gamma": 0.9, "eps": 0.0},
        {"gamma": np.float32(1.5), "eps": -1e-3},
    ),
    baselines.evpo_advantages: (
        (X, X, MASK),
        {"gamma": 0.9, "lam": 0.5},
        {"gamma": 1.5, "lam": 1.5},
    ),
    decoupled.decoupled_policy_loss: (
        (X, X, X, X, MASK),
        {**CLIP, "dual_clip": None, "weight_max": 2.0},
        {"clip_low": 1.5, "clip_high": -0.1, "dual_clip": 0.5, "weight_max": 0.0},
    ),
    dppo.dppo_loss: (
        POLICY,
        {"clip_low": 1.5, "clip_high": 0.0, "ratio_max": None},
        {"clip_low": -0.1, "clip_high": -0.1, "ratio_max": 0},
    ),
    group_advantages.grpo_advantages: ((X, MASK, GROUPS), {"eps": 0.0}, {"eps": -1e-6}),
    importance.truncated_weights: ((X, X, MASK), RANGE, {"high": 0.1, "low": -1.0}),
    importance.importance_mask: ((X, X, MASK), RANGE, {"high": 0.1, "low": 3.0}),
    importance.bounded_weights: ((X, X, MASK), RANGE, {"high": 0.1, "low": 3.0}),
    importance.sequence_masked_weights: ((X, X, MASK), RANGE, {"high": 0.1, "low": 3.0}),
    kl.kl_full: ((X, X), {"temperature": 0.5}, {"temperature": 0.0}),
    kl.fixed_kl: ((), {"coef": 0.0}, {"coef": -0.1}),
    likelihood_losses.dro_loss: (POLICY, {"beta": 0.1}, {"beta": 0.0}),
    logprobs.token_logprobs: ((X, GROUPS), {"temperature": 0.5}, {"temperature": 0.0}),
    logprobs.entropy: ((X,), {"temperature": 0.5}, {"temperature": -1.0}),
    logprobs.chunked_logprobs_and_entropy: (
        (lambda x: x, jnp.ones((1, 2, 3)), jnp.zeros((1, 2), int)),
        {"temperature": 0.5},
        {"temperature": 0.0},
    ),
    losses.clipped_policy_loss: (
        POLICY,
        {"clip_low": 1.0, "clip_high": 4.0, "dual_clip": 3.0},
        {"clip_low": -0.1, "clip_high": float("nan"), "dual_clip": 0.5},
    ),
    masked.masked_whiten: ((X, MASK), {"eps": 0.0}, {"eps": -1.0}),
    clips.ratio_clip: (
        (X, X, MASK),
        {"clip_low": 1.0, "clip_high": 0.0, "dual_clip": 3.0},
        {"clip_low": 1.5, "clip_high": -0.1, "dual_clip": 1.0},
    ),
    policy_losses.cispo_loss: (
        POLICY,
        {"clip_low": 1.5, "clip_high": 4.0},
        {"clip_low": -0.1, "clip_high": -0.1},
    ),
    policy_losses.dis_loss: (POLICY, CLIP, {"clip_low": -0.1, "clip_high": -0.1}),
    policy_losses.sapo_loss: (
        POLICY,
        {"tau_positive": 1.0, "tau_negative": 2.0},
        {"tau_positive": 0, "tau_negative": -1.0},
    ),
    rewards.running_scale: ((), {"eps": 0.0}, {"eps": -1.0}),
    rewards.apply_missing_eos: (
        (X[:, 0], MASK[:, 0]),
        {"penalty": 0.0, "rule": "penalize"},
        {"penalty": -1.0, "rule": "drop"},
    ),
    rewards.token_rewards: (
        (X[:, 0], X, MASK),
        {"kl_coef": 0.0, "score_at": "last_index"},
        {"kl_coef": -0.1, "score_at": "first_token"},
    ),
    rewards.score_index: ((MASK,), {"score_at": "last_index"}, {"score_at": None}),
    sampling.process_logits: ((X,), {"temperature": 0.5}, {"temperature": 0.0}),
    scores.overlong_penalty: (
        (MASK,),
        {"max_length": 3, "buffer": 2, "weight": 0.0},
        {"weight": -1.0, "buffer": 0},
    ),
    selection.m2po_mask: ((X, X, MASK), {"threshold": 0.0}, {"threshold": -0.1}),
    selection.clip_cov_mask: (
        (jax.random.key(0), *POLICY),
        {**CLIP, "part": 1.0},
        {"clip_low": 1.5, "clip_high": -1.0, "part": 1.5},
    ),
    selection.kl_cov_loss: (POLICY, {"part": 0.0, "coef": 0.0}, {"part": -0.1, "coef": -1.0}),
    sequence_losses.gspo_loss: (POLICY, CLIP, {"clip_low": 1.5, "clip_high": -1.0}),
    sequence_losses.gmpo_loss: (
        POLICY,
        {"clip_low": 1.5, "clip_high": 1.5},
        {"clip_low": -0.1, "clip_high": -0.1},
    ),
    sequence_losses.vespo_loss: (
        POLICY,
        {"lambda_positive": 1.0, "lambda_negative": 1.0},
        {"lambda_positive": 0.0, "lambda_negative": -1.0},
    ),
    value_losses.clipped_value_loss: (POLICY, {"clip": None}, {"clip": 0.0}),
    value_losses.value_clipfrac: (POLICY, {"clip": 0.5}, {"clip": -0.1}),
}


@pytest.mark.parametrize(
    "function, name",
    [(function, name) for function, (_, _, bad) in PROPER.items() for name in bad],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_an_option_out_of_its_range_is_refused(function, name):
    arrays, good, bad = PROPER[function]
    function(*arrays, **good)
    with pytest.raises(ValueError, match=rf"\b{name}\b.*\.$"):
        function(*arrays, **good | {name: bad[name]})


def test_traced_options_and_arrays_are_not_checked():
    loss = lambda low, tau: (
        losses.clipped_policy_loss(*POLICY, clip_low=low, clip_high=low)
        + policy_losses.sapo_loss(*POLICY, tau_positive=tau)
    )
    assert np.isfinite(jax.jit(loss)(0.2, 1.0))
    assert np.isfinite(jax.grad(loss, 1)(jnp.float32(0.2), 1.0))
    options.check_positive(array=jnp.float32(-1), missing=None)


def test_a_choice_is_given_by_itself_or_by_its_name():
    kind = rewards.ScoreAt
    assert options.choose(kind, "last_token", "score_at") is kind.LAST_TOKEN
    assert options.choose(kind, kind.LAST_INDEX, "score_at") is kind.LAST_INDEX
    message = "score_at must be one of last_token, after_last_token, last_index, but is 'first'"
    with pytest.raises(ValueError, match=message):
        options.choose(kind, "first", "score_at")
