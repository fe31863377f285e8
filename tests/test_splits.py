"""Chunks, micro-batches, device shards and padding of a batch change no result."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from helpers import FULL_PPO, full_trainer, has_zero_gradient, init_params, init_scorer, slow_but
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ppo_jax.distributed import compilation
from ppo_jax.models import heads, lora
from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.transformer import language_model
from ppo_jax.ppo import iteration
from ppo_jax.ppo.choices import Importance
from ppo_jax.ppo.optimizers import policy_optimizer
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.run.files import read_lines

CONFIG = TransformerConfig(
    vocab_size=61, positions=40, width=32, layers=1, heads=4, mlp_width=64, init_std=0.2
)
PPO = PPOConfig(
    batch_size=32,
    epochs=2,
    minibatches=2,
    max_new_tokens=10,
    learning_rate=1e-4,
    kl_coef=0.1,
    kl_target=0.5,
    scale_scores=True,
    vf_coef=0.5,
    temperature=0.8,
)

SGD = optax.sgd(0.05)

# Compiled one by one, so that cases that share a step find it in the cache.
sample, score, learn = (
    jax.jit(step, static_argnums=0, compiler_options=compilation.COMPILER_OPTIONS)
    for step in (iteration.sample, iteration.score, iteration.learn)
)


@functools.cache
def draw_prompts(number):
    """Return prompts, and the position of the first real token of each."""
    key = jax.random.key(10 + number)
    draw = jax.random.randint(key, (32, 6), 0, 61), jax.random.randint(key, (32, 1), 0, 5)
    return jax.device_get(draw)


@jax.jit
def task_scores(rollout):
    return (rollout.responses % 7 == 1).sum(axis=1).astype(jnp.float32)


def three_updates(optimizer, *, devices=1, extra_padding=0, adapters=False, **changes):
    """Return samples `[3, B, R]`, parameters after three updates, and optimizer steps of each."""
    ppo = PPOConfig(**{**vars(PPO), **changes})
    config = dataclasses.replace(CONFIG, lora_scale=4.0) if adapters else CONFIG
    agent = iteration.Agent(language_model(config), heads.separate_critic(config), ppo, (3, 4), 0)
    policy, frozen = init_params(config, jax.random.key(0)), None
    params = {
        "policy": policy,
        "critic": init_scorer(config, jax.random.key(1), trunk=policy),
    }
    if adapters:
        params, frozen = lora.adapt(params, jax.random.key(3), lora.LoRA(rank=2, alpha=8.0))
    state = iteration.init_state(agent, params, jax.random.key(2), updates=3)
    tx = SGD if optimizer == "sgd" else policy_optimizer(ppo, 3)
    state = state.replace(
        train=TrainState.create(apply_fn=None, params=params, tx=tx).replace(step=jnp.int32(0))
    )
    length = 6 + extra_padding
    mesh = jax.make_mesh(
        (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    state, policy, frozen = (put(tree, PartitionSpec()) for tree in (state, policy, frozen))
    samples, steps = [], []
    for number in range(3):
        prompts, first = draw_prompts(number)
        prompts = np.pad(prompts, ((0, 0), (extra_padding, 0)))
        real = np.arange(length) >= extra_padding + first
        batch = put((prompts, real), PartitionSpec("data"))
        rollout = sample(agent, state, *batch, frozen=frozen)
        scores = score(agent, state, policy, rollout, frozen=frozen)
        task = task_scores(rollout)
        state, metrics = learn(agent, state, rollout, scores, task, frozen=frozen)
        samples.append(np.where(rollout.response_mask, rollout.responses, -1))
        steps.append(float(metrics["optimizer/steps"]))
    return np.stack(samples), jax.device_get(state.train.params), steps


@functools.cache
def without_split(optimizer, **all_on):
    return three_updates(optimizer, **all_on)


# Sampling, and scoring and learning, are split in ways of their own, so one case has two splits.
SPLITS = [
    {"rollout_slots": 5, "micro_batch": 4},
    {"rollout_rows": 1, "micro_batch": 8, "logit_chunk": 3},
    {"devices": 2, "extra_padding": 7},
    {"devices": 8, "micro_batch": 8, "rollout_rows": 16, "rollout_slots": 8, "extra_padding": 2},
    {"pack": 256, "devices": 4},
]
PACKED = {"pack": 192, "micro_batch": 2, "logit_chunk": 5, "extra_padding": 7}


@pytest.mark.parametrize(
    "optimizer, split",
    slow_but([("sgd", SPLITS[0])], [*(("sgd", split) for split in SPLITS), ("adamw", PACKED)]),
    ids=lambda x: x if isinstance(x, str) else ",".join(f"{k}={v}" for k, v in x.items()),
)
def test_no_split_changes_the_result(optimizer, split):
    samples, params, _ = without_split(optimizer)
    samples_now, params_now, _ = three_updates(optimizer, **split)
    np.testing.assert_array_equal(samples_now, samples)
    for path, x in jax.tree_util.tree_leaves_with_path(params_now):
        if optimizer == "adamw" and has_zero_gradient(path):
            continue
        y = functools.reduce(lambda tree, part: tree[part.key], path, params)
        np.testing.assert_allclose(x, y, atol=1e-6, err_msg=jax.tree_util.keystr(path))


ALL_ON = {
    "adapters": True,
    "target_kl": 1e-5,
    "whiten_rewards": True,
}  # in addition to the separate critic, adaptive KL and score scaling


@pytest.mark.slow
@pytest.mark.parametrize(
    "split",
    [
        {"rollout_rows": 8, "micro_batch": 4, "extra_padding": 7},
        {"devices": 8, "micro_batch": 8},
        {"pack": 128},
    ],
    ids=str,
)
def test_no_split_changes_the_result_with_everything_on(split):
    samples, params, steps = without_split("sgd", **ALL_ON)
    samples_now, params_now, steps_now = three_updates("sgd", **ALL_ON, **split)
    np.testing.assert_array_equal(samples_now, samples)
    assert (
        steps_now == steps and min(steps) < PPO.epochs * PPO.minibatches
    )  # the target KL stopped an update early
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params_now, params)


@pytest.mark.slow
def test_no_split_changes_the_result_of_a_sampler_that_is_behind(tmp_path):
    """The rollouts that wait for their update are sampled and learned from in parts as well."""
    ppo = dataclasses.replace(
        FULL_PPO,
        micro_batch=None,
        importance=Importance.TIS,
        adam_eps=1.0,  # so that Adam does not scale rounding errors up to its learning rate
    )

    def run(**split):
        out = tmp_path / "_".join(["run", *split])
        options = {"updates": 5, "staleness": 2, "eval_every": 0, "save_every": 0}
        made = full_trainer(out, ppo=dataclasses.replace(ppo, **split), **options)
        start = jax.device_get(made.state.train.params)
        params, metrics = made.run().train.params, read_lines(out / "metrics.jsonl")
        tokens = [row["tokens"] for row in read_lines(out / "samples.jsonl")]
        return start, params, tokens, [row.get("importance/max") for row in metrics]

    start, params, tokens, weights = run()
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), start, params)
    assert max(jax.tree.leaves(moved)) > 1e-3 and max(filter(None, weights)) > 1.001
    _, params_now, tokens_now, _ = run(micro_batch=2, rollout_rows=8, rollout_slots=3)
    assert tokens_now == tokens
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params_now, params)


def test_the_three_updates_change_parameters_and_samples():
    samples, params, _ = without_split("sgd")
    assert (
        (samples[0] != samples[1]).any()
        and (samples >= 0).any(axis=(1, 2)).all()
        and (samples == -1).any()
    )
    start = init_params(CONFIG, jax.random.key(0))
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), start, params["policy"])
    assert max(jax.tree.leaves(moved)) > 1e-4


@pytest.mark.slow
def test_no_key_is_used_twice(tmp_path, monkeypatch):
    """All random draws of a run and an evaluation use different keys.

    There is one draw of two numbers per row and token, and one permutation per epoch.
    """
    seen: list[tuple] = []

    def recorded(draw):
        def function(key, *args, **more):
            jax.debug.callback(
                lambda *data: seen.append((draw.__name__, *(int(x) for x in data))),
                *jax.random.key_data(key),
            )
            return draw(key, *args, **more)

        return function

    for name in (
        "uniform",
        "normal",
        "permutation",
        "categorical",
        "gumbel",
        "bernoulli",
        "randint",
        "choice",
        "truncated_normal",
    ):
        monkeypatch.setattr(jax.random, name, recorded(getattr(jax.random, name)))
    run = full_trainer(tmp_path / "run", updates=3, eval_every=0, save_every=0)
    initial = len(seen)
    assert initial  # draws of the initial parameters
    for _ in range(3):
        run.step()
    run.evaluate(run.prompts)  # one batch
    jax.effects_barrier()
    drawn = seen[initial:]
    c = FULL_PPO
    steps = sum(name == "uniform" for name, *_ in drawn)
    assert (
        steps % c.batch_size == 0
        and c.batch_size * 4 < steps <= c.batch_size * 4 * c.max_new_tokens
    )
    assert sum(name == "permutation" for name, *_ in drawn) == 3 * c.epochs
    assert len(drawn) == steps + 3 * c.epochs
    keys = [key for _, *key in seen]
    assert len({tuple(key) for key in keys}) == len(keys)
