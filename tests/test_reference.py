"""A reference that moves: its parameters, when it moves, and that it is a part of a run's state."""

import dataclasses
import functools
import gc
import weakref
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import pytest
from helpers import (
    FULL_PPO,
    encode_rows,
    full_trainer,
    init_params,
    init_scorer,
    likes_b,
    slow_but,
    tiny_config,
    tiny_policy,
    word_tokenizer,
)

from ppo_jax.distributed import compilation
from ppo_jax.errors import SettingError
from ppo_jax.hashing import digest
from ppo_jax.models import heads, lora, sizes
from ppo_jax.models.transformer import language_model
from ppo_jax.plan.memory import estimate_memory
from ppo_jax.ppo import iteration
from ppo_jax.ppo.reference import follow_reference
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.ppo.state import Agent
from ppo_jax.reward_functions import TextReward
from ppo_jax.run.assembly import assemble
from ppo_jax.run.compare import compare
from ppo_jax.run.files import read_json, read_lines
from ppo_jax.run.forks import Fork, start_from
from ppo_jax.run.resume import RunConfig
from ppo_jax.run.settings import LoopConfig
from ppo_jax.run.state_arrays import arrays_of
from ppo_jax.run.trainer import Trainer

PPO = PPOConfig(batch_size=8, epochs=1, minibatches=2, max_new_tokens=6, learning_rate=1e-2)
PROMPTS = np.array([[7, 7, 3, 4], [7, 5, 6, 2], [1, 2, 3, 4], [7, 7, 7, 9]] * 2)
SPEC = lora.LoRA(rank=2, alpha=4.0, targets="attn/(q|o)$")
same = partial(jax.tree.map, np.testing.assert_array_equal)
close = partial(jax.tree.map, partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7))
with_ppo = partial(dataclasses.replace, PPO)

# --- the function ---


@pytest.mark.parametrize("dtype, rtol", [(np.float32, 1e-5), (ml_dtypes.bfloat16, 1e-2)])
@pytest.mark.parametrize("every, decay", [(1, 0.0), (1, 0.75), (3, 0.0), (3, 0.9)])
def test_the_reference_is_replaced_or_averaged(dtype, rtol, every, decay):
    rng = np.random.default_rng(0)
    draw = lambda: {"a": rng.normal(size=(3, 5)).astype(dtype), "b": {"c": np.ones(7, dtype)}}
    options = {"every": every, "decay": decay}
    follow = jax.jit(partial(follow_reference, **options))
    expected = draw()
    found = jax.tree.map(jnp.asarray, expected)
    for update in range(1, 8):
        policy = draw()
        found = follow(found, policy, jnp.int32(update))
        oracle = partial(oracles.follow_reference, update=update, **options)
        expected = jax.tree.map(oracle, expected, policy)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert x.dtype == y.dtype == dtype
            np.testing.assert_allclose(np.float32(x), np.float32(y), rtol=rtol, atol=rtol / 10)


def test_a_reference_that_is_the_policy_stays_the_policy():
    x = {"x": jax.random.normal(jax.random.key(0), (999,))}
    same(jax.jit(partial(follow_reference, decay=0.999))(x, x, 1), x)


def test_parameters_that_do_not_fit_are_refused():
    x = {"x": jnp.zeros(2)}
    with pytest.raises(AssertionError):
        follow_reference(x, {"x": jnp.zeros(3)}, 1)
    with pytest.raises(AssertionError):
        follow_reference(x, {"y": jnp.zeros(2)}, 1)
    with pytest.raises(ValueError, match="every=0 must be positive"):
        follow_reference(x, x, 1, every=0)


# --- the iteration ---


@functools.cache
def updates(ppo, *, count=4, adapters=False):
    """Run updates; return the states, the scores and the metrics of each update.

    `learn` donates its state, so the states are copies on the host. Tests with equal settings share
    the updates.
    """
    config = tiny_config(layers=1, init_std=0.3, lora_scale=SPEC.scale)
    agent = Agent(language_model(config), heads.separate_critic(config), ppo, (0,), 0)
    policy = init_params(config, jax.random.key(0))
    params, frozen = {"policy": policy, "critic": init_scorer(config, jax.random.key(1))}, None
    if adapters:
        params, frozen = lora.adapt(params, jax.random.key(3), SPEC)
    state = iteration.init_state(agent, params, jax.random.key(2), updates=count)
    steps, fixed = compilation.jit_steps(agent), None if ppo.moves_reference else policy
    states, all_scores, all_metrics = [jax.device_get(state.replace(key=None))], [], []
    for _ in range(count):
        rollout = steps.sample(state, PROMPTS, PROMPTS != 7, frozen=frozen)
        scores = steps.score(state, fixed, rollout, frozen=frozen)
        task = (np.asarray(rollout.responses) % 7 == 1).sum(axis=1).astype(np.float32)
        state, metrics = steps.learn(state, rollout, scores, task, frozen=frozen)
        states.append(jax.device_get(state.replace(key=None)))
        all_scores.append(jax.device_get(scores))
        all_metrics.append(jax.device_get(metrics))
    return states, all_scores, all_metrics


