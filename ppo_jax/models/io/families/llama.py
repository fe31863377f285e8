"""Llama 2 and 3, SmolLM2, Mistral, Qwen2, Qwen2.5 and Qwen3.

They share one table; the config says which biases, norms and windows a model has.
"""

import re

from ppo_jax.models.config import NormKind
from ppo_jax.models.io.family import (
    ConfigFields,
    Family,
    HFConfig,
    activation,
    rope_settings,
    rotary,
    windows,
)

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


_AT, _LAYER = "model.layers.{i}", "layer_{i}"
TENSORS = {
    "embedding": "model.embed_tokens.weight",
    f"{_LAYER}/attn_norm": f"{_AT}.input_layernorm",
    **{f"{_LAYER}/attn/{x}": f"{_AT}.self_attn.{x}_proj" for x in "qkv"},
    **{f"{_LAYER}/attn/{x}_norm": f"{_AT}.self_attn.{x}_norm" for x in "qk"},
    f"{_LAYER}/attn/o": f"{_AT}.self_attn.o_proj",
    f"{_LAYER}/mlp_norm": f"{_AT}.post_attention_layernorm",
    **{f"{_LAYER}/mlp/{x}": f"{_AT}.mlp.{x}_proj" for x in ("gate", "up", "down")},
    "final_norm": "model.norm",
}
FAMILY = Family(
    classes={
        "llama": ("LlamaForCausalLM", "LlamaForSequenceClassification"),
        "mistral": ("MistralForCausalLM", "MistralForSequenceClassification"),
        "qwen2": ("Qwen2ForCausalLM", "Qwen2ForSequenceClassification"),
        "qwen3": ("Qwen3ForCausalLM", "Qwen3ForSequenceClassification"),
    },
    config=config,
    tensors=TENSORS,
    prefix="model.",
    ignored=re.compile(r".*\.rotary_emb\.inv_freq"),
)
