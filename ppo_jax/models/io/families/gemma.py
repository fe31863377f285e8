"""Gemma 2 and 3 (text only).

They normalize before and after each sublayer, multiply the embeddings by √D, and give most layers a
window.
"""

from functools import partial

from ppo_jax.models.config import NormAt, NormKind, Rotary
from ppo_jax.models.io.families import llama
from ppo_jax.models.io.family import (
    ConfigFields,
    Family,
    HFConfig,
    activation,
    rope_settings,
    rotary,
    windows,
)


def config(hf: HFConfig) -> ConfigFields:
    """Return the fields of `TransformerConfig` of a Gemma's `config.json`."""
    if hf.get("use_bidirectional_attention"):
        raise ValueError(
            "A Gemma with use_bidirectional_attention=true is an encoder, which is not supported."
        )
    third = hf["model_type"] == "gemma3_text"
    positions = hf.get("max_position_embeddings", 131072 if third else 8192)
    return {
        **llama.shared_fields(hf),
        "positions": positions,
        "kv_heads": hf.get("num_key_value_heads", 4),
        "head_size": hf.get("head_dim", 256),
        "activation": activation(hf, "hidden_activation", "gelu_pytorch_tanh"),
        "norm": NormKind.RMS_PLUS_1,
        "norm_at": NormAt.AROUND,
        "qk_norm": third,
        "mlp_bias": False,
        **_rotaries(hf, positions, third),
        "windows": windows(hf, _layer_types(hf, third)),
        "tied": hf.get("tie_word_embeddings", True),
        "scale_embedding": True,
        "attention_scale": hf.get("query_pre_attn_scalar", 256) ** -0.5,
        # The code of Gemma 3 ignores this setting.
        "attention_cap": None if third else hf.get("attn_logit_softcapping", 50.0),
        "logit_cap": hf.get("final_logit_softcapping", None if third else 30.0),
    }


def _layer_types(hf: HFConfig, third: bool) -> list[str]:
    """Return the kind of attention of each layer; the last of every group has no window."""
    group = hf.get("sliding_window_pattern", 6) if third else 2
    return hf.get("layer_types") or [
        "sliding_attention" if (i + 1) % group else "full_attention"
        for i in range(hf["num_hidden_layers"])
    ]


def _rotaries(hf: HFConfig, positions: int, third: bool) -> dict[str, Rotary]:
    """Return the rotary positions; layers with a window use another base in Gemma 3."""
    settings = rope_settings(hf)
    embedding = partial(rotary, head=hf.get("head_dim", 256), positions=positions)
    if not third:
        return {"rotary": embedding(settings, base=1e4)}
    # Newer files have settings for each kind of layer; those of older ones are for full attention.
    by_kind = settings if "full_attention" in settings else {"full_attention": settings}
    sliding, full = by_kind.get("sliding_attention") or {}, by_kind["full_attention"] or {}
    return {
        "rotary": embedding(full, base=1e6),
        "local_rotary": embedding(sliding, base=hf.get("rope_local_base_freq", 1e4)),
    }


_AT, _LAYER = "model.layers.{i}", "layer_{i}"
FAMILY = Family(
    classes={
        "gemma2": ("Gemma2ForCausalLM", "Gemma2ForSequenceClassification"),
        "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextForSequenceClassification"),
    },
    config=config,
    tensors={
        **{ours: stored for ours, stored in llama.TENSORS.items() if "mlp_norm" not in ours},
        f"{_LAYER}/attn_post_norm": f"{_AT}.post_attention_layernorm",
        f"{_LAYER}/mlp_norm": f"{_AT}.pre_feedforward_layernorm",
        f"{_LAYER}/mlp_post_norm": f"{_AT}.post_feedforward_layernorm",
    },
    prefix="model.",
    pad_id=0,
)
