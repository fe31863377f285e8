"""Llama 2 and 3, SmolLM2, Mistral, Qwen2, Qwen2.5 and Qwen3.

They share one table; the config says which biases, norms and windows a model has.
"""

import re

from ppo_jax.models.config import NormKind, TransformerConfig
from ppo_jax.models.io.family import (
    ConfigFields,
    Family,
    HFConfig,
    activation,
    rope_settings,
    rotary,
    windows,
)
from ppo_jax.models.io.weights import Rule, linear, norm

# Defaults of `transformers` for keys that a config.json lacks, by `model_type`. A key that is
# present with the value null means something else.
_POSITIONS = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
_KEY_HEADS = {"llama": None, "mistral": 8, "qwen2": 32, "qwen3": 32}


def config(hf: HFConfig) -> ConfigFields:
    """Return the fields of `TransformerConfig` of a `config.json` of one of these models."""
    kind, shared = hf["model_type"], shared_fields(hf)
    heads = hf["num_attention_heads"]
    head = hf.get("head_dim", 128 if kind == "qwen3" else None) or hf["hidden_size"] // heads
    positions = hf.get("max_position_embeddings", _POSITIONS[kind])
    return {
        **shared,
        "positions": positions,
        "kv_heads": hf.get("num_key_value_heads", _KEY_HEADS[kind]) or heads,
        "head_size": head,
        "activation": activation(hf, "hidden_act", "silu"),
        "norm": NormKind.RMS,
        "qk_norm": kind == "qwen3",
        "qkv_bias": shared["qkv_bias"] or kind == "qwen2",
        "mlp_bias": hf.get("mlp_bias", False),
        "rotary": rotary(rope_settings(hf), base=10000.0, head=head, positions=positions),
        "windows": windows(hf, _layer_types(hf)),
        "tied": hf.get("tie_word_embeddings", False),
    }


def shared_fields(hf: HFConfig) -> ConfigFields:
    """Return the fields that Llama and its relatives, among them Gemma, read from the same keys."""
    bias = hf.get("attention_bias", False)
    return {
        "vocab_size": hf["vocab_size"],
        "width": hf["hidden_size"],
        "layers": hf["num_hidden_layers"],
        "heads": hf["num_attention_heads"],
        "mlp_width": hf["intermediate_size"],
        "gated": True,
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "qkv_bias": bias,
        "out_bias": bias,
        "learned_positions": False,
    }


def _layer_types(hf: HFConfig) -> list[str]:
    """Return the kind of attention of each layer, by the names of `layer_types` in a config."""
    kind, layers = hf["model_type"], hf["num_hidden_layers"]
    if kind == "mistral":
        return ["sliding_attention"] * layers
    if kind == "llama" or not hf.get("use_sliding_window"):
        return ["full_attention"] * layers
    first = hf.get("max_window_layers", 28)
    return hf.get("layer_types") or [
        "sliding_attention" if i >= first else "full_attention" for i in range(layers)
    ]


def rules(config: TransformerConfig) -> list[Rule]:
    """Return the table of the tensors of one of these models."""
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
