"""DistilBERT: a BERT encoder without token types, under other names. It cannot be a policy."""

from ppo_jax.models.io.families import bert
from ppo_jax.models.io.family import ConfigFields, Family, HFConfig, activation

# Keys of the config.json, as named by BERT and by DistilBERT.
_KEYS = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
}
# Settings of BERT that DistilBERT does not have.
_FIXED = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "is_decoder": False, "type_vocab_size": 0}


def config(hf: HFConfig) -> ConfigFields:
    """Return the fields of `TransformerConfig` of a DistilBERT's `config.json`."""
    renamed_keys = {bert_key: hf[key] for bert_key, key in _KEYS.items() if key in hf}
    fields = bert.config({"num_hidden_layers": 6, **hf, **renamed_keys, **_FIXED})
    return {**fields, "activation": activation(hf, "activation", "gelu")}


_AT, _LAYER = "distilbert.transformer.layer.{i}", "layer_{i}"
FAMILY = Family(
    classes={"distilbert": ("DistilBertForMaskedLM", "DistilBertForSequenceClassification")},
    config=config,
    tensors={
        "embedding": "distilbert.embeddings.word_embeddings.weight",
        "position_embedding": "distilbert.embeddings.position_embeddings.weight",
        "embedding_norm": "distilbert.embeddings.LayerNorm",
        **{f"{_LAYER}/attn/{x}": f"{_AT}.attention.{x}_lin" for x in "qkv"},
        f"{_LAYER}/attn/o": f"{_AT}.attention.out_lin",
        f"{_LAYER}/attn_norm": f"{_AT}.sa_layer_norm",
        f"{_LAYER}/mlp/up": f"{_AT}.ffn.lin1",
        f"{_LAYER}/mlp/down": f"{_AT}.ffn.lin2",
        f"{_LAYER}/mlp_norm": f"{_AT}.output_layer_norm",
        "lm_dense": "vocab_transform",
        "lm_norm": "vocab_layer_norm",
        "lm_bias": "vocab_projector.bias",
    },
    untied={"unembedding": "vocab_projector.weight"},
    prefix="distilbert.",
    head={
        "pre_classifier/kernel": "pre_classifier.weight",
        "pre_classifier/bias": "pre_classifier.bias",
        "kernel": "classifier.weight",
        "bias": "classifier.bias",
    },
    ignored=bert.FAMILY.ignored,
)