@pytest.mark.parametrize(
    "every, adapters", slow_but([(2, False), (2, True)], [(2, False), (2, True), (1, False)])
)
def test_the_kl_is_0_after_the_policy_has_replaced_the_reference(every, adapters):
    ppo = with_ppo(reference_every=every, kl_loss_coef=0.1)
    states, scores, metrics = updates(ppo, adapters=adapters)
    for update in range(4):
        reference = states[update - update % every].policy
        same(states[update].reference, reference)
        if update % every == 0:
            np.testing.assert_array_equal(scores[update].kl, 0)
            assert metrics[update]["objective/kl"] == 0
        else:
            assert np.abs(scores[update].kl).max() > 1e-3
        assert np.isfinite(metrics[update]["loss/kl"])
    assert jax.tree.structure(states[0].reference) == jax.tree.structure(states[0].policy)


@pytest.mark.slow
def test_a_decay_of_0_gives_the_same_bits_as_replacing_after_each_update():
    replaced = updates(with_ppo(reference_every=1, kl_loss_coef=0.1), adapters=False)
    averaged = updates(with_ppo(reference_decay=0.0, kl_loss_coef=0.1))
    same(averaged, replaced)


@pytest.mark.parametrize("adapters", slow_but([False], [False, True]))
def test_the_reference_is_the_average_of_the_policies_so_far(adapters):
    states, scores, _ = updates(with_ppo(reference_decay=0.7), adapters=adapters)
    average = states[0].policy
    for state in states[1:]:
        average = jax.tree.map(lambda x, y: 0.7 * x + 0.3 * y, average, state.policy)
        close(state.reference, average)
    kl = [np.abs(x.kl).max() for x in scores]
    assert kl[0] == 0 and min(kl[1:]) > 1e-3


def test_a_fixed_reference_is_no_part_of_the_state():
    """A checkpoint has the arrays that it had before references could move."""
    states, scores, _ = updates(PPO, count=2)
    assert states[-1].reference is None and "reference" not in arrays_of(states[-1])
    assert (scores[0].kl == 0).all() and (scores[1].kl != 0).any()


def test_scores_need_a_reference():
    config = tiny_config(layers=1)
    agent = Agent(language_model(config), heads.shared_critic(), PPO, (0,), 0)
    params = {"policy": init_params(config, jax.random.key(0)), "critic": {}}
    state = iteration.init_state(agent, params, jax.random.key(2), updates=1)
    with pytest.raises(ValueError, match="ref_params must be given"):
        iteration.score(agent, state, None, None)
    moving = agent._replace(config=with_ppo(reference_every=2), ref_model=agent.model)
    with pytest.raises(SettingError, match=r"reference_every=2 .* the agent has a ref_model"):
        iteration.init_state(moving, params, jax.random.key(2), updates=1)


