"""GPT-NeoX and Pythia: a part of each head rotates, and attention and MLP run in parallel."""

import re

from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.io.family import (
    ConfigFields,
    Family,
    HFConfig,
    activation,
    rope_settings,
    rotary,
)
from ppo_jax.models.io.weights import Rule, linear, norm


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


def rules(config: TransformerConfig) -> list[Rule]:
    """Return the table of the tensors of a GPT-NeoX."""
    at, layer = "gpt_neox.layers.{i}", "layer_{i}"
    qkv = [f"{layer}/attn/{x}" for x in "qkv"]
    return [
        Rule("gpt_neox.embed_in.weight", ("embedding",)),
        *norm(f"{at}.input_layernorm", f"{layer}/attn_norm"),
        *linear(f"{at}.attention.query_key_value", *qkv, bias=config.qkv_bias, heads=config.heads),
        *linear(f"{at}.attention.dense", f"{layer}/attn/o", bias=config.out_bias),
        *norm(f"{at}.post_attention_layernorm", f"{layer}/mlp_norm"),
        *linear(f"{at}.mlp.dense_h_to_4h", f"{layer}/mlp/up"),
        *linear(f"{at}.mlp.dense_4h_to_h", f"{layer}/mlp/down"),
        *norm("gpt_neox.final_layer_norm", "final_norm"),
        *([] if config.tied else [Rule("embed_out.weight", ("unembedding",))]),
    ]


FAMILY = Family(
    classes={"gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXForSequenceClassification")},
    config=config,
    rules=rules,
    prefix="gpt_neox.",
    ignored=re.compile(r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"),
)
