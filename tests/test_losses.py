"""Test `ppo_jax.ops.losses` against numpy, rlax and TRL, and over micro-batches and devices."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import rlax
from helpers import MAPPINGS, assert_jit_and_vmap_agree, assert_mask_hides, axis_of, on_devices

from ppo_jax.ops.clips import ratio_clip
from ppo_jax.ops.losses import (
    clipped_policy_loss,
    clipped_value_loss,
    entropy_bonus,
    policy_ratio,
    ppo_loss,
)
from ppo_jax.ops.masked import BY_SEQUENCE, BY_TOKEN, masked_count, masked_mean, sequence_mean
from ppo_jax.ops.metrics import policy_metrics

B, R = 16, 6
GOLDEN = Path(__file__).parent / "golden" / "trl_one_update"
CLIPS = [
    {"clip_low": 0.2, "clip_high": 0.2},
    {"clip_low": 0.1, "clip_high": 0.4},
    {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 1.5},
]
AGGREGATES = {masked_mean: oracles.mean, sequence_mean: oracles.sequence_mean}
close = partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)


@pytest.fixture
def policy():
    """Return `logprobs, old_logprobs, advantages, mask` with ratios from about 0.3 to 3."""
    rng = np.random.default_rng(0)
    old = -np.abs(oracles.normal(rng, B, R))
    mask = oracles.ragged_mask(rng, B, R, holes=True)
    mask[3] = False  # a row without a real token
    return old + oracles.normal(rng, B, R) / 2, old, oracles.normal(rng, B, R), mask


@pytest.fixture
def critic(policy):
    """Return `values, old_values, returns, mask`; half of the values moved by more than 0.3."""
    rng = np.random.default_rng(7)
    old = oracles.normal(rng, B, R)
    return old + oracles.normal(rng, B, R) / 2, old, oracles.normal(rng, B, R), policy[-1]


def token_weights(mask, aggregate) -> np.ndarray:
    """Return the weight of each token in the loss."""
    if aggregate is masked_mean:
        return mask / mask.sum()
    return mask / np.maximum(mask.sum(axis=1, keepdims=True), 1) / mask.any(axis=1).sum()


# --- policy ---


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("clips", CLIPS)
def test_policy_loss_equals_the_numpy_oracle(policy, clips, aggregate):
    """The gradient at a token is exactly 0 if it is clipped, else `-ρ A` over the count."""
    loss, slope = jax.value_and_grad(clipped_policy_loss)(*policy, **clips, aggregate=aggregate)
    terms, slopes = oracles.policy_terms(*policy, **clips)
    close(loss, AGGREGATES[aggregate](terms, policy[-1]))
    close(slope, slopes * token_weights(policy[-1], aggregate))
    np.testing.assert_array_equal(np.asarray(slope)[slopes == 0], 0)
    assert ((slopes == 0) & policy[-1]).any()  # at least one real token is clipped


@pytest.mark.parametrize(
    "advantage, ratio, expected",
    [
        (1.0, 1.5, 0.0),  # good and already more likely: clipped
        (1.0, 1.1, -1.1),
        (1.0, 0.5, -0.5),  # good and now less likely: never clipped
        (-1.0, 0.5, 0.0),  # bad and already less likely: clipped
        (-1.0, 0.9, 0.9),
        (-1.0, 1.5, 1.5),  # bad and now more likely: never clipped
    ],
)
def test_gradient_is_clipped_in_one_direction_only(advantage, ratio, expected):
    one = jnp.ones((1, 1))
    of = lambda x: clipped_policy_loss(
        x, 0 * one, advantage * one, one > 0, clip_low=0.2, clip_high=0.2
    )
    slope = jax.grad(of)(jnp.log(ratio) * one)
    close(slope, [[expected]], atol=0 if expected == 0 else 1e-6)


@pytest.mark.parametrize("ratio, slope", [(1.5, 1.5), (2.9, 2.9), (3.1, 0.0)])
def test_dual_clip_bounds_the_loss_of_a_bad_token(ratio, slope):
    one = jnp.ones((1, 1))
    of = lambda x: clipped_policy_loss(
        x, 0 * one, -one, one > 0, clip_low=0.2, clip_high=0.2, dual_clip=3.0
    )
    loss, gradient = jax.value_and_grad(of)(jnp.log(ratio) * one)
    close(loss, min(ratio, 3))
    close(gradient, [[slope]])


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_policy_loss_at_ratio_1(policy, aggregate):
    """The loss is minus the mean advantage, with the gradient of plain policy gradient."""
    _, old, advantages, mask = policy
    loss, slope = jax.value_and_grad(clipped_policy_loss)(
        old, old, advantages, mask, clip_low=0.2, clip_high=0.2, aggregate=aggregate
    )
    close(loss, -AGGREGATES[aggregate](advantages, mask))
    close(slope, -advantages * token_weights(mask, aggregate))


def test_a_wide_clip_does_not_clip(policy):
    logprobs, old, advantages, mask = policy
    plain = lambda x: -masked_mean(policy_ratio(x, old, mask) * advantages, mask)
    of = lambda x: clipped_policy_loss(x, old, advantages, mask, clip_low=1 - 1e-6, clip_high=1e6)
    jax.tree.map(close, jax.value_and_grad(of)(logprobs), jax.value_and_grad(plain)(logprobs))


@pytest.mark.parametrize("epsilon", [0.1, 0.3])
def test_policy_loss_equals_rlax(policy, epsilon):
    logprobs, old, advantages, mask = policy
    theirs = lambda x: rlax.clipped_surrogate_pg_loss(
        jnp.exp(x - old)[mask], advantages[mask], epsilon
    )
    ours = lambda x: clipped_policy_loss(
        x, old, advantages, mask, clip_low=epsilon, clip_high=epsilon
    )
    jax.tree.map(close, jax.value_and_grad(ours)(logprobs), jax.value_and_grad(theirs)(logprobs))


def test_policy_ratio_is_1_outside_the_mask(policy):
    logprobs, old, _, mask = policy
    close(policy_ratio(logprobs, old, mask), np.where(mask, np.exp(logprobs - old), 1))


# --- value ---


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("clip", [None, 0.3, 0.01])
def test_value_loss_equals_the_numpy_oracle(critic, clip, aggregate):
    loss, slope = jax.value_and_grad(clipped_value_loss)(*critic, clip=clip, aggregate=aggregate)
    terms, slopes = oracles.value_terms(*critic, clip=clip)
    close(loss, AGGREGATES[aggregate](terms, critic[-1]))
    close(slope, slopes * token_weights(critic[-1], aggregate))
    np.testing.assert_array_equal(np.asarray(slope)[slopes == 0], 0)
    assert clip is None or ((slopes == 0) & critic[-1]).any()


def test_a_wide_value_clip_does_not_clip(critic):
    jax.tree.map(
        close,
        jax.value_and_grad(clipped_value_loss)(*critic, clip=1e6),
        jax.value_and_grad(clipped_value_loss)(*critic, clip=None),
    )


@pytest.mark.parametrize("clip", [None, 0.3])
def test_value_loss_equals_rlax(critic, clip):
    """Compose the clipped value loss, which rlax lacks, of two of its `l2_loss`."""
    values, old, returns, mask = critic

    def theirs(v):
        loss = rlax.l2_loss(v, returns)
        if clip is not None:
            loss = jnp.maximum(loss, rlax.l2_loss(old + jnp.clip(v - old, -clip, clip), returns))
        return loss[mask].mean()

    ours = lambda v: clipped_value_loss(v, old, returns, mask, clip=clip)
    jax.tree.map(close, jax.value_and_grad(ours)(values), jax.value_and_grad(theirs)(values))


def test_losses_of_the_recorded_trl_update():
    """In the first optimizer step of an update, policy and values are the old ones."""
    meta = json.loads((GOLDEN / "meta.json").read_text())
    config, logged = meta["config"], meta["metrics"]
    with np.load(GOLDEN / "step.npz") as file:
        step = dict(file)
    policy = clipped_policy_loss(
        step["logprobs"],
        step["logprobs"],
        step["advantages"],
        ~step["padding_mask"],
        clip_low=config["clip"],
        clip_high=config["clip"],
    )
    value = clipped_value_loss(
        step["values"],
        step["values"],
        step["returns"],
        ~step["padding_mask_p1"],
        clip=config["value_clip"],
    )
    np.testing.assert_allclose(policy, logged["loss/policy_avg"], atol=1e-6)
    np.testing.assert_allclose(value, logged["loss/value_avg"], rtol=1e-5)


# --- the PPO loss ---


def test_entropy_bonus(policy):
    entropies, mask = np.abs(policy[2]), policy[-1]
    for aggregate, oracle in AGGREGATES.items():
        close(entropy_bonus(entropies, mask, aggregate=aggregate), oracle(entropies, mask))


def make_ppo_loss(policy, critic, value_mask, **options):
    """Return `ppo_loss` as a function of log-probs, values and entropies, and those three."""
    logprobs, old_logprobs, advantages, mask = policy
    values, old_values, returns, _ = critic
    fixed = {
        "old_logprobs": old_logprobs,
        "old_values": old_values,
        "advantages": advantages,
        "returns": returns,
    }
    options = {
        "clip_low": 0.2,
        "clip_high": 0.3,
        "value_clip": 0.3,
        "vf_coef": 0.5,
        "entropy_coef": 0.01,
    } | options
    return partial(ppo_loss, **fixed, mask=mask, value_mask=value_mask, **options), (
        logprobs,
        values,
        abs(advantages),
    )


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_ppo_loss_is_the_sum_of_its_terms(policy, critic, aggregate):
    value_mask = np.roll(policy[-1], 1, axis=1) | policy[-1]
    of, learned = make_ppo_loss(policy, critic, value_mask, aggregate=aggregate, dual_clip=1.5)
    loss, terms = of(*learned)
    clips = {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 1.5}
    oracle = AGGREGATES[aggregate]
    value_losses, slopes = oracles.value_terms(*critic[:3], value_mask, clip=0.3)
    expected = {
        "loss/policy": oracle(oracles.policy_terms(*policy, **clips)[0], policy[-1]),
        "loss/value": oracle(value_losses, value_mask),
        "value/clipfrac": oracle((slopes == 0).astype(float), value_mask),
        "policy/entropy": oracle(learned[2], policy[-1]),
    }
    assert terms.keys() == expected.keys()
    jax.tree.map(close, terms, expected)
    close(
        loss,
        expected["loss/policy"] + 0.5 * expected["loss/value"] - 0.01 * expected["policy/entropy"],
    )


def test_policy_and_value_may_be_averaged_differently(policy, critic):
    of, learned = make_ppo_loss(
        policy, critic, policy[-1], aggregate=sequence_mean, value_aggregate=masked_mean
    )
    _, terms = of(*learned)
    close(terms["loss/value"], oracles.mean(oracles.value_terms(*critic, clip=0.3)[0], critic[-1]))
    close(terms["policy/entropy"], oracles.sequence_mean(learned[2], policy[-1]))


def test_the_entropy_weight_may_be_traced(policy, critic):
    """A schedule of the weight is an array, and even a weight of 0 then keeps its term."""
    of = lambda weight: make_ppo_loss(policy, critic, policy[-1], entropy_coef=weight)
    traced = jax.jit(lambda weight: of(weight)[0](*of(weight)[1])[0])
    for weight in (0.0, 0.25):
        function, learned = of(weight)
        close(traced(jnp.float32(weight)), function(*learned)[0])


@pytest.mark.parametrize("aggregation", [BY_TOKEN, BY_SEQUENCE], ids=["token", "sequence"])
def test_micro_batches_add_up(policy, critic, aggregation):
    """With global counts, losses and gradients of micro-batches sum to those of the whole batch."""
    value_mask = np.roll(policy[-1], 1, axis=1) | policy[-1]
    counted = lambda mask: partial(aggregation.mean, count=aggregation.count(mask))
    options = {"aggregate": counted(policy[-1]), "value_aggregate": counted(value_mask)}
    of, learned = make_ppo_loss(policy, critic, value_mask, aggregate=aggregation.mean)
    whole, gradient = jax.jit(jax.value_and_grad(lambda xs: of(*xs)[0]))(learned)
    total, gradients = 0.0, []
    for rows in np.split(np.arange(B), [3, 4, 10]):
        part = lambda xs, rows=rows: [x[rows] for x in xs]
        of, learned = make_ppo_loss(part(policy), part(critic), value_mask[rows], **options)
        loss, slope = jax.jit(jax.value_and_grad(lambda xs, of=of: of(*xs)[0]))(learned)
        total += loss
        gradients.append(slope)
    close(total, whole)
    jax.tree.map(close, jax.tree.map(lambda *xs: jnp.concatenate(xs), *gradients), gradient)


@pytest.mark.parametrize("how", MAPPINGS)
def test_loss_and_gradient_over_devices(policy, how):
    """Local sums over the global count add up to the loss and gradient of one device."""
    mask = policy[-1]
    mask[:2], mask[2:4] = False, True  # one device has no real token, one has no masked token

    def loss(shift, logprobs, old, advantages, mask, aggregate=masked_mean):
        return clipped_policy_loss(
            logprobs + shift,
            old,
            advantages,
            mask,
            clip_low=0.2,
            clip_high=0.2,
            aggregate=aggregate,
        )

    def local(shift, *batch):
        aggregate = partial(masked_mean, count=masked_count(batch[-1], axis_name=axis_of(how)))
        return jax.lax.psum(
            jax.value_and_grad(partial(loss, aggregate=aggregate))(shift[0], *batch), axis_of(how)
        )

    whole = jax.value_and_grad(loss)(0.1, *policy)
    pieces = on_devices(how, local, np.full(8, 0.1, np.float32), *policy)
    jax.tree.map(lambda piece, x: close(piece, np.full(8, x)), pieces, whole)


OF_POLICY = {
    "policy": partial(clipped_policy_loss, clip_low=0.2, clip_high=0.2),
    "policy_sequence": partial(
        clipped_policy_loss, clip_low=0.2, clip_high=0.2, aggregate=sequence_mean
    ),
    "policy_dual": partial(clipped_policy_loss, clip_low=0.2, clip_high=0.2, dual_clip=1.5),
}
OF_VALUES = {
    "value": partial(clipped_value_loss, clip=0.3),
    "value_unclipped": partial(clipped_value_loss, clip=None),
    "value_sequence": partial(clipped_value_loss, clip=0.3, aggregate=sequence_mean),
}


@pytest.mark.parametrize("name", OF_POLICY | OF_VALUES)
def test_jit_vmap_and_masked_entries(policy, critic, name):
    function, arrays = (OF_POLICY | OF_VALUES)[name], policy if name in OF_POLICY else critic
    assert_jit_and_vmap_agree(function, *arrays)
    assert_mask_hides(lambda *xs: function(*xs, arrays[-1]), arrays[:-1], arrays[-1])


def test_ppo_loss_jit_vmap_and_masked_entries(policy, critic):
    mask = policy[-1]

    def of(logprobs, old_logprobs, advantages, values, old_values, returns, entropies, mask):
        batch = (logprobs, old_logprobs, advantages, mask), (values, old_values, returns, mask)
        function, _ = make_ppo_loss(*batch, mask, dual_clip=1.5)
        return function(logprobs, values, entropies)[0]

    arrays = (*policy[:3], *critic[:3], np.abs(policy[2]))
    assert_jit_and_vmap_agree(of, *arrays, mask)
    assert_mask_hides(lambda *xs: of(*xs, mask), arrays, mask)


def test_an_empty_mask_gives_zero_loss(policy, critic):
    none = np.zeros((B, R), bool)
    of, learned = make_ppo_loss((*policy[:3], none), (*critic[:3], none), none)
    loss, gradients = jax.value_and_grad(lambda xs: of(*xs)[0])(learned)
    assert loss == 0
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), gradients)


@pytest.mark.parametrize("which", range(4))
def test_shapes_must_match(policy, which):
    """A `[B, 1]` array is refused, because it would broadcast to a plausible but wrong number."""
    bad = [x[:, :1] if i == which else x for i, x in enumerate(policy)]
    with pytest.raises(AssertionError):
        clipped_policy_loss(*bad, clip_low=0.2, clip_high=0.2)
    with pytest.raises(AssertionError):
        clipped_value_loss(*bad, clip=0.2)


# --- extreme and low-precision inputs ---


@pytest.mark.parametrize("log_ratio, bound", [(19.0, np.exp(19.0)), (45.0, 0.0), (200.0, 0.0)])
def test_one_token_cannot_overflow_the_gradient(log_ratio, bound):
    """A log-ratio beyond 20 nats is cut there, as in verl and OpenRLHF, and has no gradient."""
    one = jnp.ones((1, 1))
    of = lambda x: clipped_policy_loss(x, 0 * one, -one, one > 0, clip_low=0.2, clip_high=0.2)
    loss, slope = jax.value_and_grad(of)(log_ratio * one)
    close(loss, np.exp(min(log_ratio, 20.0)))
    close(slope, [[bound]])


def test_metrics_of_one_far_token_are_finite():
    x, mask = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
    far = x.at[0, 0].set(200.0)
    clip = partial(ratio_clip, clip_low=0.2, clip_high=0.2)
    for metrics in policy_metrics(far, x, mask, clip=clip):
        assert all(np.isfinite(value) for value in metrics.values()), metrics


@pytest.mark.parametrize("name", OF_POLICY | OF_VALUES)
def test_bfloat16_is_computed_in_float32(policy, critic, name):
    function, arrays = (OF_POLICY | OF_VALUES)[name], policy if name in OF_POLICY else critic
    low = [jnp.asarray(x, jnp.bfloat16) for x in arrays[:-1]]
    wide = [x.astype(jnp.float32) for x in low]
    np.testing.assert_array_equal(function(*low, arrays[-1]), function(*wide, arrays[-1]))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_masks_must_be_bool(policy, critic, dtype):
    for name, function in (OF_POLICY | OF_VALUES).items():
        arrays = policy if name in OF_POLICY else critic
        with pytest.raises(AssertionError, match=r"^mask must be of type bool, but is of "):
            function(*arrays[:-1], arrays[-1].astype(dtype))
    of, learned = make_ppo_loss(policy, critic, critic[-1].astype(dtype))
    with pytest.raises(AssertionError, match=r"^value_mask must be of type bool"):
        of(*learned)
