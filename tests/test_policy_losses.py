"""Test the policy losses against numpy, in micro-batches and over devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from helpers import assert_mask_hides, on_devices

from ppo_jax.ops.clips import ratio_clip
from ppo_jax.ops.decoupled import decoupled_policy_loss, interpolated_logprobs
from ppo_jax.ops.dppo import binary_kl, binary_tv, dppo_clip, dppo_loss
from ppo_jax.ops.likelihood_losses import dro_loss, positive_nll_loss
from ppo_jax.ops.losses import clipped_policy_loss
from ppo_jax.ops.masked import masked_mean, sequence_mean
from ppo_jax.ops.metrics import policy_metrics
from ppo_jax.ops.policy_losses import cispo_clip, cispo_loss, dis_clip, dis_loss, sapo_loss
from ppo_jax.ops.sequence_losses import gmpo_clip, gmpo_loss, gspo_clip, gspo_loss, vespo_loss
from ppo_jax.ppo.choices import Loss
from ppo_jax.ppo.settings import PPOConfig

B, R = 16, 6
EMPTY = [3, 9]  # The rows without a real token, and how many there are with one.
RESPONSES = B - len(EMPTY)
close = partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)
WIDE = {"clip_low": 0.15, "clip_high": 0.25}


@pytest.fixture
def batch():
    """Return `logprobs, old_logprobs, advantages, mask` with ratios from about 0.1 to 8.

    Two responses have no real token.
    """
    rng = np.random.default_rng(0)
    mask = oracles.ragged_mask(rng, B, R, holes=True)
    mask[:, 0] = True
    mask[EMPTY] = False
    old = -np.abs(oracles.normal(rng, B, R)) - 0.01
    new = np.minimum(old + oracles.normal(rng, B, R) / 2, -0.01).astype(np.float32)
    return new, old, oracles.normal(rng, B, R), mask


# What each loss computes for one response: `(x, q, A) -> (terms, slopes)` of the log-probs now and
# at sampling and the advantages. The slope is that of the mean over all tokens, times their number.


def weighted(weight):
    """The losses `-sg(w) A log π`."""
    return lambda x, q, a: (-weight(x, q, a) * a * x, -weight(x, q, a) * a)


def dis_weight(x, q, a):
    ratio = np.exp(x - q)
    return np.where((ratio > 0.85) & (ratio < 1.25), ratio, 0)


def dppo(divergence):
    def terms(x, q, a):
        far = divergence(np.exp(x), np.exp(q)) > np.where(a > 0, 0.06, 0.03)
        weight = np.minimum(np.exp(x - q), 3.0) * ~(far & ((x - q) * a > 0))
        return -weight * a, -weight * a

    return terms


def sapo(x, q, a):
    ratio, tau = np.exp(x - q), np.where(a > 0, 1.0, 1.05)
    gate = 1 / (1 + np.exp(-tau * (ratio - 1)))
    return -4 / tau * gate * a, -4 * gate * (1 - gate) * ratio * a


def gspo(x, q, a):
    s = np.exp(np.mean(x - q))
    clipped = (s > 1.25) & (a > 0) | (s < 0.85) & (a < 0)
    return -np.minimum(s * a, np.clip(s, 0.85, 1.25) * a), -np.where(clipped, 0, s * a)


def gmpo(x, q, a):
    change = x - q
    inside = np.where(a > 0, change <= 0.4, change >= -0.4)
    clipped = np.where(inside, change, np.clip(change, -0.4, 0.4))
    term = -np.exp(np.mean(clipped)) * np.mean(a)
    return np.full_like(x, term), term * inside


def vespo_weight(x, q, a):
    w = np.exp(np.sum(x - q))
    k, decay = np.where(a >= 0, 2, 3), np.where(a >= 0, 3, 2)
    return np.exp(decay) * w**k * np.exp(-decay * w)


def dro(x, q, a):
    return -(a * x - 0.15 * (x - q) ** 2), -(a - 0.3 * (x - q))


BINARY_KL = lambda p, q: q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))
CASES = {
    "cispo": (
        partial(cispo_loss, **WIDE),
        weighted(lambda x, q, a: np.exp(x - q).clip(0.85, 1.25)),
    ),
    "dis": (partial(dis_loss, **WIDE), weighted(dis_weight)),
    "sapo": (sapo_loss, sapo),
    "dppo_tv": (
        partial(dppo_loss, clip_low=0.03, clip_high=0.06, ratio_max=3.0),
        dppo(lambda p, q: np.abs(p - q)),
    ),
    "dppo_kl": (
        partial(dppo_loss, clip_low=0.03, clip_high=0.06, ratio_max=3.0, divergence=binary_kl),
        dppo(BINARY_KL),
    ),
    "gspo": (partial(gspo_loss, **WIDE), gspo),
    "gmpo": (gmpo_loss, gmpo),
    "vespo": (vespo_loss, weighted(vespo_weight)),
    "dro": (partial(dro_loss, beta=0.3), dro),
}


@pytest.mark.parametrize("by_sequence", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_equal_the_numpy_oracle(batch, name, by_sequence):
    new, old, advantages, mask = batch
    loss, oracle = CASES[name]
    terms, slopes = np.zeros((B, R)), np.zeros((B, R))
    for b in np.flatnonzero(mask.any(axis=1)):
        at = mask[b]
        x, q, a = (np.float64(z[b, at]) for z in (new, old, advantages))
        terms[b, at], slopes[b, at] = oracle(x, q, a)
    aggregate = sequence_mean if by_sequence else masked_mean
    value, gradient = jax.jit(jax.value_and_grad(partial(loss, aggregate=aggregate)))(*batch)
    lengths = np.maximum(mask.sum(axis=1, keepdims=True), 1)
    weights = mask / lengths / RESPONSES if by_sequence else mask / mask.sum()
    close(value, np.sum(terms * weights))
    if name == "gmpo":  # Each term depends on all tokens of its response.
        slopes = (
            slopes / lengths * np.sum(weights, axis=1, keepdims=True) / np.maximum(weights, 1e-9)
        )
    close(gradient, slopes * weights)


def test_a_proximal_policy(batch):
    """The weight of a token is π_prox / π_old, and the clip is around π_prox."""
    new, old, advantages, mask = batch
    proximal = (new + old) / 2
    run = jax.value_and_grad(partial(decoupled_policy_loss, clip_low=0.2, clip_high=0.3))
    ours = jax.jit(run)(new, old, proximal, advantages, mask)
    weighted_advantages = np.exp(proximal - old) * advantages
    terms, slopes = oracles.policy_terms(
        new, proximal, weighted_advantages, mask, clip_low=0.2, clip_high=0.3
    )
    close(ours[0], oracles.mean(terms, mask))
    close(ours[1], slopes / mask.sum())
    bounded = decoupled_policy_loss(
        new, old, proximal, advantages, mask, clip_low=0.2, clip_high=0.3, weight_max=1.1
    )
    weighted_advantages = np.minimum(np.exp(proximal - old), 1.1) * advantages
    terms, _ = oracles.policy_terms(
        new, proximal, weighted_advantages, mask, clip_low=0.2, clip_high=0.3
    )
    close(bounded, oracles.mean(terms, mask))


def test_interpolated_logprobs(batch):
    new, old, *_ = batch
    age = np.arange(B * R).reshape(B, R) % 5
    weight = np.where(age > 1, (age - 1) / np.maximum(age, 1), 0)
    close(interpolated_logprobs(new, old, age), old + weight * (new - old))
    slope = jax.grad(lambda x: interpolated_logprobs(x, old, jnp.asarray(age)).sum())(new)
    np.testing.assert_array_equal(slope, 0)


def test_divergences(batch):
    new, old, *_ = batch
    p, q = np.exp(np.float64(new)), np.exp(np.float64(old))
    close(binary_tv(new, old), np.abs(p - q))
    close(binary_kl(new, old), BINARY_KL(p, q), rtol=1e-3)
    certain = jnp.zeros((1, 1))
    assert np.isfinite(binary_kl(certain, jnp.log(certain + 0.5))).all()
    assert np.isfinite(binary_kl(jnp.log(certain + 0.5), certain)).all()


def test_likelihood_of_good_responses(batch):
    new, _, advantages, mask = batch
    good = advantages[:, 0] > 0
    value, slope = jax.value_and_grad(positive_nll_loss)(new, good, mask)
    kept = mask & good[:, None]
    close(value, -oracles.mean(new, kept))
    close(slope, -(kept / kept.sum()))
    np.testing.assert_array_equal(positive_nll_loss(new, good & False, mask), 0)
    for name, arrays in (("mask", (good, np.float32(mask))), ("good", (np.float32(good), mask))):
        with pytest.raises(AssertionError, match=f"^{name} must be of type bool, but"):
            positive_nll_loss(new, *arrays)


# All losses as functions of the same arrays.
ALL = {name: loss for name, (loss, _) in CASES.items()} | {
    "decoupled": lambda x, q, a, m, **k: decoupled_policy_loss(
        x, q, (x + q) / 2, a, m, **WIDE, **k
    ),
    "positive_nll": lambda x, q, a, m, **k: positive_nll_loss(x, a[:, 0] > 0, m, **k),
}


def every(*arrays, aggregate):
    return {name: loss(*arrays, aggregate=aggregate) for name, loss in ALL.items()}


def test_at_a_ratio_of_1_the_gradient_is_that_of_the_policy_gradient(batch):
    new, _, advantages, mask = batch
    advantages = np.broadcast_to(advantages[:, :1], mask.shape)
    slopes = jax.jit(jax.jacobian(partial(every, aggregate=sequence_mean)))(
        new, new, advantages, mask
    )
    expected = -advantages * mask / np.maximum(mask.sum(axis=1, keepdims=True), 1) / RESPONSES
    for name in slopes.keys() - {"positive_nll"}:
        close(slopes[name], expected, err_msg=name)


def test_micro_batches_add_up(batch):
    parts = [tuple(x[rows] for x in batch) for rows in (slice(0, 3), slice(3, 16))]
    aggregate = partial(masked_mean, count=jnp.float32(7))
    run = jax.jit(partial(every, aggregate=aggregate))
    summed = jax.tree.map(jnp.add, *(run(*part) for part in parts))
    jax.tree.map(close, summed, run(*batch))


@pytest.mark.parametrize("how", ["vmap", "pmap", "shard_map"])
def test_losses_and_gradients_over_devices(batch, how):
    count = jnp.float32(40)
    whole = partial(every, aggregate=partial(masked_mean, count=count))
    shared = partial(every, aggregate=partial(masked_mean, count=count, axis_name="devices"))
    losses = jax.jit(partial(on_devices, how, shared))(*batch)
    jax.tree.map(lambda x, y: close(x, np.full(8, y)), losses, jax.jit(whole)(*batch))
    total = lambda function: lambda *arrays: sum(function(*arrays).values())
    slopes = jax.jit(partial(on_devices, how, jax.grad(total(shared))))(*batch)
    close(slopes.reshape(B, R), jax.jit(jax.grad(total(whole)))(*batch), atol=1e-5)


@pytest.mark.parametrize("name", [*ALL, "ppo"])
def test_masked_entries_have_no_influence(batch, name):
    *arrays, mask = batch
    loss = {**ALL, "ppo": partial(clipped_policy_loss, **WIDE)}[name]
    if name == "positive_nll":  # It reads the advantage of the first token, which is real.
        return assert_mask_hides(lambda x: loss(x, x, arrays[2], mask), (arrays[0],), mask)
    assert_mask_hides(lambda *x: loss(*x, mask), tuple(arrays), mask)


# --- which tokens a clip drops ---

DUAL = WIDE | {"dual_clip": 2.0}
NARROW = {"clip_low": 0.03, "clip_high": 0.06}
CLIPS = {
    "ppo": (partial(clipped_policy_loss, **WIDE), partial(ratio_clip, **WIDE)),
    "dual": (partial(clipped_policy_loss, **DUAL), partial(ratio_clip, **DUAL)),
    "dis": (partial(dis_loss, **WIDE), partial(dis_clip, **WIDE)),
    "dppo_tv": (partial(dppo_loss, **NARROW), partial(dppo_clip, **NARROW)),
    "dppo_kl": (
        partial(dppo_loss, **NARROW, divergence=binary_kl),
        partial(dppo_clip, **NARROW, divergence=binary_kl),
    ),
    "gspo": (partial(gspo_loss, **WIDE), partial(gspo_clip, **WIDE)),
    "gmpo": (gmpo_loss, gmpo_clip),
}


def one_sign_for_each_response(advantages):
    """Give the advantages of a response one sign, as GMPO assumes."""
    return np.sign(advantages[:, :1]) * np.abs(advantages)


@pytest.mark.parametrize("name", CLIPS)
def test_the_clip_counts_the_tokens_whose_gradient_is_0(batch, name):
    new, old, advantages, mask = batch
    advantages = one_sign_for_each_response(advantages)
    loss, clip = CLIPS[name]
    slope = jax.grad(loss)(jnp.array(new), old, advantages, mask)
    dropped = (np.asarray(slope) == 0) & mask
    found = policy_metrics(new, old, mask, clip=clip, advantages=advantages).mean
    share = lambda kept: (dropped & kept).sum() / mask.sum()
    negative = found["policy/clipfrac_negative"] + found.get("policy/clipfrac_dual", 0)
    close(found["policy/clipfrac_positive"], share(advantages > 0))
    close(negative, share(advantages < 0))
    assert 0 < dropped.sum() < mask.sum() and share(advantages > 0) * share(advantages < 0) > 0
    outside = clip(new, old, mask)
    close(found["policy/clipfrac"], ((outside.low | outside.high) & mask).sum() / mask.sum())


@pytest.mark.parametrize("loss", Loss)
def test_the_metrics_of_a_loss_count_what_it_drops(batch, loss):
    """By its settings alone: a loss that drops no token has no share of dropped tokens."""
    new, old, advantages, mask = batch
    advantages = one_sign_for_each_response(advantages)
    response_loss, metrics = loss.function(PPOConfig(loss=loss, vf_coef=0.0))
    arrays = {"old_logprobs": old, "advantages": advantages, "mask": mask, "value_mask": mask}
    values = dict.fromkeys(("old_values", "returns"), jnp.zeros((B, R)))
    mean = {"aggregate": masked_mean, "value_aggregate": masked_mean}
    of = lambda x: response_loss(x, jnp.zeros((B, R)), 0 * x, **arrays, **values, **mean)[0]
    dropped = (np.asarray(jax.grad(of)(jnp.array(new))) == 0) & mask
    found = metrics(new, old, mask, advantages=advantages).mean
    shares = [
        found[f"policy/clipfrac_{sign}"]
        for sign in ("positive", "negative")
        if f"policy/clipfrac_{sign}" in found
    ]
    close(sum(shares), dropped.sum() / mask.sum())
    assert bool(shares) == (loss not in (Loss.CISPO, Loss.SAPO, Loss.VESPO))
    assert ("policy/clipfrac" in found) == (loss not in (Loss.SAPO, Loss.VESPO))


def test_cispo_counts_the_weights_that_it_bounds(batch):
    new, old, _, mask = batch
    found = policy_metrics(new, old, mask, clip=partial(cispo_clip, **WIDE)).mean
    ratio = np.exp(new - old)[mask]
    close(found["policy/clipfrac_low"], (ratio < 0.85).mean())
    close(found["policy/clipfrac_high"], (ratio > 1.25).mean())
