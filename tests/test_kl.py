"""Test `ppo_jax.ops.kl`: KL estimators against their definitions, the full KL, and controllers."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from helpers import assert_jit_and_vmap_agree

from ppo_jax.ops import kl

ESTIMATORS = {"k1": kl.kl_k1, "k2": kl.kl_k2, "k3": kl.kl_k3, "abs": kl.kl_abs}
close = partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    return 2 * oracles.normal(rng, 4, 5, 9), 2 * oracles.normal(rng, 4, 5, 9)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimator_equals_its_definition(name):
    rng = np.random.default_rng(1)
    p, q = -np.abs(oracles.normal(rng, 4, 6)), -np.abs(oracles.normal(rng, 4, 6))
    close(ESTIMATORS[name](p, q), oracles.KL[name](p.astype(np.float64), q.astype(np.float64)))
    np.testing.assert_array_equal(ESTIMATORS[name](p, p), 0)
    assert_jit_and_vmap_agree(ESTIMATORS[name], p, q)
    with pytest.raises(AssertionError):
        ESTIMATORS[name](p, q[:, :1])


def test_k3_keeps_digits_near_zero():
    """In float32, `exp(-d) - 1 + d` loses all digits for small `d`, where it is about `d²/2`."""
    d = np.float32(1e-3)
    close(kl.kl_k3(d, np.float32(0)), oracles.KL["k3"](float(d), 0.0), rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_estimator_is_unbiased(logits, name):
    """`Σᵥ π(v) k(v)` equals the KL exactly for k1 and k3."""
    logp, logq = (jax.nn.log_softmax(x) for x in logits)
    close(
        jnp.sum(jnp.exp(logp) * ESTIMATORS[name](logp, logq), axis=-1),
        kl.kl_full(*logits),
        atol=1e-5,
    )


@pytest.mark.parametrize("name", ["k2", "k3", "abs"])
def test_estimator_is_never_negative(logits, name):
    assert (ESTIMATORS[name](*(jax.nn.log_softmax(x) for x in logits)) >= 0).all()


@pytest.mark.parametrize(
    "name, slope",
    [("k1", np.ones_like), ("k2", lambda d: d), ("k3", lambda d: 1 - np.exp(-d)), ("abs", np.sign)],
)
def test_gradient_of_an_estimator(name, slope):
    d = np.linspace(-2, 2, 8, dtype=np.float32)  # without 0, where |d| has no derivative
    close(jax.grad(lambda p: ESTIMATORS[name](p, jnp.zeros_like(p)).sum())(d), slope(d))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_full_kl_equals_the_numpy_oracle(logits, temperature):
    full = partial(kl.kl_full, temperature=temperature)
    close(full(*logits), oracles.kl_full(*logits, temperature=temperature))
    np.testing.assert_allclose(
        full(logits[0], logits[0] + 3), 0, atol=1e-6
    )  # a constant added to all logits changes nothing
    assert (full(*logits) > 0).all()
    assert_jit_and_vmap_agree(full, *logits)


def test_full_kl_has_no_gradient_at_equal_policies(logits):
    slope = jax.grad(lambda x: kl.kl_full(x, jnp.asarray(logits[0])).sum())(logits[0])
    np.testing.assert_allclose(slope, 0, atol=1e-6)


def test_full_kl_ignores_tokens_of_probability_0(logits):
    """A logit of -inf, as in a padded vocabulary, adds nothing and gives no NaN in the gradient."""
    p, q = (x[0, 0].copy() for x in logits)
    p[2] = q[2] = p[5] = -np.inf
    value, slope = jax.value_and_grad(kl.kl_full)(p, q)
    close(value, oracles.kl_full(p, q))
    keep = np.isfinite(p)
    # The probability of token 5 under the reference shifts the KL by a constant, so the gradient is
    # that of the other tokens.
    close(np.asarray(slope)[keep], jax.grad(kl.kl_full)(p[keep], q[keep]), atol=1e-5)
    np.testing.assert_array_equal(np.asarray(slope)[~keep], 0)


def test_full_kl_of_bfloat16_logits_is_computed_in_float32(logits):
    low = [jnp.asarray(x, jnp.bfloat16) for x in logits]
    close(kl.kl_full(*low), oracles.kl_full(*(np.asarray(x, np.float32) for x in low)))


def test_reads_logits():
    """An estimator says itself what it reads, and its partial and compiled forms say the same."""

    @kl.of_logits
    def reverse(logits, ref_logits, *, temperature=1.0):
        return kl.kl_full(ref_logits, logits, temperature=temperature)

    for estimator in (kl.kl_full, reverse):
        bound = partial(estimator, temperature=0.7)
        nested = partial(partial(estimator), temperature=0.7)
        for form in (estimator, bound, nested, jax.jit(estimator), partial(jax.jit(estimator))):
            assert kl.reads_logits(form) is True
    for estimator in ESTIMATORS.values():
        for form in (estimator, partial(estimator), jax.jit(estimator), lambda p, q: p - q):
            assert kl.reads_logits(form) is False


def test_marked_estimator_takes_a_temperature(logits):
    """The caller's temperature wins over one that is bound already."""
    bound = partial(partial(kl.kl_full), temperature=0.5)
    np.testing.assert_array_equal(
        bound(*logits, temperature=0.7), kl.kl_full(*logits, temperature=0.7)
    )


