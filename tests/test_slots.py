"""Slots for sampling change no sampled token, whatever the model and the settings."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import init_params, tiny_config

from ppo_jax.errors import SettingError
from ppo_jax.models.cache import empty_cache
from ppo_jax.models.config import Rotary
from ppo_jax.models.transformer import language_model
from ppo_jax.plan import hlo
from ppo_jax.ppo import decoding
from ppo_jax.ppo.rollout import generate
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.sharding import AXES

B, P, R = 9, 5, 11
KEY = jax.random.key(7)
PROMPTS = jax.random.randint(jax.random.key(5), (B, P), 0, 21)
MASK = jnp.arange(P)[None, :] >= jnp.arange(B)[:, None] % P
GPT2 = tiny_config(layers=1, init_std=0.4)
GEMMA = dataclasses.replace(
    GPT2,
    layers=2,
    kv_heads=1,
    learned_positions=False,
    rotary=Rotary(base=1000.0, width=8),
    local_rotary=Rotary(base=100.0, width=8),
    windows=(3, None),
    attention_cap=20.0,
)
STOPS = (0, 1, 2)


def sampled(model, params, prompts=PROMPTS, mask=MASK, **options):
    options = {"max_new_tokens": R, "stop_ids": STOPS, **options}
    return jax.jit(functools.partial(generate, model, **options))(params, KEY, prompts, mask)


def assert_same(found, expected):
    for name in ("tokens", "mask", "response_mask", "ended"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=2e-5)


@pytest.mark.parametrize(
    "config, slots, options",
    [
        (GPT2, 4, {"min_new_tokens": 2, "truncate_after": 4, "top_k": 15, "temperature": 0.8}),
        (GPT2, 1, {"stop_at_end": False}),
        (GEMMA, 2, {}),
        (GEMMA, 5, {"greedy": True, "stop_ids": tuple(range(6)), "pad_id": 50}),
    ],
    ids=["limits", "whole", "windows", "greedy"],
)
def test_samples_do_not_depend_on_the_slots(config, slots, options):
    model, params = language_model(config), init_params(config, jax.random.key(0))
    expected = sampled(model, params, **options)
    lengths = set(np.asarray(expected.response_mask.sum(axis=1)))
    assert len(lengths) > 2 or lengths == {R}
    assert_same(sampled(model, params, slots=slots, **options), expected)


@pytest.mark.parametrize("kv_heads, groups, slots", [(4, 2, None), (4, 1, 3), (2, 1, None)])
def test_groups_of_heads_in_the_cache_change_no_sample(kv_heads, groups, slots):
    """Heads are grouped on a TPU only, so the test asks for the groups."""
    config = dataclasses.replace(GEMMA, heads=4, kv_heads=kv_heads, width=32)
    model, params = language_model(config), init_params(config, jax.random.key(0))
    grouped = model._replace(init_cache=functools.partial(empty_cache, config, groups=groups))
    assert grouped.init_cache(2, 6).keys[0].shape == (2, groups, 6, kv_heads // groups * 8)
    assert_same(sampled(grouped, params, slots=slots), sampled(model, params))


def on_tpu():
    """Return a context in which functions are traced for a TPU."""
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    types = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.sharding.AbstractMesh((1, 1, 1), AXES, axis_types=types, abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def test_heads_are_grouped_for_the_platform_of_the_mesh():
    config = tiny_config(layers=1, width=192, heads=3)
    shape = lambda: jax.eval_shape(lambda: language_model(config).init_cache(2, 6)).keys[0].shape
    with on_tpu():
        assert shape() == (2, 1, 6, 192)
    assert shape() == (2, 3, 6, 64)


@pytest.mark.parametrize("prompt, slots", [(100, None), (100, 1), (1, None)])
def test_a_tpu_samples_all_lengths_that_fit_the_positions(prompt, slots):
    """Its cache has a multiple of 128 positions only if the model can read so many."""
    config = tiny_config(layers=1, positions=200)
    prompts, mask = jnp.ones((2, prompt), int), jnp.ones((2, prompt), bool)
    room = 200 - prompt + 1  # The last token is never read.
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))

    def sample(new_tokens):
        options = {"max_new_tokens": new_tokens, "slots": slots}
        by = functools.partial(generate, language_model(config), **options)
        return jax.eval_shape(by, params, KEY, prompts, mask).logprobs.shape

    with on_tpu():
        assert sample(room) == (2, room) and sample(room - 1) == (2, room - 1)
        with pytest.raises(
            ValueError,
            match=f"Prompts of {prompt} tokens and max_new_tokens={room + 1} need 201 positions",
        ):
            sample(room + 1)


def test_the_plan_counts_the_steps_of_a_cache_that_is_larger_than_needed():
    """On a TPU the last of the sizes may have positions that are never filled."""
    prompt, length = 64, 512
    positions = prompt + length - 1
    sizes = decoding.stages(prompt, positions, "tpu")
    assert sizes[-1] > positions and all(size % 128 == 0 for size in sizes)
    first = decoding.Drawn(jnp.zeros(2, jnp.int32), jnp.zeros(2), jnp.zeros(2, bool))
    state = decoding.start(first, jnp.arange(2), None, length=length, pad_id=0, groups=1)
    step = lambda state: decoding.append(state, first)
    loops = jax.jit(lambda state: decoding.decode(state, step, prompt, positions, sizes))
    *_, steps = hlo.count_runs(hlo.parse(loops.lower(state).compile().as_text()))
    assert steps == length - 1


@pytest.mark.slow
def test_a_cache_that_grows_changes_no_sample():
    """A cache for 200 new tokens has 128 positions until a row is longer."""
    config = tiny_config(layers=1, init_std=0.3, positions=P + 199, vocab_size=200)
    model, params = language_model(config), init_params(config, jax.random.key(0))
    without = model._replace(init_cache=lambda rows, slots: None)  # reads all tokens at each step
    options = {"max_new_tokens": 200, "stop_ids": (0,), "prompts": PROMPTS[:5], "mask": MASK[:5]}
    assert decoding.stages(P, P + 199, "cpu") == [128, P + 199]
    expected = sampled(without, params, **options)
    assert expected.response_mask.sum(axis=1).max() > 128 > expected.response_mask.sum(axis=1).min()
    for slots in (None, 2):
        assert_same(sampled(model, params, slots=slots, **options), expected)


def test_a_policy_that_reads_its_cache_wrongly_is_noticed():
    """One that reads positions of padding, or of the row that had the slot before, differs."""
    model, params = language_model(GPT2), init_params(GPT2, jax.random.key(0))

    def hidden(params, tokens, mask, cache=None, last=None):
        if tokens.shape[1] == 1:
            cache = cache.replace(mask=jnp.ones_like(cache.mask))
        return model.hidden(params, tokens, mask, cache, last)

    broken = model._replace(hidden=hidden)
    full = jnp.ones_like(MASK)  # Without padding, all positions of the first rows are real.
    expected = sampled(broken, params, PROMPTS, full)
    assert_same(expected, sampled(model, params, PROMPTS, full))
    with pytest.raises(AssertionError):
        assert_same(sampled(broken, params, PROMPTS, full, slots=2), expected)


def test_one_program_serves_all_prompts_and_repeats_to_the_bit():
    model, params = language_model(GPT2), init_params(GPT2, jax.random.key(0))
    program = jax.jit(functools.partial(generate, model, max_new_tokens=R, stop_ids=STOPS, slots=4))
    first = program(params, KEY, PROMPTS, MASK)
    program(params, jax.random.key(1), PROMPTS[::-1], MASK[::-1])
    again = program(params, KEY, PROMPTS, MASK)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert program._cache_size() == 1


def test_an_impossible_number_of_slots_is_refused():
    model, params = language_model(GPT2), init_params(GPT2, jax.random.key(0))
    for slots in (0, B + 1):
        with pytest.raises(ValueError, match=rf"slots={slots} must lie in 1 .. {B}, the number"):
            sampled(model, params, slots=slots)
    without = model._replace(init_cache=lambda rows, slots: None)
    with pytest.raises(ValueError, match="because the model's init_cache returns None"):
        sampled(without, params, slots=2)
    with pytest.raises(SettingError, match="rollout_slots must be positive, or none"):
        PPOConfig(rollout_slots=0)
    for rows, slots in ((None, 65), (16, 17)):
        with pytest.raises(SettingError, match=f"rollout_slots={slots} must be at most"):
            PPOConfig(batch_size=64, rollout_rows=rows, rollout_slots=slots)
