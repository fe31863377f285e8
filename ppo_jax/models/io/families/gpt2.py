"""GPT-2. Its kernels are stored `(in, out)`, as ours are."""

import re
from typing import Any

from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.io.family import Family, activation
from ppo_jax.models.io.weights import Rule, linear, norm


def config(hf: dict[str, Any]) -> dict[str, Any]:
    if hf.get("add_cross_attention"):
        raise ValueError(
            "A GPT-2 with add_cross_attention=true is an encoder-decoder's half, which is not supported."
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
        "init_std": hf.get("initializer_range", 0.02),
    }


def rules(config: TransformerConfig) -> list[Rule]:
    at, layer = "transformer.h.{i}", "layer_{i}"
    return [
        Rule("transformer.wte.weight", ("embedding",)),
        Rule("transformer.wpe.weight", ("position_embedding",)),
        *norm(f"{at}.ln_1", f"{layer}/attn_norm"),
        *linear(f"{at}.attn.c_attn", *(f"{layer}/attn/{x}" for x in "qkv"), transpose=False),
        *linear(f"{at}.attn.c_proj", f"{layer}/attn/o", transpose=False),
        *norm(f"{at}.ln_2", f"{layer}/mlp_norm"),
        *linear(f"{at}.mlp.c_fc", f"{layer}/mlp/up", transpose=False),
        *linear(f"{at}.mlp.c_proj", f"{layer}/mlp/down", transpose=False),
        *norm("transformer.ln_f", "final_norm"),
        *([] if config.tied else [Rule("lm_head.weight", ("unembedding",))]),
    ]


def config_to_hf(config: TransformerConfig, *, end_id: int | None = None) -> dict[str, Any]:
    """The `config.json` of a fresh GPT-2; `transformers` reads it. `end_id` begins and ends a text."""
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


FAMILY = Family(
    classes={"gpt2": ("GPT2LMHeadModel", "GPT2ForSequenceClassification")},
    config=config,
    rules=rules,
    prefix="transformer.",
    ignored=re.compile(
        r".*h\.\d+\.attn\.(bias|masked_bias)"
    ),  # causal masks that older files store
)
