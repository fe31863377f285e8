"""Phi-3: a Llama that stores query, key and value as one matrix, and so gate and up.

The versions whose positions are scaled by `longrope` are not supported.
"""

from ppo_jax.models.io.families import llama
from ppo_jax.models.io.family import ConfigFields, Family, HFConfig, rope_settings, rotary

# Defaults of `transformers` for keys that a config.json lacks.
_DEFAULTS = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
}


def config(hf: HFConfig) -> ConfigFields:
    """Return the fields of `TransformerConfig` of a Phi-3's `config.json`."""
    # Like Mistral's, its layers all have the window, if there is one.
    fields = llama.config({**_DEFAULTS, **hf, "model_type": "mistral"})
    head, positions = fields["head_size"], fields["positions"]
    settings = rope_settings(hf)
    turns = rotary(settings, base=10000.0, head=head, positions=positions, share=1.0)
    return {**fields, "rotary": turns}


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
