"""Test the loop over layers: it computes what the layers compute one by one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import init_params, slow_but

from ppo_jax.distributed.meshes import make_mesh
from ppo_jax.models.config import NormAt, Rotary, TransformerConfig
from ppo_jax.models.layer_loop import layers_in_loop, period
from ppo_jax.models.lora import LoRA, init_lora
from ppo_jax.models.transformer import language_model
from ppo_jax.plan.flops import matmul_eqns
from ppo_jax.plan.topology import make_topology
from ppo_jax.ppo.state import overlay

CONFIG = TransformerConfig(
    vocab_size=17, positions=16, width=16, layers=4, heads=2, mlp_width=32, init_std=0.3
)
TOKENS = jax.random.randint(jax.random.key(0), (4, 12), 0, 17)
MASK = jnp.arange(12)[None, :] >= jnp.arange(4)[:, None]
VARIANTS = {
    "plain": {},
    "recomputed, norm after": {"remat": True, "kv_heads": 1, "norm_at": NormAt.AFTER},
    "windows": {
        "layers": 6,
        "windows": (3, None) * 3,
        "rotary": Rotary(base=100.0, width=8),
        "local_rotary": Rotary(base=10.0, width=4),
    },
    "bfloat16": {"dtype": jnp.bfloat16},
}


def in_a_loop(config):
    return dataclasses.replace(config, loop_layers=True)


def assert_near(found, wanted, share):
    """Compare gradients, within a share of their largest element."""
    largest = max(np.abs(x).max() for x in jax.tree.leaves(wanted))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, atol=share * largest)


@pytest.mark.parametrize(
    "variant, last",
    slow_but(
        (("plain", 4),),
        [
            ("plain", 4),
            ("recomputed, norm after", None),
            ("windows", 4),
            ("windows", None),
            ("bfloat16", 4),
        ],
    ),
)
def test_a_loop_changes_no_number(variant, last):
    config = dataclasses.replace(CONFIG, **VARIANTS[variant])
    params = init_params(config, jax.random.key(0))

    def mean(params, config):
        states, _ = language_model(config).hidden(params, TOKENS, MASK, last=last)
        return jnp.mean(jnp.sin(states.astype(jnp.float32)) * MASK[:, -states.shape[1] :, None])

    value = jax.jit(jax.value_and_grad(mean), static_argnums=1)
    (want, want_grad), (found, found_grad) = value(params, config), value(params, in_a_loop(config))
    np.testing.assert_allclose(found, want, rtol=1e-6)
    assert_near(found_grad, want_grad, 0.01 if config.low_precision else 3e-6)


@pytest.mark.parametrize("variant", ["plain", "windows"])
def test_a_loop_fills_the_cache(variant):
    config = dataclasses.replace(CONFIG, **VARIANTS[variant])
    params = init_params(config, jax.random.key(0))

    def run(config):
        model = language_model(config)
        states, cache = model.hidden(params, TOKENS, MASK, model.init_cache(4, 13))
        return states, model.hidden(params, TOKENS[:, :1], MASK[:, -1:], cache)

    want, found = (jax.jit(run, static_argnums=0)(x) for x in (config, in_a_loop(config)))
    assert jax.tree.structure(want) == jax.tree.structure(found)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6)


@pytest.mark.parametrize("targets", ["attn/(q|o)$", "layer_1/attn/q$"])
def test_adapters_are_part_of_the_loop(targets):
    lora = LoRA(rank=2, alpha=4.0, targets=targets)
    config = dataclasses.replace(CONFIG, lora_scale=lora.scale)
    frozen = init_params(config, jax.random.key(0))
    adapters = jax.tree.map(lambda x: x + 0.1, init_lora(frozen, jax.random.key(1), lora))

    def mean(adapters, config):
        states, _ = language_model(config).hidden(overlay(frozen, adapters), TOKENS, MASK)
        return jnp.mean(jnp.sin(states))

    gradient = jax.jit(jax.grad(mean), static_argnums=1)
    want, found = gradient(adapters, config), gradient(adapters, in_a_loop(config))
    assert_near(found, want, 3e-6)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(found))


def test_the_program_has_as_many_products_for_any_number_of_layers():
    def products(layers, **changes):
        config = dataclasses.replace(CONFIG, layers=layers, **changes)
        params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
        hidden = lambda params: language_model(config).hidden(params, TOKENS, MASK)[0]
        return len(list(matmul_eqns(jax.make_jaxpr(hidden)(params).jaxpr)))

    assert products(4, loop_layers=True) == products(8, loop_layers=True)
    assert products(4) < products(8)


def test_a_loop_is_for_many_layers_on_a_tpu_and_for_several_tokens():
    deep = dataclasses.replace(CONFIG, layers=24)
    assert layers_in_loop(deep, positions=8) == 0  # this is a CPU
    with jax.set_mesh(make_mesh({"fsdp": 4}, make_topology("v5e:2x2"))):
        assert layers_in_loop(deep, positions=8) == 23  # the last one computes fewer positions
        assert layers_in_loop(deep, positions=1) == 0
        assert layers_in_loop(CONFIG, positions=8) == 0
        assert layers_in_loop(dataclasses.replace(deep, loop_layers=False), positions=8) == 0
        by_layer = dataclasses.replace(deep, scale_attention_by_layer=True)
        assert layers_in_loop(by_layer, positions=8) == 0
        windows = dataclasses.replace(deep, windows=(4, 4, None) * 8)
        assert (period(windows), layers_in_loop(windows, positions=8)) == (3, 21)
