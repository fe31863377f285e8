"""DistilBERT: a BERT encoder without token types, under other names. It cannot be a policy."""

from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.io.families import bert
from ppo_jax.models.io.family import ConfigFields, Family, HFConfig, activation, renamed
from ppo_jax.models.io.weights import Rule, linear

# Keys of the config.json, as named by BERT and by DistilBERT.
_KEYS = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
}
# Settings of BERT that DistilBERT does not have.
_FIXED = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "is_decoder": False, "type_vocab_size": 0}
_BERT, _OWN = "bert.encoder.layer.{i}", "distilbert.transformer.layer.{i}"
# Names of the tensors, as stored by BERT and by DistilBERT.
_NAMES = {
    "bert.embeddings": "distilbert.embeddings",
    f"{_BERT}.attention.self.query": f"{_OWN}.attention.q_lin",
    f"{_BERT}.attention.self.key": f"{_OWN}.attention.k_lin",
    f"{_BERT}.attention.self.value": f"{_OWN}.attention.v_lin",
    f"{_BERT}.attention.output.dense": f"{_OWN}.attention.out_lin",
    f"{_BERT}.attention.output.LayerNorm": f"{_OWN}.sa_layer_norm",
    f"{_BERT}.intermediate.dense": f"{_OWN}.ffn.lin1",
    f"{_BERT}.output.dense": f"{_OWN}.ffn.lin2",
    f"{_BERT}.output.LayerNorm": f"{_OWN}.output_layer_norm",
    "cls.predictions.transform.dense": "vocab_transform",
    "cls.predictions.transform.LayerNorm": "vocab_layer_norm",
}


def config(hf: HFConfig) -> ConfigFields:
    """Return the fields of `TransformerConfig` of a DistilBERT's `config.json`."""
    renamed_keys = {bert_key: hf[key] for bert_key, key in _KEYS.items() if key in hf}
    fields = bert.config({"num_hidden_layers": 6, **hf, **renamed_keys, **_FIXED})
    return {**fields, "activation": activation(hf, "activation", "gelu")}


def rules(config: TransformerConfig) -> list[Rule]:
    """Return the table of the tensors of a DistilBERT."""
    # DistilBERT has no token types, and stores the output matrix and bias as one layer.
    absent = {("type_embedding",), ("lm_bias",), ("unembedding",)}
    shared = renamed([rule for rule in bert.rules(config) if rule.paths not in absent], _NAMES)
    if not config.lm_transform:
        return shared
    matrix = [] if config.tied else [Rule("vocab_projector.weight", ("unembedding",))]
    return [*shared, Rule("vocab_projector.bias", ("lm_bias",)), *matrix]


FAMILY = Family(
    classes={"distilbert": ("DistilBertForMaskedLM", "DistilBertForSequenceClassification")},
    config=config,
    rules=rules,
    prefix="distilbert.",
    score=(
        *linear("pre_classifier", "pre_classifier"),
        Rule("classifier.weight", ("kernel",), transpose=True),
        Rule("classifier.bias", ("bias",)),
    ),
    ignored=bert.FAMILY.ignored,
)
