"""Attention in long sequences equals the softmax, and its memory is linear in their length."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from flax.training.train_state import TrainState
from helpers import LOSS

from experiments.benchmarks import work as work_
from ppo_jax import (
    Bins,
    TransformerConfig,
    gae,
    init_params,
    init_scorer,
    language_model,
    make_experience,
    matmul_flops,
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
from ppo_jax.types import Rollout

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


CONFIG = TransformerConfig(
    vocab_size=31,
    positions=1280,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    mlp_width=32,
    init_std=0.4,
    rotary=Rotary(width=4, base=1e4),
    windows=(None, 90),
)
TOKENS = jax.random.randint(jax.random.key(6), (2, 140), 0, 31)


def states(tokens, mask, last, segments=None):
    """Return hidden states, and a gradient that depends on those of the last real positions."""
    model, params = language_model(CONFIG), init_params(CONFIG, jax.random.key(5))
    weight = jax.random.normal(jax.random.key(7), (1, 130, 16))

    def total(params):
        hidden, _ = model.hidden(params, tokens, mask, last=last, segments=segments)
        return jnp.sum(hidden[:, :130] * weight), hidden[:, :130]

    return jax.jit(jax.grad(total, has_aux=True))(params)


def test_padding_to_eight_positions_does_not_decide_the_form():
    long = [attention.is_long(n) for n in range(1000, 1040)]
    assert long == [attention.is_long(-(-n // 8) * 8) for n in range(1000, 1040)]
    assert long == [-(-n // 8) * 8 >= 1024 for n in range(1000, 1040)]


@pytest.mark.slow
def test_padding_up_to_the_long_form_changes_no_state():
    gradient, hidden = states(TOKENS, TOKENS >= 0, 130)
    long = jnp.pad(TOKENS, ((0, 0), (attention.LONG, 0)))
    mask = jnp.arange(long.shape[1])[None] >= attention.LONG + 0 * long
    long_gradient, long_hidden = states(long, mask, 130)
    np.testing.assert_allclose(long_hidden, hidden, atol=3e-6)
    jax.tree.map(lambda a, b: assert_near([a], [b], 2e-5), long_gradient, gradient)


def test_a_long_prompt_fills_the_cache_as_a_short_one_does():
    model, params = language_model(CONFIG), init_params(CONFIG, jax.random.key(5))
    read = jax.jit(model.hidden, static_argnames="last")
    hidden, _ = read(params, TOKENS, TOKENS >= 0, last=1)
    long = jnp.pad(TOKENS, ((0, 0), (attention.LONG - 40, 0)))
    mask = jnp.arange(long.shape[1])[None] >= attention.LONG - 40 + 0 * long
    cache = model.init_cache(2, long.shape[1])
    _, cache = read(params, long[:, :-1], mask[:, :-1], cache, last=1)
    decoded, _ = read(params, long[:, -1:], mask[:, -1:], cache)
    np.testing.assert_allclose(decoded, hidden, atol=3e-6)


def learned(dtype, bins):
    """Return the metrics of an update on sequences of more than `attention.LONG` tokens."""
    config = dataclasses.replace(CONFIG, dtype=dtype)
    model, critic = language_model(config), separate_critic(config)
    params = {
        "policy": init_params(config, jax.random.key(0)),
        "critic": init_scorer(config, jax.random.key(1)),
    }
    tokens = jax.random.randint(jax.random.key(2), (4, 1100), 0, 31)
    ends = jnp.array([[1100], [700], [300], [500]])
    mask = (jnp.arange(1100)[None] >= jnp.array([[0], [130], [3], [90]])) & (
        jnp.arange(1100)[None] < ends
    )
    real = mask[:, 200:]
    rollout = Rollout(tokens, mask, real, jnp.zeros(real.shape), mask[:, 0])
    by = {"temperature": 0.7, "bins": bins}
    loss_fn = ppo_loss_fn(model, critic, *LOSS, **by)
    state = TrainState.create(apply_fn=None, params=params, tx=optax.sgd(0.05))

    def run(state, rollout):
        scores = score_rollout(
            model, critic, state.params, params["policy"], rollout, micro_batch=2, **by
        )
        experience, _ = make_experience(
            rollout, scores, jnp.arange(4.0), kl_coef=0.1, advantage_fn=gae(gamma=1.0, lam=0.95)
        )
        return experience

    options = {"compiler_options": {"xla_allow_excess_precision": False}}
    experience = jax.jit(run, **options)(state, rollout)
    learn = functools.partial(ppo_update, loss_fn=loss_fn, epochs=1, minibatches=2, bins=bins)
    return jax.jit(learn, **options)(state, experience, jax.random.key(3))[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, bins, bound",
    [(jnp.float32, None, 2e-6), (jnp.bfloat16, None, 5e-3), (jnp.bfloat16, Bins(1152), 5e-3)],
)
def test_the_first_ratio_of_long_sequences_is_one(dtype, bins, bound):
    assert learned(dtype, bins)["policy/first_ratio_error_max"] <= bound


@pytest.mark.slow
def test_memory_of_scoring_and_update_is_linear_in_the_length():
    def temporary(length):
        work = work_.Work(
            layers=1,
            width=16,
            heads=4,
            vocab_size=8,
            positions=length,
            prompts=2,
            prompt_tokens=length // 4,
            new_tokens=length * 3 // 4,
            epochs=1,
            minibatches=1,
        )
        programs, shapes = work_.programs(work), work_.shapes(work)
        compiled = [getattr(programs, x).lower(*shapes[x]).compile() for x in ("score", "learn")]
        return [x.memory_analysis().temp_size_in_bytes for x in compiled]

    short, long = temporary(1024), temporary(4096)
    assert all(b < 4.4 * a for a, b in zip(short, long, strict=True)), (short, long)


def test_a_function_on_shards_gets_the_rows_and_heads_of_one_device():
    mesh, shapes = meshes.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}), []

    def scaled(x, by):
        shapes.append((x.shape, by.shape))
        return x * by[:, None, None]

    x, by = jnp.arange(64.0).reshape(8, 4, 2), jnp.arange(8.0)
    with jax.set_mesh(mesh):
        out = jax.jit(lambda x, by: splash_attention.on_shards(scaled, (x,), (by,)))(x, by)
    np.testing.assert_array_equal(out, x * by[:, None, None])
    assert shapes == [((2, 2, 2), (2,))]


def test_flops_of_the_kernel_count_all_pairs():
    x, ids = jnp.ones((2, 4, 1024, 64)), jnp.zeros((2, 1024), jnp.int32)
    forward = functools.partial(attention.splash_attention, visible=Visible(ids, ids), cap=None)
    assert matmul_flops(forward, x, x, x) == 2 * 2 * 2 * 4 * 1024 * 1024 * 64
