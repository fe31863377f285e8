"""BERT, as a causal policy (`is_decoder` in its config) or as a sentence encoder."""

import re

from ppo_jax.models.config import NormAt
from ppo_jax.models.io.family import ConfigFields, Family, HFConfig, activation


def config(hf: HFConfig) -> ConfigFields:
    """Return the fields of `TransformerConfig` of a BERT's `config.json`."""
    if hf.get("add_cross_attention"):
        raise ValueError(
            "A BERT with add_cross_attention=true is part of an encoder-decoder model, which is "
            "not supported."
        )
    if hf.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(
            f"position_embedding_type {hf['position_embedding_type']!r} is not supported; known: "
            "'absolute'."
        )
    return {
        "vocab_size": hf.get("vocab_size", 30522),
        "positions": hf.get("max_position_embeddings", 512),
        "width": hf.get("hidden_size", 768),
        "layers": hf.get("num_hidden_layers", 12),
        "heads": hf.get("num_attention_heads", 12),
        "mlp_width": hf.get("intermediate_size", 3072),
        "activation": activation(hf, "hidden_act", "gelu"),
        "norm_at": NormAt.AFTER,
        "norm_eps": hf.get("layer_norm_eps", 1e-12),
        "causal": hf.get("is_decoder", False),
        "embedding_norm": True,
        "token_types": hf.get("type_vocab_size", 2),
        "tied": hf.get("tie_word_embeddings", True),
        "lm_transform": True,
    }


def trunk(prefix: str) -> dict[str, str]:
    """Return the names of the tensors of a BERT without its output layers, which start so."""
    at, layer = f"{prefix}.encoder.layer.{{i}}", "layer_{i}"
    names = {"q": "query", "k": "key", "v": "value"}
    return {
        "embedding": f"{prefix}.embeddings.word_embeddings.weight",
        "position_embedding": f"{prefix}.embeddings.position_embeddings.weight",
        "type_embedding": f"{prefix}.embeddings.token_type_embeddings.weight",
        "embedding_norm": f"{prefix}.embeddings.LayerNorm",
        **{f"{layer}/attn/{x}": f"{at}.attention.self.{name}" for x, name in names.items()},
        f"{layer}/attn/o": f"{at}.attention.output.dense",
        f"{layer}/attn_norm": f"{at}.attention.output.LayerNorm",
        f"{layer}/mlp/up": f"{at}.intermediate.dense",
        f"{layer}/mlp/down": f"{at}.output.dense",
        f"{layer}/mlp_norm": f"{at}.output.LayerNorm",
    }


FAMILY = Family(
    classes={"bert": ("BertLMHeadModel", "BertForSequenceClassification")},
    config=config,
    tensors={
        **trunk("bert"),
        "lm_dense": "cls.predictions.transform.dense",
        "lm_norm": "cls.predictions.transform.LayerNorm",
        "lm_bias": "cls.predictions.bias",
    },
    # An untied model stores the output matrix, and the output bias under a second name.
    untied={
        "unembedding": "cls.predictions.decoder.weight",
        "lm_bias": "cls.predictions.decoder.bias",
    },
    prefix="bert.",
    head={
        "pooler/kernel": "bert.pooler.dense.weight",
        "pooler/bias": "bert.pooler.dense.bias",
        "kernel": "classifier.weight",
        "bias": "classifier.bias",
    },
    # A table of position numbers, and the next-sentence head of a pretraining checkpoint.
    ignored=re.compile(r".*\.position_ids|cls\.seq_relationship\..*"),
)
