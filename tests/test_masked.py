"""Test `ppo_jax.ops.masked` against a numpy oracle, over 8 devices, and with NaN under the mask."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from helpers import MAPPINGS, assert_jit_and_vmap_agree, assert_mask_hides, axis_of, on_devices

from ppo_jax.ops import masked

B, R = 16, 7
close = partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)


@pytest.fixture(params=["ragged", "holes"])
def batch(request):
    rng = np.random.default_rng(0)
    mask = oracles.ragged_mask(rng, B, R, holes=request.param == "holes")
    mask[3] = False  # a row without real tokens
    return 3 * oracles.normal(rng, B, R) + 5, mask


def test_moments_equal_the_numpy_oracle(batch):
    x, mask = batch
    close(masked.masked_sum(x, mask), sum(oracles.kept(x, mask)))
    assert masked.masked_count(mask) == mask.sum()
    assert masked.sequence_count(mask) == mask.any(axis=1).sum() < B
    close(masked.masked_mean(x, mask), oracles.mean(x, mask))
    close(masked.sequence_mean(x, mask), oracles.sequence_mean(x, mask))
    for unbiased in (False, True):
        close(
            masked.masked_var(x, mask, unbiased=unbiased), oracles.var(x, mask, unbiased=unbiased)
        )


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("unbiased", [True, False])
def test_whitening_equals_the_numpy_oracle(batch, shift_mean, unbiased):
    x, mask = batch
    options = {"shift_mean": shift_mean, "unbiased": unbiased, "eps": 1e-3}
    white = masked.masked_whiten(x, mask, **options)
    close(white, oracles.whiten(x, mask, **options))
    np.testing.assert_array_equal(np.asarray(white)[~mask], 0)


def test_whitening_removes_scale_and_shift(batch):
    x, mask = batch
    close(masked.masked_whiten(4 * x + 100, mask), masked.masked_whiten(x, mask), atol=2e-4)
    close(masked.masked_var(masked.masked_whiten(x, mask), mask), 1)


def test_variance_far_from_zero():
    """The formula `E[x²] - E[x]²` would lose all digits here."""
    x = 4096 + np.array([-1.0, 0.0, 1.0, 9.0], np.float32)
    close(masked.masked_var(x, x < 4100), 2 / 3)


@pytest.mark.parametrize("unbiased", [True, False])
def test_variance_and_mean_of_one_or_no_entry(unbiased):
    """The variance of one entry and the mean of none are 0, not NaN."""
    x, none = np.full((2, 3), 7, np.float32), np.zeros((2, 3), bool)
    one = none.copy()
    one[1, 1] = True
    assert masked.masked_var(x, one, unbiased=unbiased) == 0
    np.testing.assert_array_equal(masked.masked_whiten(x, one, unbiased=unbiased), 0)
    for result in (
        masked.masked_mean,
        masked.sequence_mean,
        partial(masked.masked_var, unbiased=unbiased),
    ):
        assert result(x, none) == 0


@pytest.mark.parametrize(
    "aggregation", [masked.BY_TOKEN, masked.BY_SEQUENCE], ids=["token", "sequence"]
)
def test_micro_batches_add_up(batch, aggregation):
    """With the global count, micro-batches sum to the mean; a plain mean of means differs."""
    x, mask = batch
    mean, count = aggregation.mean, aggregation.count
    parts = list(zip(np.split(x, [3, 4, 10]), np.split(mask, [3, 4, 10]), strict=True))
    close(sum(mean(a, m, count=count(mask)) for a, m in parts), mean(x, mask))
    assert abs(sum(mean(a, m) for a, m in parts) / len(parts) - mean(x, mask)) > 1e-3


FUNCTIONS = {
    "sum": masked.masked_sum,
    "mean": masked.masked_mean,
    "mean_count": partial(masked.masked_mean, count=jnp.float32(11)),
    "sequence_mean": masked.sequence_mean,
    "var": masked.masked_var,
    "var_unbiased": partial(masked.masked_var, unbiased=True),
    "whiten": masked.masked_whiten,
    "whiten_keep_mean": partial(masked.masked_whiten, shift_mean=False, unbiased=True),
}
GLOBAL = {
    name: f for name, f in FUNCTIONS.items() if name in ("sum", "mean", "var_unbiased", "whiten")
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_jit_and_vmap(batch, name):
    assert_jit_and_vmap_agree(FUNCTIONS[name], *batch)
    assert_jit_and_vmap_agree(masked.masked_count, batch[1])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_masked_entries_have_no_influence(batch, name):
    x, mask = batch
    weights = np.linspace(-1, 2, R, dtype=np.float32)[
        None
    ]  # weights, because the plain sum of whitened entries has no gradient
    of = lambda x: jnp.sum(FUNCTIONS[name](x, mask) * weights)
    assert_mask_hides(of, (x,), mask)


@pytest.mark.parametrize("how", MAPPINGS)
@pytest.mark.parametrize("name", GLOBAL)
def test_moments_over_devices_are_global(how, name):
    """Devices hold 0 to 14 real tokens each, so moments per device would differ."""
    rng = np.random.default_rng(5)
    x, mask = oracles.normal(rng, B, R) + 2, oracles.ragged_mask(rng, B, R)
    mask[:2], mask[2:4] = False, True
    whole = GLOBAL[name](x, mask)
    pieces = on_devices(how, partial(GLOBAL[name], axis_name=axis_of(how)), x, mask)
    pieces = pieces.reshape(whole.shape) if whole.ndim else pieces
    close(pieces, np.broadcast_to(whole, pieces.shape))


@pytest.mark.parametrize("how", MAPPINGS)
def test_counts_over_devices_are_global(how):
    mask = oracles.ragged_mask(np.random.default_rng(5), B, R)
    mask[:2] = False
    for count in (masked.masked_count, masked.sequence_count):
        np.testing.assert_array_equal(
            on_devices(how, partial(count, axis_name=axis_of(how)), mask), np.full(8, count(mask))
        )


def test_gradient_of_a_mean(batch):
    x, mask = batch
    close(jax.grad(masked.masked_mean)(x, mask), mask / mask.sum())
    per_row = mask / np.maximum(mask.sum(axis=1, keepdims=True), 1) / mask.any(axis=1).sum()
    close(jax.grad(masked.sequence_mean)(x, mask), per_row)


@pytest.mark.parametrize(
    "function", [masked.masked_sum, masked.sequence_mean, masked.masked_whiten]
)
def test_shapes_must_match(function):
    with pytest.raises(AssertionError):
        function(jnp.ones((2, 3)), jnp.ones((2, 1), bool))


def test_sequence_mean_of_bfloat16_is_summed_in_float32():
    out = masked.sequence_mean(jnp.full((1, 300), 300.0, jnp.bfloat16), jnp.ones((1, 300), bool))
    assert out.dtype == jnp.float32 and out == 300


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
@pytest.mark.parametrize("function", [*FUNCTIONS.values(), lambda x, m: masked.masked_count(m)])
def test_masks_must_be_bool(function, dtype):
    """Averaging with weights instead of a mask would give a plausible but wrong number."""
    with pytest.raises(AssertionError):
        function(jnp.array([[2.0, 4.0, 9.0]]), np.array([[1, 1, 0]], dtype))


@pytest.mark.parametrize("constant", [10.3, 1000.1, -3e-5, 0.0, 7e8])
@pytest.mark.parametrize("shape", [(60, 50), (1, 3), (512, 200)])
def test_whitening_a_constant(constant, shape):
    """The mean is rounded, and the difference from it must not be scaled up."""
    x = np.full(shape, constant, np.float32)
    mask = np.ones(shape, bool)
    mask[-1, 1:] = False
    np.testing.assert_array_equal(masked.masked_var(x, mask), 0)
    np.testing.assert_array_equal(masked.masked_whiten(x, mask), 0)
    close(masked.masked_whiten(x, mask, shift_mean=False), np.where(mask, x, 0), rtol=1e-4)
    rounded = x * (1 + np.float32(2**-23) * (np.arange(shape[1]) % 2)).astype(np.float32)
    np.testing.assert_array_equal(masked.masked_whiten(rounded, mask), 0)
