"""Compare the methods with what released implementations compute on 128 random cases.

`golden/methods/` holds the inputs and their numbers, in float32. Ours are computed in float64, so
that rounding does not hide a difference. Masks are ragged and have holes.
"""

import re
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppo_jax
from ppo_jax.ops import (
    advantages,
    baselines,
    decoupled,
    dppo,
    group_advantages,
    importance,
    kl,
    likelihood_losses,
    losses,
    policy_losses,
    scores,
    selection,
    sequence_losses,
)
from ppo_jax.ops.aggregation import SEQUENCE_SUM, TOKEN_SUM, constant_length
from ppo_jax.ops.entropy_control import adaptive_entropy
from ppo_jax.ops.kl_loss import kl_loss
from ppo_jax.ops.masked import BY_SEQUENCE, BY_TOKEN, masked_mean, sequence_mean
from ppo_jax.ppo import methods

GOLDEN = Path(__file__).parent / "golden" / "methods"


@cache
def recorded(family: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{family}.npz") as file:
        return dict(file)


def test_every_listed_method_is_compared_or_says_why_not():
    text = (Path(__file__).parents[1] / "docs/methods.md").read_text()
    table = text.split("| topic |")[1].split("\n\n")[0]
    names = re.findall(r"`(\w+)`", table)
    assert len(names) > 40
    here = Path(__file__).read_text()
    missing = [name for name in names if not re.search(rf"\b{name}\b", here)]
    said = [x for x in missing if "No released implementation" in getattr(ppo_jax, x).__doc__]
    assert missing == said


def assert_equal_cases(ours, theirs, rtol=1e-6):
    """Assert that the largest difference in each case is small relative to its largest number."""
    ours, theirs = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (ours, theirs))
    scale = np.maximum(np.abs(theirs).max(axis=1), 1e-6)
    worst = np.max(np.abs(ours - theirs).max(axis=1) / scale)
    assert worst <= rtol, worst


def each_case(function, family, *names):
    """Apply a function to each case in one compiled call, in float64."""
    with jax.enable_x64(True):
        data = recorded(family)
        wide = lambda x: x.astype(np.float64) if x.dtype == np.float32 else x
        return jax.jit(jax.vmap(function))(*(jnp.asarray(wide(data[name])) for name in names))


# --- advantages ---


def adaptive(rewards, values, mask, *, alpha, **options):
    lam = advantages.length_adaptive_lambda(mask, alpha=alpha)
    return advantages.decoupled_gae(rewards, values, mask, lam_policy=lam, **options)


def of_size(function):
    """MaxRL is for scores that are not negative."""
    return lambda rewards, mask, groups: function(jnp.abs(rewards), mask, groups)


GAE = ("rewards", "values", "mask")
GROUPS = ("rewards", "mask", "groups")
ADVANTAGES = {  # their numbers: (ours, names of its arguments, which result, tolerance)
    "nemo_decoupled_advantages": (
        partial(advantages.decoupled_gae, gamma=0.97, lam_policy=0.9, lam_value=1.0),
        GAE,
        0,
    ),
    "nemo_decoupled_returns": (
        partial(advantages.decoupled_gae, gamma=0.97, lam_policy=0.9, lam_value=1.0),
        GAE,
        1,
    ),
    "nemo_adaptive_advantages": (partial(adaptive, gamma=0.97, alpha=0.35), GAE, 0),
    "verl_grpo": (group_advantages.grpo_advantages, GROUPS, 0),
    "verl_dr_grpo": (group_advantages.dr_grpo_advantages, GROUPS, 0),
    "verl_rloo": (group_advantages.rloo_advantages, ("rewards", "mask", "singles"), 0),
    "prime_maxrl": (of_size(group_advantages.maxrl_advantages), GROUPS, 0),
    "skyrl_maxrl": (of_size(group_advantages.maxrl_advantages), GROUPS, 0),
    "verl_batch_mean": (baselines.batch_mean_advantages, ("rewards", "mask"), 0),
    "verl_returns": (
        partial(baselines.reinforce_plus_plus_advantages, gamma=0.97),
        ("rewards", "mask"),
        1,
    ),
    "verl_reinforce_pp": (
        partial(baselines.reinforce_plus_plus_advantages, gamma=0.97),
        ("rewards", "mask"),
        0,
    ),
    "verl_reinforce_pp_baseline": (baselines.reinforce_plus_plus_advantages, GROUPS, 0),
}


