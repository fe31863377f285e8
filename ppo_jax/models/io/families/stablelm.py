"""StableLM: a Llama with layer norms, in which a part of each head rotates."""

from ppo_jax.models.config import NormKind
from ppo_jax.models.io.family import (
    ConfigFields,
    Family,
    HFConfig,
    activation,
    rope_settings,
    rotary,
)


def config(hf: HFConfig) -> ConfigFields:
    """Return the fields of `TransformerConfig` of a StableLM's `config.json`."""
    for switch in ("use_parallel_residual", "qk_layernorm"):
        if hf.get(switch):
            raise ValueError(f"A StableLM with {switch}=true is not supported.")
    width, heads = hf.get("hidden_size", 2560), hf.get("num_attention_heads", 32)
    positions = hf.get("max_position_embeddings", 4096)
    return {
        "vocab_size": hf.get("vocab_size", 50304),
        "positions": positions,
        "width": width,
        "layers": hf.get("num_hidden_layers", 32),
        "heads": heads,
        "kv_heads": hf.get("num_key_value_heads", 32),
        "mlp_width": hf.get("intermediate_size", 6912),
        "activation": activation(hf, "hidden_act", "silu"),
        "gated": True,
        "norm": NormKind.LAYER,
        "norm_eps": hf.get("layer_norm_eps", 1e-5),
        "qkv_bias": hf.get("use_qkv_bias", False),
        "out_bias": False,
        "mlp_bias": False,
        "learned_positions": False,
        "rotary": rotary(
            rope_settings(hf), base=1e4, head=width // heads, positions=positions, share=0.25
        ),
        "tied": hf.get("tie_word_embeddings", False),
    }


_AT, _LAYER = "model.layers.{i}", "layer_{i}"
FAMILY = Family(
    classes={"stablelm": ("StableLmForCausalLM", "StableLmForSequenceClassification")},
    config=config,
    tensors={
        "embedding": "model.embed_tokens.weight",
        f"{_LAYER}/attn_norm": f"{_AT}.input_layernorm",
        **{f"{_LAYER}/attn/{x}": f"{_AT}.self_attn.{x}_proj" for x in "qkvo"},
        f"{_LAYER}/mlp_norm": f"{_AT}.post_attention_layernorm",
        **{f"{_LAYER}/mlp/{x}": f"{_AT}.mlp.{x}_proj" for x in ("gate", "up", "down")},
        "final_norm": "model.norm",
    },
    prefix="model.",
)
