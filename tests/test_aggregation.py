"""Test the weightings of tokens against numpy and over micro-batches."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from ppo_jax.ops.aggregation import SEQUENCE_SUM, TOKEN_SUM, constant_length

B, R = 9, 6
DIVISORS = {
    "token_sum": (TOKEN_SUM, lambda responses: 1),
    "sequence_sum": (SEQUENCE_SUM, lambda responses: responses),
    "constant_length": (constant_length(7.5), lambda responses: 7.5 * responses),
    "all_positions": (constant_length(), lambda responses: R * responses),
}


@pytest.mark.parametrize("name", DIVISORS)
def test_sums_and_their_divisors(name):
    aggregation, divisor = DIVISORS[name]
    rng = np.random.default_rng(0)
    x, mask = oracles.normal(rng, B, R), oracles.ragged_mask(rng, B, R, holes=True)
    mask[2] = False
    expected = sum(oracles.kept(x, mask)) / divisor(int(mask.any(axis=1).sum()))
    count = aggregation.count(mask)
    reduce = jax.jit(lambda x, mask: aggregation.mean(x, mask, count=count))
    parts = [reduce(x[rows], mask[rows]) for rows in (slice(0, 4), slice(4, B))]
    np.testing.assert_allclose([reduce(x, mask), sum(parts)], expected, rtol=1e-5)
    assert aggregation.count(jnp.zeros((3, R), bool)) > 0


def test_a_length_must_be_positive():
    with pytest.raises(ValueError, match="length must be positive"):
        constant_length(0)
