"""GPT-NeoX and Pythia: a part of each head rotates, and attention and MLP run in parallel."""

import re

from ppo_jax.models.io.family import (
    ConfigFields,
    Family,
    HFConfig,
    activation,
    rope_settings,
    rotary,
)


def config(hf: HFConfig) -> ConfigFields:
    """Return the fields of `TransformerConfig` of a GPT-NeoX's `config.json`."""
    width, heads = hf.get("hidden_size", 6144), hf.get("num_attention_heads", 64)
    positions, bias = hf.get("max_position_embeddings", 2048), hf.get("attention_bias", True)
    return {
        "vocab_size": hf.get("vocab_size", 50432),
        "positions": positions,
        "width": width,
        "layers": hf.get("num_hidden_layers", 44),
        "heads": heads,
        "mlp_width": hf.get("intermediate_size", 24576),
        "activation": activation(hf, "hidden_act", "gelu"),
        "norm_eps": hf.get("layer_norm_eps", 1e-5),
        "parallel": hf.get("use_parallel_residual", True),
        "qkv_bias": bias,
        "out_bias": bias,
        "learned_positions": False,
        "rotary": rotary(
            rope_settings(hf),
            base=hf.get("rotary_emb_base", 10000.0),
            head=width // heads,
            positions=positions,
            share=hf.get("rotary_pct", 0.25),
        ),
        "tied": hf.get("tie_word_embeddings", False),
    }


_AT, _LAYER = "gpt_neox.layers.{i}", "layer_{i}"
FAMILY = Family(
    classes={"gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXForSequenceClassification")},
    config=config,
    tensors={
        "embedding": "gpt_neox.embed_in.weight",
        f"{_LAYER}/attn_norm": f"{_AT}.input_layernorm",
        **{f"{_LAYER}/attn/{x}": f"{_AT}.attention.query_key_value" for x in "qkv"},
        f"{_LAYER}/attn/o": f"{_AT}.attention.dense",
        f"{_LAYER}/mlp_norm": f"{_AT}.post_attention_layernorm",
        f"{_LAYER}/mlp/up": f"{_AT}.mlp.dense_h_to_4h",
        f"{_LAYER}/mlp/down": f"{_AT}.mlp.dense_4h_to_h",
        "final_norm": "gpt_neox.final_layer_norm",
    },
    untied={"unembedding": "embed_out.weight"},
    by_head=True,
    prefix="gpt_neox.",
    ignored=re.compile(r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"),
)
