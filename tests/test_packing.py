"""Sequences in bins: where they lie, and that nothing that is computed from them changes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from helpers import LOSS, init_params, init_scorer, on_devices, small_problem

from ppo_jax.data import Prompts
from ppo_jax.errors import SettingError
from ppo_jax.models import heads
from ppo_jax.models.config import Rotary, TransformerConfig
from ppo_jax.models.transformer import language_model
from ppo_jax.ops.kl import kl_full, kl_k1
from ppo_jax.ops.masked import BY_SEQUENCE, BY_TOKEN
from ppo_jax.ops.score_rules import ScoreAt
from ppo_jax.ppo import iteration
from ppo_jax.ppo.batching import map_chosen
from ppo_jax.ppo.forward import forward_packed, forward_responses
from ppo_jax.ppo.gradients import minibatch_gradient
from ppo_jax.ppo.loss import ppo_loss_fn
from ppo_jax.ppo.packing import BLOCK, Bins, check_packing, pack_rows, place_rows, sum_bins
from ppo_jax.ppo.scoring import score_rollout
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.ppo.state import Agent
from ppo_jax.ppo.update import ppo_update
from ppo_jax.run.assembly import Learner
from ppo_jax.run.settings import LoopConfig
from ppo_jax.run.trainer import Trainer
from ppo_jax.types import Experience, Rollout

LENGTH = 5 * BLOCK


def first_fit(lengths, count):
    """Return the bin and the start of each row, and which rows fit, by the rule in its words."""
    filled, found = [0] * count, {}
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i] // BLOCK):
        size = -(-int(lengths[row]) // BLOCK) * BLOCK
        if size:
            bins = [b for b in range(count) if filled[b] + size <= LENGTH]
            found[row] = (bins[0], filled[bins[0]]) if bins else None
            if bins:
                filled[bins[0]] += size
    return found, sum(x > 0 for x in filled)


@pytest.mark.parametrize("seed", range(5))
def test_each_sequence_lies_in_the_first_bin_with_room(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, LENGTH + 1, 12) * rng.integers(0, 2, 12)
    place = jax.jit(functools.partial(place_rows, length=LENGTH, count=12))(jnp.asarray(lengths))
    found, used = first_fit(lengths, 12)
    assert int(place.used) == used and bool(place.fits.all())
    assert {row: (int(place.bins[row]), int(place.starts[row])) for row in found} == found
    few, one = first_fit(lengths, 1)[0], place_rows(jnp.asarray(lengths), length=LENGTH, count=1)
    assert [row for row in few if few[row]] == [row for row in few if one.fits[row]]
    # The rows of two bins are placed in the same way alone.
    chosen = place.bins // 2 == 1
    alone = place_rows(jnp.where(chosen, lengths, 0), length=LENGTH, count=2)
    for row in found:
        if chosen[row]:
            assert (int(alone.bins[row]) + 2, int(alone.starts[row])) == found[row]


def test_rows_come_back_from_the_bins():
    rng = np.random.default_rng(0)
    first, last = rng.integers(0, 4, (6, 1)), rng.integers(5, 10, (6, 1))
    mask = (np.arange(10) >= first) & (np.arange(10) <= last) & (np.arange(6)[:, None] != 2)
    x = rng.normal(size=(6, 10, 3)).astype(np.float32)
    packing = pack_rows(jnp.asarray(mask), Bins(2 * BLOCK, 3))
    packed = packing.pack(jnp.asarray(x))
    assert packed.shape == (3, 2 * BLOCK, 3) and int((packing.segments < 6).sum()) == mask.sum()
    np.testing.assert_array_equal(
        np.where(mask[..., None], packing.unpack(packed), 0), x * mask[..., None]
    )
    for row in (0, 5):  # before and after the tokens there is a copy of the first and the last one
        nearest = np.clip(np.arange(10), first[row], last[row])
        np.testing.assert_array_equal(packing.unpack(packed)[row], x[row, nearest])
    assert jnp.isnan(pack_rows(jnp.ones((3, 9), bool), Bins(BLOCK, 2)).unpack(packed)[2]).all()


def test_the_loop_takes_as_many_steps_as_there_are_bins():
    mask = jnp.arange(BLOCK)[None] < jnp.array([[9], [0], [BLOCK], [1], [30]])
    steps = lambda number: sum_bins(
        lambda rows: jnp.array([1, rows.sum()]), mask, Bins(128, number)
    )
    assert steps(1).tolist() == [2, 4] and steps(3).tolist() == [1, 4]


PLAIN = TransformerConfig(
    vocab_size=97, positions=18, width=32, layers=2, heads=4, mlp_width=64, init_std=0.2
)
GEMMA = dataclasses.replace(
    PLAIN,
    learned_positions=False,
    rotary=Rotary(width=8, base=1e4),
    local_rotary=Rotary(width=8, base=100.0),
    windows=(3, None),
)


def forward(config, tokens, mask, bins=None, **options):
    model, critic = language_model(config), heads.separate_critic(config)
    params = {
        "policy": init_params(config, jax.random.key(0)),
        "critic": init_scorer(config, jax.random.key(1)),
    }
    by = forward_responses if bins is None else functools.partial(forward_packed, bins=bins)
    compute = lambda tokens, mask: by(
        model, critic, params, tokens, mask, 6, temperature=0.7, **options
    )
    return jax.jit(compute, compiler_options={"xla_allow_excess_precision": False})(tokens, mask)


@pytest.mark.parametrize("config, chunk", [(PLAIN, None), (GEMMA, 5)], ids=["learned", "windows"])
def test_a_packed_pass_equals_that_of_the_rows(config, chunk):
    batch = small_problem()[3]
    rows = batch.tokens[:6], batch.mask[:6]
    got = forward(config, *rows, Bins(3 * BLOCK, 2), chunk=chunk)
    want = forward(config, *rows)
    real = rows[1][:, 6:]
    steps = jnp.concatenate([real[:, :1], real[:, :-1]], axis=1)  # and the one after the last token
    np.testing.assert_allclose(got.logprobs, jnp.where(real, want.logprobs, 0), atol=3e-6)
    np.testing.assert_allclose(got.entropies, jnp.where(real, want.entropies, 0), atol=3e-6)
    np.testing.assert_allclose(*(jnp.where(steps, x.values, 0) for x in (got, want)), atol=3e-6)


@pytest.mark.parametrize("dtype, bound", [(jnp.float32, 1e-6), (jnp.bfloat16, 2e-3)])
def test_neighbours_change_no_number_of_a_sequence(dtype, bound):
    batch, config = small_problem()[3], dataclasses.replace(PLAIN, dtype=dtype)
    bins = Bins(4 * BLOCK)
    alone = forward(
        config, batch.tokens, batch.mask & (jnp.arange(len(batch.mask)) == 5)[:, None], bins
    )
    for rows in ([1, 2, 3, 5], [5, 7], [0, 4, 5, 6]):
        chosen = jnp.isin(jnp.arange(len(batch.mask)), jnp.array(rows))[:, None]
        among = forward(config, batch.tokens, batch.mask & chosen, bins)
        np.testing.assert_allclose(among.logprobs[5], alone.logprobs[5], atol=bound)


def rescored(dtype, bins):
    """Return the small problem with log-probs of passes in these bins, or unpacked without."""
    model, critic, params, made = small_problem(dtype)
    rollout = Rollout(made.tokens, made.mask, made.response_mask, made.logprobs, made.mask[:, 0])
    score = lambda params, rollout: score_rollout(
        model, critic, params, params["policy"], rollout, temperature=0.7, bins=bins
    )
    options = {"xla_allow_excess_precision": False}
    scores = jax.jit(score, compiler_options=options)(params, rollout)
    return made.replace(
        logprobs=scores.logprobs, values=jnp.where(made.value_mask, scores.values, 0)
    )


def update(bins, dtype=jnp.float32, *, aggregation=BY_TOKEN, tx=None, on=None, **options):
    model, critic, params, _ = small_problem(dtype)
    by = {"temperature": 0.7, "aggregation": aggregation}
    loss_fn = ppo_loss_fn(model, critic, *LOSS, **by, bins=bins)
    tx = optax.sgd(0.05) if tx is None else tx
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    options = {"epochs": 2, "minibatches": 2, "bins": bins} | options
    learn = functools.partial(ppo_update, loss_fn=loss_fn, aggregation=aggregation, **options)
    made = rescored(dtype, bins)
    if on is None:
        options = {"xla_allow_excess_precision": False}
        return jax.jit(learn, compiler_options=options)(state, made, jax.random.key(2))
    spread = lambda *leaves: learn(
        state,
        jax.tree.unflatten(jax.tree.structure(made), leaves),
        jax.random.key(2),
        axis_name="devices",
    )
    new, metrics = on_devices(on, spread, *jax.tree.leaves(made))
    return jax.tree.map(lambda x: x[3], (new, metrics))


def assert_same(found, wanted):
    for x, y in zip(*(jax.tree.leaves(state.params) for state, _ in (found, wanted)), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    for name, x in wanted[1].items():
        if not name.startswith("policy/first"):
            np.testing.assert_allclose(found[1][name], x, rtol=1e-4, atol=2e-6, err_msg=name)


@pytest.mark.slow
def test_a_packed_update_equals_that_of_the_rows():
    options = {"aggregation": BY_SEQUENCE, "target_kl": 1e-3, "tx": optax.sgd(0.5)}
    assert_same(update(Bins(2 * BLOCK, 2), **options), update(None, **options))


@pytest.mark.slow
@pytest.mark.parametrize("dtype, bound", [(jnp.float32, 2e-6), (jnp.bfloat16, 5e-3)])
def test_the_first_ratio_of_packed_rows_is_one(dtype, bound):
    _, metrics = update(Bins(3 * BLOCK), dtype, tx=optax.adam(3e-3), epochs=4)
    assert metrics["policy/first_ratio_error_max"] <= bound
    assert metrics["policy/first_clipfrac"] == 0 and metrics["policy/clipfrac"] > 0.01


@pytest.mark.slow
def test_shards_pack_their_own_rows():
    assert_same(update(Bins(2 * BLOCK), on="shard_map"), update(None))


@pytest.mark.slow
def test_a_kl_estimator_may_read_the_logits_of_packed_rows():
    model, critic, params, made = small_problem()
    reference = jax.tree.map(lambda x: x * 1.1, params["policy"])
    rollout = Rollout(made.tokens, made.mask, made.response_mask, made.logprobs, made.mask[:, 0])
    for estimator in (kl_full, kl_k1):
        kl, same = (
            score_rollout(
                model,
                critic,
                params,
                reference,
                rollout,
                temperature=0.7,
                kl_estimator=estimator,
                bins=bins,
            ).kl
            for bins in (Bins(3 * BLOCK), None)
        )
        np.testing.assert_allclose(kl, same, atol=1e-5)
        assert abs(kl).max() > 0.01


@pytest.mark.parametrize("multiple, full", [(1, 4), (2, 2)])
def test_full_rows_fit_the_shortest_bins(multiple, full):
    """The last token of a row is not computed, so a bin may be one shorter than a full row."""
    length = multiple * BLOCK
    config = dataclasses.replace(PLAIN, positions=length + 1, layers=1)
    model, critic = language_model(config), heads.shared_critic()
    policy = init_params(config, jax.random.key(0))
    params = {"policy": policy, "critic": {"head": heads.zero_head(32)}}
    tokens = jax.random.randint(jax.random.key(1), (4, length + 1), 0, 97)
    mask = (jnp.arange(4)[:, None] < full) | (jnp.arange(length + 1)[None] < 9)
    x = jnp.ones((4, length - 1))
    rollout = Rollout(tokens, mask, mask[:, 2:], x, mask[:, 0])
    batch = Experience(tokens, mask, mask[:, 2:], mask[:, 2:], -x, x, x, x)
    bins = Bins(length)
    check_packing(model, critic, bins, length + 1)

    def numbers(bins):
        by = {"temperature": 0.7, "bins": bins}
        scores = score_rollout(model, critic, params, policy, rollout, **by)
        loss_fn = ppo_loss_fn(model, critic, *LOSS, **by)
        gradient, _ = minibatch_gradient(loss_fn, params, batch, bins=bins)
        return scores.logprobs, scores.entropies, gradient

    packed, rows = (jax.jit(numbers, static_argnums=0)(x) for x in (bins, None))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=3e-6), packed, rows)
    with pytest.raises(ValueError, match=f"length={length} must .* hold {length + 1} tokens"):
        sum_bins(jnp.sum, mask, bins)


def test_sampling_needs_no_model_that_can_be_packed():
    """Nor does it need as many prompts as slots."""
    model, critic = language_model(PLAIN), heads.shared_critic()
    hidden = lambda params, tokens, mask, cache=None, last=None: model.hidden(
        params, tokens, mask, cache, last
    )
    config = PPOConfig(batch_size=8, pack=64, rollout_slots=4, max_new_tokens=3)
    agent = Agent(model._replace(hidden=hidden), critic, config, (0,), 0)
    policy = init_params(PLAIN, jax.random.key(0))
    params = {"policy": policy, "critic": {"head": heads.zero_head(32)}}
    state = iteration.init_state(agent, params, jax.random.key(1), updates=1)
    prompts = jnp.ones((2, 5), int)
    rollout = jax.eval_shape(
        functools.partial(iteration.sample, agent), state, prompts, prompts > 0
    )
    assert rollout.response_mask.shape == (2, 3)
    with pytest.raises(SettingError, match=r"pack=64 needs a model\.hidden function"):
        iteration.score(agent, state, policy, rollout)


def test_what_cannot_be_packed_is_refused(tmp_path):
    for setting in ({"pack": 100}, {"pack": 0}, {"pack": 128, "score_at": ScoreAt.LAST_INDEX}):
        with pytest.raises(SettingError, match=f"pack.*{setting['pack']}"):
            PPOConfig(**setting)
    with pytest.raises(SettingError, match=r"micro_batch=3 must divide"):
        PPOConfig(micro_batch=3)
    assert PPOConfig(micro_batch=3, pack=128).bins == Bins(128, 3)  # Bins need not divide rows.
    model, critic = language_model(PLAIN), heads.shared_critic()
    check_packing(model, critic, Bins(128), 129)
    with pytest.raises(SettingError, match=r"pack=128 must be at least 192 to hold .* 130 tokens"):
        check_packing(model, critic, Bins(128), 130)
    no_segments = lambda params, tokens, mask, cache=None, last=None: (tokens, cache)
    with pytest.raises(SettingError, match=r"pack=128 needs a model\.hidden function that takes"):
        check_packing(model._replace(hidden=no_segments), critic, Bins(128), 10)
    with pytest.raises(SettingError, match="pack=128 needs a critic function that takes segments"):
        check_packing(model, lambda params, hidden, tokens, mask: hidden, Bins(128), 10)
    learner = Learner(
        Agent(model, critic, PPOConfig(max_new_tokens=70, pack=64), (0,), 0), {}, tokenizer=None
    )
    prompts = Prompts([{"prompt": "a"}] * 64, np.ones((64, 2), np.int32), np.ones((64, 2), bool))
    with pytest.raises(SettingError, match="pack=64 must be at least 128"):
        Trainer(learner, prompts, None, out=tmp_path / "run", loop=LoopConfig(updates=1))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="not both"):
        model.hidden(
            init_params(PLAIN, jax.random.key(0)),
            jnp.ones((1, 2), int),
            jnp.ones((1, 2), bool),
            model.init_cache(1, 4),
            segments=jnp.ones((1, 2), int),
        )


def test_parts_without_a_chosen_entry_are_left_out_for_each_shard_of_the_rows():
    """Shards are mapped by `jax.vmap`, which computes both branches of a condition that differs."""
    x = jnp.arange(1.0, 9.0).reshape(2, 4)
    chosen = x > jnp.array([[3.0], [5.0]])

    def roots(x):
        return jax.vmap(lambda chosen, x: map_chosen(jnp.sqrt, chosen, x, size=1))(chosen, x)

    found, gradient = jax.value_and_grad(lambda x: roots(x).sum())(x)
    np.testing.assert_allclose(found, np.sqrt(x)[chosen].sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient, jnp.where(chosen, 0.5 / jnp.sqrt(x), 0), rtol=1e-6)
    assert "cond[" in str(jax.make_jaxpr(roots)(x))
