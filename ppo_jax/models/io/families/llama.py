"""Llama 2 and 3, SmolLM2, Mistral, Qwen2 and 2.5, Qwen3: one table; the config says which biases, norms and windows there are."""

import re
from typing import Any

from ppo_jax.models.config import NormKind, TransformerConfig
from ppo_jax.models.io.family import Family, activation, rope_settings, rotary, windows
from ppo_jax.models.io.weights import Rule, linear, norm

# What a config.json that lacks these keys means, by `model_type`; one that says null is another matter.
_POSITIONS = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
_KEY_HEADS = {"llama": None, "mistral": 8, "qwen2": 32, "qwen3": 32}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    kind, heads, width, layers = (
        hf["model_type"],
        hf["num_attention_heads"],
        hf["hidden_size"],
        hf["num_hidden_layers"],
    )
    head = hf.get("head_dim", 128 if kind == "qwen3" else None) or width // heads
    positions = hf.get("max_position_embeddings", _POSITIONS[kind])
    bias, window, kinds = hf.get("attention_bias", False), None, ["full_attention"] * layers
    if kind == "mistral":
        window, kinds = hf.get("sliding_window", 4096), ["sliding_attention"] * layers
    elif kind != "llama" and hf.get("use_sliding_window"):
        window, first = hf.get("sliding_window", 4096), hf.get("max_window_layers", 28)
        kinds = hf.get("layer_types") or [
            "sliding_attention" if i >= first else "full_attention" for i in range(layers)
        ]
    return {
        "vocab_size": hf["vocab_size"],
        "positions": positions,
        "width": width,
        "layers": layers,
        "heads": heads,
        "kv_heads": hf.get("num_key_value_heads", _KEY_HEADS[kind]) or heads,
        "head_size": head,
        "mlp_width": hf["intermediate_size"],
        "activation": activation(hf, "hidden_act", "silu"),
        "gated": True,
        "norm": NormKind.RMS,
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "qk_norm": kind == "qwen3",
        "qkv_bias": bias or kind == "qwen2",
        "out_bias": bias,
        "mlp_bias": hf.get("mlp_bias", False),
        "learned_positions": False,
        "rotary": rotary(rope_settings(hf), base=10000.0, head=head, positions=positions),
        "windows": windows(window, kinds, layers),
        "tied": hf.get("tie_word_embeddings", False),
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
        *norm(f"{at}.post_attention_layernorm", f"{layer}/mlp_norm", bias=False),
        *(
            r
            for x in ("gate", "up", "down")
            for r in linear(f"{at}.mlp.{x}_proj", f"{layer}/mlp/{x}", bias=config.mlp_bias)
        ),
        *norm("model.norm", "final_norm", bias=False),
        *([] if config.tied else [Rule("lm_head.weight", ("unembedding",))]),
    ]


_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
FAMILY = Family(
    classes={
        kind: (f"{name}ForCausalLM", f"{name}ForSequenceClassification")
        for kind, name in _CLASSES.items()
    },
    config=config,
    rules=rules,
    prefix="model.",
    ignored=re.compile(r".*\.rotary_emb\.inv_freq"),
)