@pytest.mark.parametrize("peer", ADVANTAGES)
def test_advantages(peer):
    function, names, which = ADVANTAGES[peer]
    data = recorded("advantages")
    ours = np.where(data["mask"], each_case(function, "advantages", *names)[which], 0)
    theirs = np.where(data["mask"], data[peer], 0)
    # SkyRL adds 1e-6 to the mean of a group, which is large where the scores are small.
    assert_equal_cases(ours, theirs, rtol=1e-3 if peer == "skyrl_maxrl" else 1e-6)


def test_generalized_advantage_estimation():
    gae = partial(advantages.generalized_advantage_estimation, gamma=0.97, lam=0.9)
    ours, data = each_case(gae, "advantages", *GAE)[0], recorded("advantages")
    theirs = np.where(data["mask"], data["nemo_decoupled_advantages"], 0)
    assert_equal_cases(np.where(data["mask"], ours, 0), theirs)


# --- losses ---


WIDE = {"clip_low": 0.15, "clip_high": 0.25}
KL = {"clip_low": 0.05, "clip_high": 0.02, "divergence": dppo.binary_kl}
POLICY = ("logprobs", "old_logprobs", "advantages", "mask")
DECOUPLED = ("logprobs", "old_logprobs", "proximal", "advantages", "mask")
LOSSES = {  # their numbers: (our loss, names of its arguments)
    "verl_ppo": (partial(losses.clipped_policy_loss, **WIDE, dual_clip=3.0), POLICY),
    "verl_cispo": (partial(policy_losses.cispo_loss, **WIDE), POLICY),
    "slime_cispo": (partial(policy_losses.cispo_loss, clip_low=1.0, clip_high=4.0), POLICY),
    "skyrl_dis": (partial(policy_losses.dis_loss, **WIDE), POLICY),
    "verl_sapo": (partial(policy_losses.sapo_loss, aggregate=sequence_mean), POLICY),
    "areal_sapo": (partial(policy_losses.sapo_loss, tau_positive=0.8, tau_negative=1.7), POLICY),
    "verl_dppo_tv": (partial(dppo.dppo_loss, **WIDE), POLICY),
    "verl_dppo_kl": (partial(dppo.dppo_loss, **KL), POLICY),
    "skyrl_dppo_tv": (partial(dppo.dppo_loss, **WIDE, ratio_max=None), POLICY),
    "skyrl_dppo_kl": (partial(dppo.dppo_loss, **KL, ratio_max=None), POLICY),
    "prime_dppo_tv": (partial(dppo.dppo_loss, **WIDE, ratio_max=None), POLICY),
    "areal_decoupled": (
        partial(decoupled.decoupled_policy_loss, **WIDE, weight_max=2.0),
        DECOUPLED,
    ),
    "areal_decoupled_unbounded": (
        partial(decoupled.decoupled_policy_loss, clip_low=0.2, clip_high=0.2),
        DECOUPLED,
    ),
    "verl_gspo": (sequence_losses.gspo_loss, POLICY),
    "verl_gspo_wide": (partial(sequence_losses.gspo_loss, **WIDE), POLICY),
    "verl_gmpo": (sequence_losses.gmpo_loss, POLICY),
    "trl_vespo": (sequence_losses.vespo_loss, POLICY),
    "verl_dro": (partial(likelihood_losses.dro_loss, beta=0.3), POLICY),
    "nemo_positive_nll": (likelihood_losses.positive_nll_loss, ("logprobs", "good", "mask")),
}


