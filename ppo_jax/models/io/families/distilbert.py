"""DistilBERT: a BERT without token types, with other names; an encoder, never a policy."""

from typing import Any

from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.io.families import bert
from ppo_jax.models.io.family import Family, activation, renamed
from ppo_jax.models.io.weights import Rule

_CONFIG = {  # BERT's names of what DistilBERT calls otherwise
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
}
_FIXED = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "is_decoder": False, "type_vocab_size": 0}
_TENSORS = {
    "bert.embeddings": "distilbert.embeddings",
    "bert.encoder.layer.{i}.attention.self.query": "distilbert.transformer.layer.{i}.attention.q_lin",
    "bert.encoder.layer.{i}.attention.self.key": "distilbert.transformer.layer.{i}.attention.k_lin",
    "bert.encoder.layer.{i}.attention.self.value": "distilbert.transformer.layer.{i}.attention.v_lin",
    "bert.encoder.layer.{i}.attention.output.dense": "distilbert.transformer.layer.{i}.attention.out_lin",
    "bert.encoder.layer.{i}.attention.output.LayerNorm": "distilbert.transformer.layer.{i}.sa_layer_norm",
    "bert.encoder.layer.{i}.intermediate.dense": "distilbert.transformer.layer.{i}.ffn.lin1",
    "bert.encoder.layer.{i}.output.dense": "distilbert.transformer.layer.{i}.ffn.lin2",
    "bert.encoder.layer.{i}.output.LayerNorm": "distilbert.transformer.layer.{i}.output_layer_norm",
    "cls.predictions.transform.dense": "vocab_transform",
    "cls.predictions.transform.LayerNorm": "vocab_layer_norm",
}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    known = {name: hf[own] for name, own in _CONFIG.items() if own in hf}
    return {
        **bert.config({"num_hidden_layers": 6, **hf, **known, **_FIXED}),
        "activation": activation(hf, "activation", "gelu"),
    }


def rules(config: TransformerConfig) -> list[Rule]:
    # There are no token types, and the bias over words is stored once.
    absent = {("type_embedding",), ("lm_bias",), ("unembedding",)}
    found = renamed([rule for rule in bert.rules(config) if rule.ours not in absent], _TENSORS)
    if not config.lm_transform:
        return found
    matrix = [] if config.tied else [Rule("vocab_projector.weight", ("unembedding",))]
    return [*found, Rule("vocab_projector.bias", ("lm_bias",)), *matrix]


FAMILY = Family(
    classes={"distilbert": ("DistilBertForMaskedLM", "DistilBertForSequenceClassification")},
    config=config,
    rules=rules,
    prefix="distilbert.",
    score=(
        Rule("pre_classifier.weight", ("pre_classifier/kernel",), transpose=True),
        Rule("pre_classifier.bias", ("pre_classifier/bias",)),
        Rule("classifier.weight", ("kernel",), transpose=True),
        Rule("classifier.bias", ("bias",)),
    ),
    ignored=bert.FAMILY.ignored,
)
