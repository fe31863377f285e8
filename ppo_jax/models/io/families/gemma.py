"""Gemma 2 and 3 (text): norms around each sublayer, embeddings times √D, windows on most layers."""

from typing import Any

from ppo_jax.models.config import NormAt, NormKind, TransformerConfig
from ppo_jax.models.io.family import Family, activation, rope_settings, rotary, windows
from ppo_jax.models.io.weights import Rule, linear, norm


def config(hf: dict[str, Any]) -> dict[str, Any]:
    third, layers = hf["model_type"] == "gemma3_text", hf["num_hidden_layers"]
    positions = hf.get("max_position_embeddings", 131072 if third else 8192)
    if hf.get("use_bidirectional_attention"):
        raise ValueError(
            "A Gemma with use_bidirectional_attention=true is an encoder, which is not supported."
        )
    every = hf.get("sliding_window_pattern", 6) if third else 2
    default = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    settings, local, head = rope_settings(hf), None, hf.get("head_dim", 256)
    if third:
        # By kind of layer in newer files; in older ones the settings are those of full attention.
        both = settings if "full_attention" in settings else {"full_attention": settings}
        local_base = hf.get("rope_local_base_freq", 10000.0)
        local = rotary(
            both.get("sliding_attention") or {}, base=local_base, head=head, positions=positions
        )
        settings = both["full_attention"] or {}
    return {
        "vocab_size": hf["vocab_size"],
        "positions": positions,
        "width": hf["hidden_size"],
        "layers": layers,
        "heads": hf["num_attention_heads"],
        "kv_heads": hf.get("num_key_value_heads", 4),
        "head_size": head,
        "mlp_width": hf["intermediate_size"],
        "activation": activation(hf, "hidden_activation", "gelu_pytorch_tanh"),
        "gated": True,
        "norm": NormKind.RMS_PLUS_1,
        "norm_at": NormAt.AROUND,
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "qk_norm": third,
        "qkv_bias": hf.get("attention_bias", False),
        "out_bias": hf.get("attention_bias", False),
        "mlp_bias": False,
        "learned_positions": False,
        "rotary": rotary(settings, base=1e6 if third else 1e4, head=head, positions=positions),
        "local_rotary": local,
        "windows": windows(
            hf.get("sliding_window", 4096), hf.get("layer_types") or default, layers
        ),
        "tied": hf.get("tie_word_embeddings", True),
        "scale_embedding": True,
        "attention_scale": hf.get("query_pre_attn_scalar", 256) ** -0.5,
        "attention_cap": None
        if third
        else hf.get("attn_logit_softcapping", 50.0),  # Gemma 3 takes no notice of it
        "logit_cap": hf.get("final_logit_softcapping", None if third else 30.0),
        "init_std": hf.get("initializer_range", 0.02),
    }


def rules(config: TransformerConfig) -> list[Rule]:
    at, layer = "model.layers.{i}", "layer_{i}"
    qk_norms = [
        rule
        for x in "qk"
        for rule in norm(f"{at}.self_attn.{x}_norm", f"{layer}/attn/{x}_norm", bias=False)
    ]
    return [
        Rule("model.embed_tokens.weight", ("embedding",)),
        *norm(f"{at}.input_layernorm", f"{layer}/attn_norm", bias=False),
        *(
            r
            for x in "qkv"
            for r in linear(f"{at}.self_attn.{x}_proj", f"{layer}/attn/{x}", bias=config.qkv_bias)
        ),
        *(qk_norms if config.qk_norm else []),
        *linear(f"{at}.self_attn.o_proj", f"{layer}/attn/o", bias=config.out_bias),
        *norm(f"{at}.post_attention_layernorm", f"{layer}/attn_post_norm", bias=False),
        *norm(f"{at}.pre_feedforward_layernorm", f"{layer}/mlp_norm", bias=False),
        *(
            r
            for x in ("gate", "up", "down")
            for r in linear(f"{at}.mlp.{x}_proj", f"{layer}/mlp/{x}", bias=False)
        ),
        *norm(f"{at}.post_feedforward_layernorm", f"{layer}/mlp_post_norm", bias=False),
        *norm("model.norm", "final_norm", bias=False),
        *([] if config.tied else [Rule("lm_head.weight", ("unembedding",))]),
    ]


FAMILY = Family(
    classes={
        "gemma2": ("Gemma2ForCausalLM", "Gemma2ForSequenceClassification"),
        "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextForSequenceClassification"),
    },
    config=config,
    rules=rules,
    prefix="model.",
)
