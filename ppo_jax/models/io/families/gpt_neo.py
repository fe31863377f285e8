"""GPT-Neo: layers with full attention alternate with layers that have a window, as in GPT-3."""

import re

from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.io.family import ConfigFields, Family, HFConfig, activation
from ppo_jax.models.io.weights import Rule, linear, norm


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


def rules(config: TransformerConfig) -> list[Rule]:
    """Return the table of the tensors of a GPT-Neo."""
    at, layer = "transformer.h.{i}", "layer_{i}"
    return [
        Rule("transformer.wte.weight", ("embedding",)),
        Rule("transformer.wpe.weight", ("position_embedding",)),
        *norm(f"{at}.ln_1", f"{layer}/attn_norm"),
        *(
            rule
            for x in "qkv"
            for rule in linear(f"{at}.attn.attention.{x}_proj", f"{layer}/attn/{x}", bias=False)
        ),
        *linear(f"{at}.attn.attention.out_proj", f"{layer}/attn/o"),
        *norm(f"{at}.ln_2", f"{layer}/mlp_norm"),
        *linear(f"{at}.mlp.c_fc", f"{layer}/mlp/up"),
        *linear(f"{at}.mlp.c_proj", f"{layer}/mlp/down"),
        *norm("transformer.ln_f", "final_norm"),
        *([] if config.tied else [Rule("lm_head.weight", ("unembedding",))]),
    ]


FAMILY = Family(
    classes={"gpt_neo": ("GPTNeoForCausalLM", "GPTNeoForSequenceClassification")},
    config=config,
    rules=rules,
    prefix="transformer.",
    ignored=re.compile(r".*\.attn\.attention\.(bias|masked_bias)"),
)
