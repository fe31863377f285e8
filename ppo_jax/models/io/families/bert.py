"""BERT, as a causal policy (`is_decoder` in its config) or as a sentence encoder."""

import re

from ppo_jax.models.config import NormAt, TransformerConfig
from ppo_jax.models.io.family import ConfigFields, Family, HFConfig, activation
from ppo_jax.models.io.weights import Rule, linear, norm


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


def rules(config: TransformerConfig) -> list[Rule]:
    """Return the table of the tensors of a BERT."""
    at, layer = "bert.encoder.layer.{i}", "layer_{i}"
    names = {"q": "query", "k": "key", "v": "value"}
    trunk = [
        Rule("bert.embeddings.word_embeddings.weight", ("embedding",)),
        Rule("bert.embeddings.position_embeddings.weight", ("position_embedding",)),
        Rule("bert.embeddings.token_type_embeddings.weight", ("type_embedding",)),
        *norm("bert.embeddings.LayerNorm", "embedding_norm"),
        *(
            rule
            for x, name in names.items()
            for rule in linear(f"{at}.attention.self.{name}", f"{layer}/attn/{x}")
        ),
        *linear(f"{at}.attention.output.dense", f"{layer}/attn/o"),
        *norm(f"{at}.attention.output.LayerNorm", f"{layer}/attn_norm"),
        *linear(f"{at}.intermediate.dense", f"{layer}/mlp/up"),
        *linear(f"{at}.output.dense", f"{layer}/mlp/down"),
        *norm(f"{at}.output.LayerNorm", f"{layer}/mlp_norm"),
    ]
    if not config.lm_transform:
        return trunk
    # An untied model stores the output matrix, and the output bias under a second name.
    untied = [
        Rule("cls.predictions.decoder.weight", ("unembedding",)),
        Rule("cls.predictions.decoder.bias", ("lm_bias",)),
    ]
    return [
        *trunk,
        *linear("cls.predictions.transform.dense", "lm_dense"),
        *norm("cls.predictions.transform.LayerNorm", "lm_norm"),
        Rule("cls.predictions.bias", ("lm_bias",)),
        *([] if config.tied else untied),
    ]


FAMILY = Family(
    classes={"bert": ("BertLMHeadModel", "BertForSequenceClassification")},
    config=config,
    rules=rules,
    prefix="bert.",
    score=(
        *linear("bert.pooler.dense", "pooler"),
        Rule("classifier.weight", ("kernel",), transpose=True),
        Rule("classifier.bias", ("bias",)),
    ),
    # A table of position numbers, and the next-sentence head of a pretraining checkpoint.
    ignored=re.compile(r".*\.position_ids|cls\.seq_relationship\..*"),
)