@pytest.mark.parametrize("peer", LOSSES)
def test_losses_and_their_gradients(peer):
    function, names = LOSSES[peer]
    loss, slope = each_case(jax.value_and_grad(function), "losses", *names)
    data = recorded("losses")
    cases = np.ones(len(slope), bool)
    if "gspo" in peer:  # They clip the mean log-ratio of a response at 10 nats.
        change, mask = (data["logprobs"] - data["old_logprobs"]), data["mask"]
        cases = np.max(np.mean(change, axis=2, where=mask), axis=1) < 10
        assert cases.sum() > 100
    assert_equal_cases(slope[cases], data[f"{peer}_grad"][cases])
    if not peer.startswith("verl_dppo"):  # Their value has log π in place of the ratio.
        assert_equal_cases(loss[cases], data[peer][cases])


def test_interpolated_logprobs():
    names = ("logprobs", "old_logprobs", "age")
    ours = each_case(decoupled.interpolated_logprobs, "losses", *names)
    assert_equal_cases(ours, recorded("losses")["areal_interpolated"])


# --- KL in the loss, weighting, importance weights ---


AGAINST = ("logprobs", "ref_logprobs", "mask")
KL_LOSSES = {  # their numbers: (our loss, names of its arguments)
    "verl_kl_k2": (kl_loss, AGAINST),
    "verl_kl_k1_straight": (partial(kl_loss, estimator=kl.kl_k1), AGAINST),
    "verl_kl_k3_straight": (partial(kl_loss, estimator=kl.kl_k3), AGAINST),
    # The loss k3 of the settings is the estimate itself, and its gradient is that of k3.
    "verl_kl_k3": (partial(methods.plain_k3, old_logprobs=None, aggregate=masked_mean), AGAINST),
    "slime_kl_k3_weighted": (
        lambda x, ref, mask, old: kl_loss(x, ref, mask, estimator=kl.kl_k3, old_logprobs=old),
        (*AGAINST, "old_logprobs"),
    ),
}


@pytest.mark.parametrize("peer", KL_LOSSES)
def test_kl_in_the_loss(peer):
    function, names = KL_LOSSES[peer]
    loss, slope = each_case(jax.value_and_grad(function), "losses", *names)
    assert_equal_cases(loss, recorded("losses")[peer])
    assert_equal_cases(slope, recorded("losses")[f"{peer}_grad"])


AGGREGATIONS = {
    "verl_agg_token_mean": BY_TOKEN,
    "verl_agg_token_sum": TOKEN_SUM,
    "verl_agg_seq_mean_token_sum": SEQUENCE_SUM,
    "verl_agg_seq_mean_token_sum_norm": constant_length(),
    "verl_agg_constant": constant_length(50),
    "verl_agg_seq_mean_token_mean": BY_SEQUENCE,
}


@pytest.mark.parametrize("peer", AGGREGATIONS)
def test_weighting_of_tokens(peer):
    aggregation = AGGREGATIONS[peer]
    reduce = lambda x, mask: aggregation.mean(x, mask, count=aggregation.count(mask))
    total, slope = each_case(jax.value_and_grad(reduce), "losses", "logprobs", "mask")
    assert_equal_cases(total, recorded("losses")[peer])
    assert_equal_cases(slope, recorded("losses")[f"{peer}_grad"])


TRUNCATED = partial(importance.truncated_weights, high=1.5)
RANGE = {"low": 0.6, "high": 1.6}
KEPT = partial(importance.importance_mask, **RANGE)
SEQUENCE, TOKEN = importance.Level.SEQUENCE, importance.Level.TOKEN
IMPORTANCE = {
    "verl_tis_token": TRUNCATED,
    "skyrl_tis_token": TRUNCATED,
    "verl_tis_sequence": partial(TRUNCATED, level=SEQUENCE),
    "skyrl_tis_sequence": partial(TRUNCATED, level=SEQUENCE),
    "verl_icepop_token": partial(importance.bounded_weights, **RANGE),
    "verl_icepop_sequence": partial(importance.bounded_weights, **RANGE, level=SEQUENCE),
    "skyrl_mask_token": partial(KEPT, level=TOKEN),
    "skyrl_mask_outlier": partial(KEPT, level=TOKEN, whole=True),
    "skyrl_mask_sequence": partial(KEPT, level=SEQUENCE),
    "skyrl_mask_geometric": partial(importance.importance_mask, low=0.97, high=1.02),
    "openrlhf_tis_unbounded": importance.importance_weights,
    "openrlhf_seq_mask_tis": partial(importance.sequence_masked_weights, low=0.97, high=1.02),
}