# --- settings ---


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"reference_every": 0}, "reference_every must be positive, or none, but is 0"),
        ({"reference_decay": 1.0}, "reference_decay must lie in 0 .. 1 and be below 1"),
        ({"reference_decay": -0.1}, "reference_decay must lie in 0 .. 1 and be below 1"),
        ({"reference_every": 3, "kl_coef": 0.0}, "reference_every=3 .* kl_loss_coef are both 0"),
        ({"reference_decay": 0.9, "kl_coef": 0.0}, "reference_decay=0.9 .* are both 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(SettingError, match=message):
        PPOConfig(**changes)


def test_one_weight_of_the_kl_is_enough():
    assert PPOConfig(reference_every=3, kl_coef=0.0, kl_loss_coef=0.1).moves_reference
    assert PPOConfig(reference_decay=0.0).moves_reference and not PPOConfig().moves_reference


def learner_of(ppo, **options):
    return assemble(tiny_policy(layers=1), word_tokenizer(), ppo, critic="shared", **options)


def test_another_reference_cannot_move():
    ppo = with_ppo(reference_every=2)
    message = r"reference_every=2 .* leave out the other reference"
    with pytest.raises(SettingError, match=message):
        learner_of(ppo, reference=tiny_policy(layers=1))
    learner = learner_of(ppo)._replace(ref_params=tiny_policy(layers=1).params)
    with pytest.raises(SettingError, match=message):
        learner.check(encode_rows(["a b"], word_tokenizer(), ppo))


def test_adapters_that_are_trained_further_are_the_first_reference():
    lora_options = {"lora": SPEC, "adapters": {"any": jnp.zeros(2)}}
    assert learner_of(with_ppo(reference_every=2), **lora_options).ref_params is None
    assert "any" in learner_of(PPO, **lora_options).ref_params


# --- runs ---

MOVING = dataclasses.replace(FULL_PPO, reference_every=2, reference_decay=0.5, kl_loss_coef=0.1)


@pytest.mark.parametrize(
    "options",
    slow_but(
        [{"adapters": False}],
        [{"adapters": False}, {"adapters": True, "staleness": 1}, {"ppo": "every"}],
    ),
    ids=str,
)
def test_a_run_is_resumed_with_the_same_bits(tmp_path, options):
    """The checkpoint between two moves of the reference holds it."""
    if "ppo" in options:
        options = {"ppo": dataclasses.replace(FULL_PPO, reference_every=2), "save_every": 3}
    run = partial(full_trainer, **{"ppo": MOVING, "updates": 5, **options})
    whole = run(tmp_path / "whole")
    whole.run()
    seen = iter(range(4))
    half = run(tmp_path / "half")
    with pytest.raises(StopIteration):  # ends in the fifth update without saving
        half.run(on_update=lambda _: next(seen))
    again = run(tmp_path / "half", resume="yes")
    assert int(again.state.update) == options.get("save_every", 4)
    again.run()
    assert digest(arrays_of(again.state)) == digest(arrays_of(whole.state))
    assert compare(whole.out, again.out) == []
    assert digest(whole.state.reference) != digest(whole.state.policy)
    rows = read_lines(whole.out / "metrics.jsonl")
    kl = [row["objective/kl"] for row in rows if "objective/kl" in row]
    assert len(kl) == 5 and abs(kl[1]) > 1e-3


def test_a_change_of_the_reference_is_refused_on_resume(tmp_path):
    full_trainer(tmp_path / "run", ppo=MOVING, updates=1).run()
    ppo = dataclasses.replace(MOVING, reference_decay=0.9)
    with pytest.raises(ValueError, match=r"ppo.reference_decay was 0.5 .* and is 0.9 now"):
        full_trainer(tmp_path / "run", ppo=ppo, updates=2, resume="yes")


@pytest.mark.slow
def test_a_fork_keeps_a_reference_that_moves(tmp_path):
    """If only one of the runs moves it, the new run has the reference that it starts with."""
    runs = {
        name: full_trainer(tmp_path / name, ppo=ppo, updates=2, eval_every=0)
        for name, ppo in {"fixed": FULL_PPO, "moving": MOVING}.items()
    }
    start = {name: jax.device_get(run.state.reference) for name, run in runs.items()}
    ends = {name: run.run() for name, run in runs.items()}
    for name in runs:
        for other, ppo in {"fixed": FULL_PPO, "moving": MOVING}.items():
            new = full_trainer(tmp_path / f"{name}-{other}", ppo=ppo, updates=4)
            read = read_json(new.out / "config.json")
            config = RunConfig(read["settings"], read["hashes"])
            state, _ = start_from(Fork(runs[name].out), new.state, config, updates=4)
            same(state.policy, ends[name].policy)
            kept = ends if (name, other) == ("moving", "moving") else None
            same(state.reference, kept["moving"].reference if kept else start[other])


def test_no_copy_of_the_initial_policy_stays_in_memory(tmp_path):
    def start(ppo, name):
        learner = learner_of(ppo)
        prompts = learner.encode([{"prompt": "a b"}])
        arguments = {"out": tmp_path / name, "loop": LoopConfig(updates=1, tensorboard=False)}
        trainer = Trainer(learner, prompts, TextReward(likes_b), **arguments)
        return weakref.ref(learner.params["policy"]["embedding"]), trainer

    kept, fixed = start(PPO, "fixed")
    gone, moving = start(with_ppo(reference_every=1), "moving")
    gc.collect()
    assert gone() is None and kept() is fixed.collector.ref_params["embedding"]
    assert moving.learner.encode([{"prompt": "c"}]).tokens.shape == (1, 1)
    moving.step()
    moving.log.close(), moving.checkpoints.close()


def test_the_estimate_of_memory_counts_the_reference_once():
    estimate = partial(
        estimate_memory, sizes.gpt3("gpt3-125m"), prompt_tokens=64, critic="separate"
    )
    moving = PPOConfig(reference_every=1)
    assert estimate(moving, adapters=None) == estimate(PPOConfig(), adapters=None)
    key = "parameters and reference"
    more, less = (estimate(ppo, adapters=SPEC) for ppo in (moving, PPOConfig()))
    assert more[key] - less[key] == pytest.approx(less["gradients"] / 2, rel=0.01)
