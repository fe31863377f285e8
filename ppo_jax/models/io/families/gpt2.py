"""GPT-2. Its kernels are stored as `[in, out]`, like ours."""

import re

from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.io.family import ConfigFields, Family, HFConfig, activation


def config(hf: HFConfig) -> ConfigFields:
    """Return the fields of `TransformerConfig` of a GPT-2's `config.json`."""
    if hf.get("add_cross_attention"):
        raise ValueError(
            "A GPT-2 with add_cross_attention=true is part of an encoder-decoder model, which is "
            "not supported."
        )
    width = hf.get("n_embd", 768)
    return {
        "vocab_size": hf.get("vocab_size", 50257),
        "positions": hf.get("n_positions", 1024),
        "width": width,
        "layers": hf.get("n_layer", 12),
        "heads": hf.get("n_head", 12),
        "mlp_width": hf.get("n_inner") or 4 * width,
        "activation": activation(hf, "activation_function", "gelu_new"),
        "norm_eps": hf.get("layer_norm_epsilon", 1e-5),
        "tied": hf.get("tie_word_embeddings", True),
        "attention_scale": None if hf.get("scale_attn_weights", True) else 1.0,
        "scale_attention_by_layer": hf.get("scale_attn_by_inverse_layer_idx", False),
    }


def config_to_hf(config: TransformerConfig, *, end_id: int | None = None) -> HFConfig:
    """Return the `config.json` of a new GPT-2, as `transformers` reads it.

    Args:
      config: a config with GPT-2's architecture.
      end_id: id of the token that begins and ends a text.

    Returns:
      A dictionary to be written as JSON.
    """
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
        "scale_attn_weights": config.attention_scale is None,
        "scale_attn_by_inverse_layer_idx": config.scale_attention_by_layer,
        "initializer_range": config.init_std,
        "dtype": "float32",
    }


_AT, _LAYER = "transformer.h.{i}", "layer_{i}"
TENSORS = {
    "embedding": "transformer.wte.weight",
    "position_embedding": "transformer.wpe.weight",
    f"{_LAYER}/attn_norm": f"{_AT}.ln_1",
    **{f"{_LAYER}/attn/{x}": f"{_AT}.attn.c_attn" for x in "qkv"},
    f"{_LAYER}/attn/o": f"{_AT}.attn.c_proj",
    f"{_LAYER}/mlp_norm": f"{_AT}.ln_2",
    f"{_LAYER}/mlp/up": f"{_AT}.mlp.c_fc",
    f"{_LAYER}/mlp/down": f"{_AT}.mlp.c_proj",
    "final_norm": "transformer.ln_f",
}
FAMILY = Family(
    classes={"gpt2": ("GPT2LMHeadModel", "GPT2ForSequenceClassification")},
    config=config,
    tensors=TENSORS,
    transpose=False,
    prefix="transformer.",
    ignored=re.compile(r".*h\.\d+\.attn\.(bias|masked_bias)"),  # Causal masks in older files.
)