@pytest.mark.parametrize("peer", IMPORTANCE)
def test_importance_weights(peer):
    ours = each_case(IMPORTANCE[peer], "importance", "logprobs", "sampler_logprobs", "mask")
    assert_equal_cases(ours, recorded("importance")[peer])


# --- scores, controllers ---


def overlong(max_length, buffer, weight):
    return partial(scores.overlong_penalty, max_length=max_length, buffer=buffer, weight=weight)


def entropy_path(entropies):
    """Return the coefficient and the weight after each update."""
    controller = adaptive_entropy(0.002, target=0.2, step=0.0004, most=0.003)
    step = lambda state, entropy: (new := controller.update(state, entropy), jnp.stack(new))
    return jax.lax.scan(step, controller.init(), entropies.astype(jnp.float32))[1]


def kl_path(kl_per_response):
    """Return the weight of the KL penalty after each update."""
    controller = kl.adaptive_kl(0.2, target=6.0, horizon=1000)
    step = lambda state, x: (new := controller.update(state, x, 64), new.coef)
    return jax.lax.scan(step, controller.init(), kl_per_response.astype(jnp.float32))[1]


def named(parts):
    weights = dict(zip("abc", (1.0, 0.5, -0.25), strict=True))
    return scores.weighted_score(dict(zip("abc", parts, strict=True)), weights)


SCORES = {
    "trl_overlong": (overlong(10, 4, 1.0), ("mask",)),
    "areal_overlong": (overlong(12, 5, 0.7), ("mask",)),
    "skyrl_informative": (scores.informative, ("scores", "groups")),
    "coste_mean": (scores.mean_score, ("ensemble",)),
    "coste_least": (scores.least_score, ("ensemble",)),
    "coste_uncertainty": (partial(scores.uncertainty_weighted_score, coef=0.4), ("ensemble",)),
    "trl_weighted": (named, ("parts",)),
    "skywork_entropy": (entropy_path, ("entropy",)),
    "openrlhf_adaptive_kl": (kl_path, ("kl",)),
}


@pytest.mark.parametrize("peer", SCORES)
def test_scores_and_controllers(peer):
    function, names = SCORES[peer]
    # The state of a controller is float32, and theirs is float64.
    rtol = 1e-5 if peer in ("skywork_entropy", "openrlhf_adaptive_kl") else 1e-6
    assert_equal_cases(each_case(function, "scores", *names), recorded("scores")[peer], rtol)


# --- selected tokens ---


def clip_cov_loss(x, old, advantages, mask):
    """Drop all candidates, so that the choice among them does not matter."""
    clips = {"clip_low": 0.2, "clip_high": 0.2}
    kept = selection.clip_cov_mask(
        jax.random.key(0), x, old, advantages, mask, **clips, part=1.0, least=0.3
    )
    return losses.clipped_policy_loss(x, old, advantages * kept, mask, **clips)


KL_COV = partial(selection.kl_cov_loss, part=0.23, coef=0.7)


@pytest.mark.parametrize(
    "peer, function",
    [("verl_clip_cov", clip_cov_loss), ("verl_kl_cov", KL_COV), ("skyrl_kl_cov", KL_COV)],
)
def test_losses_of_selected_tokens(peer, function):
    loss, slope = each_case(jax.value_and_grad(function), "losses", *POLICY)
    cases = np.ones(len(loss), bool)
    # Equal covariances, of which not all are chosen: any choice is right.
    cases[[15, 87, 91, 95, 119, 123]] = "kl_cov" not in peer
    assert_equal_cases(loss[cases], recorded("selection")[peer][cases])
    assert_equal_cases(slope[cases], recorded("selection")[f"{peer}_grad"][cases])


def test_m2po_mask():
    ours = each_case(selection.m2po_mask, "losses", "proximal", "old_logprobs", "mask")
    np.testing.assert_array_equal(ours, recorded("selection")["areal_m2po"])
    assert 0 < ours.sum() < recorded("losses")["mask"].sum()
