"""Test bfloat16 products and their gradients, and forward passes of the last positions only."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import init_params, slow_but

from ppo_jax.models import attention
from ppo_jax.models.config import NormAt, Rotary, TransformerConfig
from ppo_jax.models.rounding import product, round_to
from ppo_jax.models.transformer import language_model
from ppo_jax.plan.flops import matmul_eqns, matmul_flops
from ppo_jax.ppo.forward import forward_responses

CONFIG = TransformerConfig(
    vocab_size=65,
    positions=16,
    width=16,
    layers=2,
    heads=2,
    mlp_width=48,
    init_std=0.3,
    gated=True,
    dtype=jnp.bfloat16,
)
PLAIN = dataclasses.replace(CONFIG, dtype=jnp.float32)
TOKENS = jax.random.randint(
    jax.random.key(0), (100, 12), 0, 65
)  # enough rows that the output matrix is padded
MASK = jnp.arange(12)[None, :] >= jnp.arange(100)[:, None] % 5


def logprob(params, config=CONFIG):
    model = language_model(config)
    logits = model.logits(params, model.hidden(params, TOKENS, MASK)[0])
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), TOKENS[..., None], axis=-1)[..., 0]
    return jnp.sum(chosen, where=MASK) / MASK.sum()


def test_products_in_a_gradient_have_bfloat16_operands():
    params = init_params(CONFIG, jax.random.key(0))
    found = matmul_eqns(jax.make_jaxpr(jax.grad(logprob))(params).jaxpr)
    found = [
        eqn for eqn in found if 1 not in eqn.invars[1].aval.shape
    ]  # on a CPU, the mean of a norm is a float32 product with a column
    per_block = 7 + 2  # q, k, v, o, gate, up and down, and two of attention
    assert len(found) == 3 * (per_block * CONFIG.layers + 1)
    for eqn in found:
        assert {v.aval.dtype for v in eqn.invars} == {jnp.dtype(jnp.bfloat16)}, eqn
        assert eqn.outvars[0].aval.dtype == jnp.float32


@pytest.mark.slow
def test_gradient_equals_that_of_float32_up_to_rounding():
    params = init_params(CONFIG, jax.random.key(0))
    gradient = jax.jit(jax.grad(logprob), static_argnames="config")
    rounded = jax.tree.leaves(gradient(params))
    exact = jax.tree.leaves(gradient(params, config=PLAIN))
    for a, b in zip(rounded, exact, strict=True):
        assert a.dtype == jnp.float32
        # an absolute tolerance, because the gradient of the biases of keys is rounding noise
        np.testing.assert_allclose(a, b, atol=0.04 * max(float(jnp.abs(b).max()), 0.02))


@pytest.mark.parametrize(
    "spec, a, b",
    [
        ("nd,dv->nv", (5, 3), (3, 4)),
        ("nd,vd->nv", (5, 3), (4, 3)),
        ("bkqc,bknc->bkqn", (2, 3, 4, 5), (2, 3, 6, 5)),
    ],
)
def test_gradient_of_a_product(spec, a, b):
    a, b = jax.random.normal(jax.random.key(0), a), jax.random.normal(jax.random.key(1), b)
    cut = lambda x: np.asarray(x.astype(jnp.bfloat16).astype(jnp.float32))
    left, right, result = spec.replace("->", ",").split(",")
    out = product(spec, a.astype(jnp.bfloat16), b)
    np.testing.assert_allclose(out, np.einsum(spec, cut(a), cut(b)), rtol=1e-5, atol=1e-6)
    weight = jax.random.normal(jax.random.key(2), out.shape)
    grad_a, grad_b = jax.grad(lambda a, b: jnp.sum(product(spec, a, b) * weight), argnums=(0, 1))(
        a.astype(jnp.bfloat16), b
    )
    assert (grad_a.dtype, grad_b.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(
        grad_b, np.einsum(f"{left},{result}->{right}", cut(a), cut(weight)), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        grad_a.astype(jnp.float32),
        cut(jnp.asarray(np.einsum(f"{result},{right}->{left}", cut(weight), cut(b)))),
        rtol=1e-2,
    )


def test_a_cotangent_is_rounded_by_a_conversion_on_a_tpu():
    """The values are the same, and a conversion there and back costs nothing."""
    x = jax.random.normal(jax.random.key(0), (64, 64)) ** 5
    np.testing.assert_array_equal(round_to(x, jnp.bfloat16), x.astype(jnp.bfloat16))

    def loss(x, w):
        return jnp.sum(round_to(product("nd,dv->nv", x, w), jnp.bfloat16).astype(jnp.float32) ** 2)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(x.astype(jnp.bfloat16), x)
    cpu, tpu = (
        gradient.lower(lowering_platforms=(name,)).as_text().count("reduce_precision")
        for name in ("cpu", "tpu")
    )
    assert cpu == tpu + 1


def test_parameters_rounded_beforehand_give_the_same_logits():
    params, model = init_params(CONFIG, jax.random.key(0)), language_model(CONFIG)
    rounded = model.rounded(params)
    assert all(
        x.dtype == (jnp.bfloat16 if x.ndim > 1 else jnp.float32) for x in jax.tree.leaves(rounded)
    )
    run = jax.jit(lambda params: model.logits(params, model.hidden(params, TOKENS, MASK)[0]))
    np.testing.assert_array_equal(run(rounded), run(params))
    plain = language_model(PLAIN)
    assert all(
        a is b
        for a, b in zip(
            jax.tree.leaves(plain.rounded(params)), jax.tree.leaves(params), strict=True
        )
    )


def test_a_gradient_saves_no_wide_float32_array():
    _, backward = jax.vjp(logprob, init_params(CONFIG, jax.random.key(0)))
    wide = [
        x
        for x in jax.tree.leaves(backward)
        if x.shape[-1:] == (CONFIG.mlp_width,) and x.shape[0] == len(TOKENS)
    ]
    assert wide and all(x.dtype == jnp.bfloat16 for x in wide)


def test_positions_are_padded_to_a_size_that_gpus_multiply_fast():
    config = dataclasses.replace(
        CONFIG, positions=12, learned_positions=True
    )  # the padding has no position embeddings
    params = init_params(config, jax.random.key(0))
    longer = {
        **params,
        "position_embedding": jnp.pad(
            params["position_embedding"], ((0, 4), (0, 0)), constant_values=7.0
        ),
    }

    @functools.partial(jax.jit, static_argnums=1)
    def hidden(params, config, tokens=TOKENS, mask=MASK):
        return language_model(config).hidden(params, tokens, mask)[0]

    found = hidden(params, config)
    assert found.shape == (*TOKENS.shape, 16)
    np.testing.assert_array_equal(
        found[MASK], hidden(longer, dataclasses.replace(config, positions=16))[MASK]
    )
    by_hand = hidden(
        longer,
        dataclasses.replace(config, positions=16),
        jnp.pad(TOKENS, ((0, 0), (0, 4)), constant_values=3),
        jnp.pad(MASK, ((0, 0), (0, 4))),
    )
    np.testing.assert_array_equal(found[MASK], by_hand[:, :12][MASK])
    shapes = [
        eqn.outvars[0].aval.shape
        for eqn in matmul_eqns(jax.make_jaxpr(hidden, static_argnums=1)(params, config).jaxpr)
    ]
    assert (100, 2, 16, 16) in shapes  # attention
    plain = dataclasses.replace(config, dtype=jnp.float32)
    shapes = [
        eqn.outvars[0].aval.shape
        for eqn in matmul_eqns(jax.make_jaxpr(hidden, static_argnums=1)(params, plain).jaxpr)
    ]
    assert (100, 2, 12, 12) in shapes


VARIANTS = {
    "float32": {},
    "bfloat16": {"dtype": jnp.bfloat16},
    "one layer, norm after": {"layers": 1, "norm_at": NormAt.AFTER},
    "recomputed, both ways": {"remat": True, "causal": False},
    "parallel, rotary, grouped, windows": {
        "parallel": True,
        "rotary": Rotary(base=100.0, width=8),
        "local_rotary": Rotary(base=10.0, width=4),
        "kv_heads": 1,
        "windows": (None, 3),
        "learned_positions": False,
        "qk_norm": True,
    },
    "norm around": {"norm_at": NormAt.AROUND, "scale_attention_by_layer": True},
}


@pytest.mark.parametrize(
    "variant, last",
    slow_but(
        (("float32", 4), ("bfloat16", 3)),
        [
            *((variant, 3 if variant == "bfloat16" else 4) for variant in VARIANTS),
            ("float32", 1),
            ("float32", 12),
        ],
    ),
)
def test_hidden_of_the_last_positions_only(variant, last):
    """States and gradients equal those of a full pass, and the last layer multiplies less."""
    config = dataclasses.replace(PLAIN, **VARIANTS[variant])
    params, model = init_params(config, jax.random.key(0)), language_model(config)
    tokens, mask, weight = (
        TOKENS[:4],
        MASK[:4],
        jax.random.normal(jax.random.key(2), (4, last, 16)) * MASK[:4, -last:, None],
    )

    def mean(params, last_alone):
        states = model.hidden(params, tokens, mask, **({"last": last} if last_alone else {}))[0]
        assert not last_alone or states.shape == weight.shape
        states = states[:, -last:].astype(jnp.float32)
        return jnp.mean(states * weight), states

    (_, got), got_grad = jax.jit(jax.value_and_grad(mean, has_aux=True), static_argnums=1)(
        params, True
    )
    (_, want), want_grad = jax.jit(jax.value_and_grad(mean, has_aux=True), static_argnums=1)(
        params, False
    )
    tolerance = {"atol": 0.04 if config.dtype == jnp.bfloat16 else 3e-6}
    np.testing.assert_allclose(got, want, **tolerance)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got_grad, want_grad)
    flops_last, flops_all = (
        matmul_flops(lambda params, alone=alone: mean(params, alone), params)
        for alone in (True, False)
    )
    dropped = (12 - last) // 8 * 8 if config.dtype == jnp.bfloat16 else 12 - last
    assert (
        flops_all - flops_last >= 2 * 3 * 16 * 48 * 4 * dropped
    )  # products of the MLP for four texts


def test_hidden_of_the_last_positions_fills_the_whole_cache():
    params, model = init_params(PLAIN, jax.random.key(0)), language_model(PLAIN)
    hidden = jax.jit(model.hidden, static_argnames="last")
    whole, last = (
        hidden(params, TOKENS[:4], MASK[:4], model.init_cache(4, 14), **by)
        for by in ({}, {"last": 1})
    )
    np.testing.assert_allclose(last[0], whole[0][:, -1:], atol=2e-6)
    jax.tree.map(np.testing.assert_array_equal, last[1], whole[1])


@pytest.mark.parametrize("last", [0, 13])
def test_last_out_of_range_is_refused(last):
    with pytest.raises(ValueError, match=rf"last={last} must lie in 1 \.\. 12"):
        language_model(PLAIN).hidden(init_params(PLAIN, jax.random.key(0)), TOKENS, MASK, last=last)


@pytest.mark.parametrize("queries", [1, 3])
def test_queries_padded_for_the_matrix_unit_of_a_tpu_attend_alike(queries):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (
        jax.random.normal(key, (2, 3, n, 4)) for key, n in zip(keys, (queries, 9, 9), strict=False)
    )
    allowed = jax.random.bernoulli(keys[3], 0.7, (2, queries, 9))
    plain = attention.attend(q, k, v, allowed, cap=5.0)
    padded = attention._attend_padded(q, k, v, allowed, cap=5.0)
    np.testing.assert_allclose(padded, plain, rtol=1e-6, atol=1e-6)
    text = jax.jit(attention.attend, static_argnames="cap").trace(q, k, v, allowed, cap=5.0)
    rows = f"tensor<2x3x{attention._TPU_ROWS}x9xf32>"  # the logits
    assert rows in text.lower(lowering_platforms=("tpu",)).as_text()
    assert rows not in text.lower(lowering_platforms=("cpu",)).as_text()


def test_a_critic_must_return_one_value_per_state():
    model, params = language_model(PLAIN), init_params(PLAIN, jax.random.key(0))
    every_position = lambda params, hidden, tokens, mask: jnp.zeros(tokens.shape)
    with pytest.raises(AssertionError, match="shape"):
        forward_responses(
            model,
            every_position,
            {"policy": params, "critic": None},
            TOKENS,
            MASK,
            5,
            temperature=1.0,
        )