# --- controllers ---


@pytest.mark.parametrize(
    "observed, error", [(6.0, 0.0), (6.6, 0.1), (5.4, -0.1), (60.0, 0.2), (0.0, -0.2)]
)
def test_adaptive_controller_follows_its_formula(observed, error):
    controller = kl.adaptive_kl(0.3, target=6.0, horizon=1000)
    state = jax.jit(controller.update, static_argnums=2)(
        controller.init(), jnp.float32(observed), 50
    )
    close(state.coef, 0.3 * (1 + error * 50 / 1000))


def test_controllers_work_under_scan():
    """Ten KLs above the target raise the adaptive weight each time; a fixed weight stays."""
    for controller, grown in (
        (kl.adaptive_kl(0.1, target=1.0, horizon=100), 1.02),
        (kl.fixed_kl(0.1), 1.0),
    ):
        step = lambda state, observed, controller=controller: (
            controller.update(state, observed, 10),
            state.coef,
        )
        state, history = jax.lax.scan(step, controller.init(), jnp.full(10, 5.0))
        close(history, 0.1 * grown ** np.arange(10))
        close(state.coef, 0.1 * grown**10)


@pytest.mark.parametrize(
    "bad", [{"target": 0.0}, {"horizon": 0}, {"init_coef": 0.0}, {"target": math.nan}]
)
def test_adaptive_controller_refuses_invalid_settings(bad):
    with pytest.raises(ValueError, match="positive init_coef, target and horizon"):
        kl.adaptive_kl(**{"init_coef": 0.1, "target": 1.0, "horizon": 1} | bad)


def test_adaptive_weight_stays_positive():
    """Four updates of 512 responses with a KL below the target, at a horizon of 64 responses."""
    controller = kl.adaptive_kl(0.05, target=6.0, horizon=64.0)
    state, coefs = controller.init(), []
    for _ in range(4):
        state = controller.update(state, jnp.float32(1.0), 512)
        coefs.append(float(state.coef))
    close(coefs, 0.05 * 0.2 ** np.arange(1.0, 5.0))


@pytest.mark.parametrize("first, then", [(1.0, 60.0), (60.0, 1.0)])
def test_adaptive_weight_returns_from_its_bounds(first, then):
    """Without bounds, 100 updates reach 0 or infinity, which no factor changes."""
    controller = kl.adaptive_kl(0.05, target=6.0, horizon=64.0)
    state = controller.init()
    for _ in range(100):
        state = controller.update(state, jnp.float32(first), 512)
    bound = state.coef
    close(bound, 0.05 * (1e-6 if first < then else 1e6))
    for _ in range(3):
        state = controller.update(state, jnp.float32(then), 512)
    assert bound < state.coef if first < then else 0 < state.coef < bound


@pytest.mark.parametrize("observed", [math.nan, math.inf, -math.inf])
def test_adaptive_weight_takes_in_no_kl_that_is_not_finite(observed):
    controller = kl.adaptive_kl(0.1, target=6.0, horizon=1000)
    assert controller.update(controller.init(), jnp.float32(observed), 50) == controller.init()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_of_bfloat16_are_computed_in_float32(name):
    p, q = jnp.array([-0.0078125], jnp.bfloat16), jnp.array([0.0], jnp.bfloat16)
    estimate = ESTIMATORS[name](p, q)
    assert estimate.dtype == jnp.float32
    close(estimate, oracles.KL[name](np.float64(-0.0078125), 0.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["k3"])
@pytest.mark.parametrize("d", [-100.0, -50.0, -21.0])
def test_k3_of_a_forgotten_token_is_bounded(name, d):
    """Without the bound, the estimate of -100 is infinite and its gradient outweighs all tokens."""
    value, slope = jax.value_and_grad(ESTIMATORS[name])(jnp.float32(d), jnp.float32(0))
    close(value, np.exp(20.0) - 21)
    assert slope == 0
