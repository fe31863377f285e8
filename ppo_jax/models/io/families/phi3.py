"""Phi-3: a Llama that stores query, key and value as one matrix, and so gate and up.

The versions whose positions are scaled by `longrope` are not supported.
"""

from ppo_jax.models.config import NormKind
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
    """Return the fields of `TransformerConfig` of a Phi-3's `config.json`."""
    width, heads = hf.get("hidden_size", 3072), hf.get("num_attention_heads", 32)
    layers, head = hf.get("num_hidden_layers", 32), hf.get("head_dim") or width // heads
    positions = hf.get("max_position_embeddings", 4096)
    kinds = ["full_attention" if hf.get("sliding_window") is None else "sliding_attention"]
    return {
        "vocab_size": hf.get("vocab_size", 32064),
        "positions": positions,
        "width": width,
        "layers": layers,
        "heads": heads,
        "kv_heads": hf.get("num_key_value_heads") or heads,
        "head_size": head,
        "mlp_width": hf.get("intermediate_size", 8192),
        "activation": activation(hf, "hidden_act", "silu"),
        "gated": True,
        "norm": NormKind.RMS,
        "norm_eps": hf.get("rms_norm_eps", 1e-5),
        "qkv_bias": False,
        "out_bias": False,
        "mlp_bias": False,
        "learned_positions": False,
        "rotary": rotary(
            rope_settings(hf), base=10000.0, head=head, positions=positions, share=1.0
        ),
        "windows": windows({**hf, "num_hidden_layers": layers}, kinds * layers),
        "tied": hf.get("tie_word_embeddings", False),
    }


_AT, _LAYER = "model.layers.{i}", "layer_{i}"
FAMILY = Family(
    classes={"phi3": ("Phi3ForCausalLM", "Phi3ForSequenceClassification")},
    config=config,
    tensors={
        **llama.TENSORS,
        **{f"{_LAYER}/attn/{x}": f"{_AT}.self_attn.qkv_proj" for x in "qkv"},
        **{f"{_LAYER}/mlp/{x}": f"{_AT}.mlp.gate_up_proj" for x in ("gate", "up")},
    },
    prefix="model.",
    pad_id=32000,
    ignored=llama.FAMILY.ignored,
)
