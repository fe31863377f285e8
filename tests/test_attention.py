"""Attention in long sequences equals the softmax, and its memory is linear in their length."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from experiments.benchmarks import work as work_
from flax.training.train_state import TrainState

from ppo_jax import (
    Bins,
    TransformerConfig,
    gae,
    init_params,
    init_scorer,
    language_model,
    make_experience,
    ppo_loss_fn,
    ppo_update,
    score_rollout,
    separate_critic,
)
from ppo_jax.distributed import meshes
from ppo_jax.models import attention, blockwise_attention, splash_attention
from ppo_jax.models.config import Rotary
from ppo_jax.models.visible import PADDING, Visible
from ppo_jax.ppo import packing
from ppo_jax.sharding import on_shards
from ppo_jax.types import Rollout
from test_packing import LOSS

LONG = 290  # three blocks of keys
CASES = {
    "padding on the left": {"padding": (17, 0)},
    "key heads for two query heads each": {"K": 2},
    "one key head": {"K": 1},
    "a window": {"window": 40},
    "a window of more than a block": {"window": 200, "padding": (0, 100)},
    "a soft cap": {"cap": 1.5},
    "segments": {"segments": (0, 100, 128), "padding": (150, 0)},
    "later slots too": {"causal": False, "padding": (0, 9)},
    "a window to both sides": {"causal": False, "window": 60, "segments": (0, 140)},
    "the last queries": {"S": 21},
    "slots behind the queries": {"S": 160, "start": 90},
    "everything": {"K": 2, "window": 99, "cap": 2.0, "segments": (0, 256), "padding": (3, 200)},
}


def problem(
    dtype=jnp.float32,
    *,
    K=4,
    S=LONG,
    C=8,
    window=None,
    cap=None,
    segments=(0,),
    padding=(0, 0),
    causal=True,
    start=None,
):
    """Return queries, keys, values, what queries see, the cap and weights of the results."""
    shapes = ((2, 4, S, C), (2, K, LONG, C), (2, K, LONG, C), (2, 4, S, C))
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weight = (
        jax.random.normal(x, shape, dtype) for x, shape in zip(keys, shapes, strict=True)
    )
    slots = np.arange(LONG)
    ids = np.tile(np.searchsorted(segments, slots, side="right").astype(np.int32), (2, 1))
    ids[slots[None] < np.array(padding)[:, None]] = PADDING
    first = LONG - S if start is None else start
    visible = Visible(
        queries=jnp.asarray(ids[:, first : first + S]),
        keys=jnp.asarray(ids),
        start=None if start is None else jnp.int32(start),
        offset=first if start is None else 0,
        window=window,
        causal=causal,
    )
    real = visible.queries != PADDING
    return q, k, v, visible, cap, jnp.where(real[:, None, :, None], weight, 0)


def plain(q, k, v, visible, *, cap):
    """Compute `attend_long` by the matrix of all logits."""
    (B, H, S, C), K = q.shape, k.shape[1]
    allowed = jnp.tile(visible.matrix(), (1, H // K, 1))
    return attention.attend(q.reshape(B, K, -1, C), k, v, allowed, cap=cap).reshape(B, H, S, C)


def with_gradients(form, q, k, v, visible, cap, weight):
    """Return the weighted results of real queries, and the gradients of their sum."""

    def total(q, k, v):
        out = jnp.where(weight == 0, 0, form(q, k, v, visible, cap=cap))
        return jnp.sum(out.astype(jnp.float32) * weight), out

    gradients, out = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(x, np.float32) for x in (out, *gradients)]


def assert_near(got, want, bound):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=bound * max(1, np.abs(b).max()))


@pytest.mark.parametrize("case", CASES)
def test_blocks_give_the_softmax_and_its_gradient(case):
    q, k, v, visible, cap, weight = problem(**CASES[case])
    got = with_gradients(attention.attend_long, q, k, v, visible, cap, weight)
    seen = np.asarray(visible.matrix())
    want = oracles.attention(q, k, v, seen, weight, cap)
    assert_near(got, [np.where(weight == 0, 0, want[0]), *want[1:]], 3e-6)
    assert_near(got, with_gradients(plain, q, k, v, visible, cap, weight), 3e-6)


def test_blocks_in_bfloat16_are_as_exact_as_the_plain_form():
    given = problem(jnp.bfloat16, **CASES["everything"])
    q, k, v, visible, cap, weight = given
    exact = oracles.attention(q, k, v, np.asarray(visible.matrix()), weight, cap)
    exact = [np.where(weight == 0, 0, exact[0]), *exact[1:]]
    errors = [
        [np.abs(a - b).max() for a, b in zip(with_gradients(form, *given), exact, strict=True)]
        for form in (attention.attend_long, plain)
    ]
    assert all(blocks <= 1.5 * matrix for blocks, matrix in zip(*errors, strict=True))


@pytest.mark.parametrize("case", ["everything", "the last queries"])
def test_the_kernel_of_tpus_gives_the_same(case):
    q, k, v, visible, cap, weight = problem(C=16, **CASES[case])
    form = functools.partial(splash_attention.splash_attention, interpret=True)
    got = with_gradients(form, q, k, v, visible, cap, weight)
    assert_near(got, with_gradients(plain, q, k, v, visible, cap, weight), 3e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_neighbours_and_place_change_no_bit(dtype):
    assert packing.LONG_BLOCK % blockwise_attention.KEYS == 0
    q, k, v, _, _, _ = problem(dtype)
    length = LONG - packing.LONG_BLOCK
    found = []
    for at in (0, packing.LONG_BLOCK):
        place = lambda x, at=at: x.at[:, :, at : at + length].set(x[:, :, :length])
        ids = jnp.zeros((2, LONG), jnp.int32).at[:, at : at + length].set(1)
        arrays = (q, k, v) if at == 0 else map(place, (q, k, v))
        out = jax.jit(attention.attend_long, static_argnames="cap")(
            *arrays, Visible(ids, ids), cap=None
        )
        found.append(out[:, :, at : at + length])
    np.testing.assert_array_equal(*found)
