"""Compare the decoder with GPT-2 of `transformers`, and cached sampling with a full pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from helpers import (
    compiled_logits,
    generate,
    gpt2_peer,
    init_params,
    left_padded,
    tensors_in,
)

from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.io import pretrained, safetensors_format
from ppo_jax.models.io.families import gpt2
from ppo_jax.models.transformer import language_model
from ppo_jax.ops.logprobs import response_view, token_logprobs

CASES = [
    {},
    {"tie_word_embeddings": False, "activation_function": "relu", "n_inner": 40},
    {"scale_attn_by_inverse_layer_idx": True, "activation_function": "gelu"},
    {"scale_attn_weights": False, "layer_norm_epsilon": 1e-3, "activation_function": "silu"},
]


@pytest.mark.parametrize("changes", CASES)
def test_logits_and_greedy_generation_equal_transformers(tmp_path, changes):
    torch_model = gpt2_peer(tmp_path, **changes)
    loaded = pretrained.load_policy(tmp_path)
    model = language_model(loaded.config)
    tokens, mask = left_padded()
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
    with torch.no_grad():
        want = torch_model(
            torch.tensor(tokens),
            attention_mask=torch.tensor(mask).long(),
            position_ids=torch.tensor(positions),
        ).logits.numpy()
    got = compiled_logits(model, loaded.params, tokens, mask)
    np.testing.assert_allclose(np.asarray(got)[mask], want[mask], atol=1e-4)

    texts = torch_model.generate(
        torch.tensor(tokens),
        attention_mask=torch.tensor(mask).long(),
        do_sample=False,
        max_new_tokens=20,
        pad_token_id=0,
    ).numpy()
    out = generate(
        model,
        loaded.params,
        jax.random.key(0),
        tokens,
        mask,
        max_new_tokens=20,
        stop_ids=(1,),
        greedy=True,
    )
    np.testing.assert_array_equal(np.asarray(out.tokens)[:, : texts.shape[1]], texts)


def test_a_saved_model_is_bit_identical_in_transformers_and_here(tmp_path):
    torch_model = gpt2_peer(tmp_path / "a")
    loaded = pretrained.load_policy(tmp_path / "a")
    pretrained.save_policy(tmp_path / "b", loaded)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    for (name, a), b in zip(torch_model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(
        jax.tree.leaves(loaded.params),
        jax.tree.leaves(pretrained.load_policy(tmp_path / "b").params),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_a_new_model_loads_in_transformers(tmp_path):
    config = TransformerConfig(
        vocab_size=11, positions=16, width=8, layers=2, heads=2, mlp_width=12, tied=False
    )
    params = init_params(config, jax.random.key(0))
    pretrained.save_policy(
        tmp_path, pretrained.Pretrained(config, params, gpt2.config_to_hf(config))
    )
    tokens = jnp.array([[1, 2, 3]])
    with torch.no_grad():
        want = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(
            torch.tensor(np.asarray(tokens))
        ).logits.numpy()
    model = language_model(config)
    np.testing.assert_allclose(compiled_logits(model, params, tokens, tokens > 0), want, atol=1e-5)


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path):
    gpt2_peer(tmp_path)
    tensors = tensors_in(tmp_path)
    lost = {k: v for k, v in tensors.items() if k != "transformer.h.1.mlp.c_fc.bias"}
    safetensors_format.write_safetensors(
        tmp_path, [*lost.items(), ("transformer.h.1.extra", np.zeros(1, np.float32))]
    )
    with pytest.raises(
        ValueError,
        match=r"missing tensors \['transformer.h.1.mlp.c_fc.bias'\], "
        r"left over \['transformer.h.1.extra'",
    ):
        pretrained.load_policy(tmp_path)
    safetensors_format.write_safetensors(
        tmp_path, {**tensors, "transformer.ln_f.bias": np.zeros(5, np.float32)}.items()
    )
    with pytest.raises(
        ValueError, match=r"final_norm/bias is \(5,\) in transformer.ln_f.bias, not \(32,\)"
    ):
        pretrained.load_policy(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickle"):
        pretrained.load_policy(tmp_path)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_cached_logprobs_equal_the_full_forward(tmp_path, temperature):
    gpt2_peer(tmp_path)
    loaded = pretrained.load_policy(tmp_path)
    model = language_model(loaded.config)
    tokens, mask = map(jnp.asarray, left_padded())
    out = generate(
        model,
        loaded.params,
        jax.random.key(3),
        tokens,
        mask,
        max_new_tokens=30,
        stop_ids=(1, 7),
        temperature=temperature,
    )
    assert int((~out.response_mask).sum()) > 0  # some rows end early
    logits = compiled_logits(model, loaded.params, out.tokens[:, :-1], out.mask[:, :-1])
    full = token_logprobs(
        response_view(logits, out.prompt_length),
        out.responses,
        temperature=temperature,
    )
    np.testing.assert_allclose(out.logprobs, jnp.where(out.response_mask, full, 0), atol=1e-5)


def test_samples_do_not_depend_on_batch_or_padding(tmp_path):
    gpt2_peer(tmp_path)
    loaded = pretrained.load_policy(tmp_path)
    model = language_model(loaded.config)
    tokens, mask = map(jnp.asarray, left_padded())
    key = jax.random.key(3)
    whole = generate(model, loaded.params, key, tokens, mask, max_new_tokens=12)
    wider = [jnp.pad(x, ((0, 0), (4, 0))) for x in (tokens, mask)]
    part = generate(
        model,
        loaded.params,
        key,
        wider[0][2:4],
        wider[1][2:4],
        max_new_tokens=12,
        row_ids=jnp.array([2, 3]),
    )
    np.testing.assert_array_equal(whole.responses[2:4], part.responses)
    other = generate(model, loaded.params, jax.random.key(4), tokens, mask, max_new_tokens=12)
    assert (other.responses != whole.responses).any()


def test_no_gradient_flows_from_later_positions():
    config = TransformerConfig(
        vocab_size=11, positions=16, width=8, layers=2, heads=2, mlp_width=12
    )
    params = init_params(config, jax.random.key(0))
    model = language_model(config)
    tokens = jnp.arange(1, 9)[None]

    def logit_at_4(positions):
        hidden, _ = model.hidden({**params, "position_embedding": positions}, tokens, tokens > 0)
        return hidden[0, 4].sum() + (hidden[0, 4] ** 3).sum()

    grad = jnp.abs(jax.jit(jax.grad(logit_at_4))(params["position_embedding"])).sum(axis=1)
    assert (grad[:5] > 0).all() and (grad[5:] == 0).all()


@pytest.mark.parametrize("remat", [False, True])
def test_remat_changes_no_gradient(remat):
    config = TransformerConfig(
        vocab_size=11, positions=16, width=8, layers=2, heads=2, mlp_width=12, remat=remat
    )
    params = init_params(config, jax.random.key(0))
    tokens = jnp.arange(1, 9)[None]

    def loss(params, model):
        return (model.hidden(params, tokens, tokens > 0)[0] ** 3).sum()

    plain = language_model(
        TransformerConfig(vocab_size=11, positions=16, width=8, layers=2, heads=2, mlp_width=12)
    )
    gradient = jax.jit(jax.grad(loss), static_argnames="model")
    want = gradient(params, model=plain)
    got = gradient(params, model=language_model(config))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), want, got)
    assert (
        "remat" in str(jax.make_jaxpr(lambda p: jax.grad(loss)(p, language_model(config)))(params))
    ) == remat
