"""GPT-Neo: layers with full attention alternate with layers that have a window, as in GPT-3."""

import re

from ppo_jax.models.io.families import gpt2
from ppo_jax.models.io.family import ConfigFields, Family, HFConfig, activation


def config(hf: HFConfig) -> ConfigFields:
    """Return the fields of `TransformerConfig` of a GPT-Neo's `config.json`."""
    layers, width = hf.get("num_layers", 24), hf.get("hidden_size", 2048)
    patterns = hf.get("attention_types", [[["global", "local"], 12]])
    kinds = [kind for pattern, times in patterns for _ in range(times) for kind in pattern]
    return {
        "vocab_size": hf.get("vocab_size", 50257),
        "positions": hf.get("max_position_embeddings", 2048),
        "width": width,
        "layers": layers,
        "heads": hf.get("num_heads", 16),
        "mlp_width": hf.get("intermediate_size") or 4 * width,
        "activation": activation(hf, "activation_function", "gelu_new"),
        "norm_eps": hf.get("layer_norm_epsilon", 1e-5),
        "qkv_bias": False,
        "windows": tuple(hf.get("window_size", 256) if kind == "local" else None for kind in kinds),
        "attention_scale": 1.0,
        "tied": hf.get("tie_word_embeddings", True),
    }


_ATTENTION = "transformer.h.{i}.attn.attention"
FAMILY = Family(
    classes={"gpt_neo": ("GPTNeoForCausalLM", "GPTNeoForSequenceClassification")},
    config=config,
    tensors={
        **gpt2.TENSORS,
        **{f"layer_{{i}}/attn/{x}": f"{_ATTENTION}.{x}_proj" for x in "qkv"},
        "layer_{i}/attn/o": f"{_ATTENTION}.out_proj",
    },
    prefix="transformer.",
    ignored=re.compile(r".*\.attn\.attention\.(bias|masked_bias)"),
)
