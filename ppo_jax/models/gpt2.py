"""The GPT-2 family: its config and its weight table. Its `Conv1D` kernels are stored `(in, out)`, as ours are."""

import re
from typing import Any

import jax.numpy as jnp

from ppo_jax.models.transformer import Activation, TransformerConfig
from ppo_jax.models.weights import Rule

RULES = (
    Rule("wte.weight", ("embedding",)),
    Rule("wpe.weight", ("position_embedding",)),
    Rule("h.{i}.ln_1.weight", ("layer_{i}/attn_norm/scale",)),
    Rule("h.{i}.ln_1.bias", ("layer_{i}/attn_norm/bias",)),
    Rule("h.{i}.attn.c_attn.weight", ("layer_{i}/attn/q/kernel", "layer_{i}/attn/k/kernel", "layer_{i}/attn/v/kernel")),
    Rule("h.{i}.attn.c_attn.bias", ("layer_{i}/attn/q/bias", "layer_{i}/attn/k/bias", "layer_{i}/attn/v/bias")),
    Rule("h.{i}.attn.c_proj.weight", ("layer_{i}/attn/o/kernel",)),
    Rule("h.{i}.attn.c_proj.bias", ("layer_{i}/attn/o/bias",)),
    Rule("h.{i}.ln_2.weight", ("layer_{i}/mlp_norm/scale",)),
    Rule("h.{i}.ln_2.bias", ("layer_{i}/mlp_norm/bias",)),
    Rule("h.{i}.mlp.c_fc.weight", ("layer_{i}/mlp/up/kernel",)),
    Rule("h.{i}.mlp.c_fc.bias", ("layer_{i}/mlp/up/bias",)),
    Rule("h.{i}.mlp.c_proj.weight", ("layer_{i}/mlp/down/kernel",)),
    Rule("h.{i}.mlp.c_proj.bias", ("layer_{i}/mlp/down/bias",)),
    Rule("ln_f.weight", ("final_norm/scale",)),
    Rule("ln_f.bias", ("final_norm/bias",)),
)
UNTIED = Rule("lm_head.weight", ("unembedding",))
BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # causal masks that older files store


def config_from_hf(hf: dict[str, Any], *, dtype: Any = jnp.float32, remat: bool = False) -> TransformerConfig:
    """Our config of a `config.json`.

    Raises:
      ValueError: for another family, or a switch that this decoder does not have.
    """
    if hf.get("model_type") != "gpt2":
        raise ValueError(f"model_type {hf.get('model_type')!r} is not supported; this version reads 'gpt2'.")
    if hf.get("add_cross_attention"):
        raise ValueError("A GPT-2 with add_cross_attention=true is an encoder-decoder's half, which is not supported.")
    name = hf.get("activation_function", "gelu_new")
    if name not in [a.value for a in Activation]:
        raise ValueError(f"activation_function {name!r} is not supported; known: {[a.value for a in Activation]}.")
    width = hf.get("n_embd", 768)
    return TransformerConfig(
        vocab_size=hf.get("vocab_size", 50257),
        positions=hf.get("n_positions", 1024),
        width=width,
        layers=hf.get("n_layer", 12),
        heads=hf.get("n_head", 12),
        mlp_width=hf.get("n_inner") or 4 * width,
        activation=Activation(name),
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        tied=hf.get("tie_word_embeddings", True),
        scale_attention=hf.get("scale_attn_weights", True),
        scale_attention_by_layer=hf.get("scale_attn_by_inverse_layer_idx", False),
        init_std=hf.get("initializer_range", 0.02),
        dtype=dtype,
        remat=remat,
    )


def config_to_hf(config: TransformerConfig, *, end_id: int | None = None) -> dict[str, Any]:
    """The `config.json` of our config; `transformers` reads it. `end_id` begins and ends a text."""
    return {
        "bos_token_id": end_id,
        "eos_token_id": end_id,
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.positions,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": config.mlp_width,
        "activation_function": config.activation.value,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "scale_attn_weights": config.scale_attention,
        "scale_attn_by_inverse_layer_idx": config.scale_attention_by_layer,
        "initializer_range": config.init_std,
        "dtype": "float32",
    }
