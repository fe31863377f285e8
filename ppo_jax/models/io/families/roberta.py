"""RoBERTa and XLM-RoBERTa: BERT under other names, with positions that start after the pad id."""

import re

from ppo_jax.models.config import Activation
from ppo_jax.models.io.families import bert
from ppo_jax.models.io.family import ConfigFields, Family, HFConfig, activation


def config(hf: HFConfig) -> ConfigFields:
    """Return the fields of `TransformerConfig` of a RoBERTa's `config.json`."""
    # The dense layer before the output has GELU whatever the config says, and we have one for all.
    if activation(hf, "hidden_act", "gelu") is not Activation.GELU:
        raise ValueError(
            f"hidden_act {hf['hidden_act']!r} is not supported in RoBERTa; known: 'gelu'."
        )
    first = 1 + hf.get("pad_token_id", 1)
    fields = bert.config({"vocab_size": 50265, **hf} if hf["model_type"] == "roberta" else hf)
    return {**fields, "position_offset": first, "positions": fields["positions"] - first}


FAMILY = Family(
    classes={
        "roberta": ("RobertaForCausalLM", "RobertaForSequenceClassification"),
        "xlm-roberta": ("XLMRobertaForCausalLM", "XLMRobertaForSequenceClassification"),
    },
    config=config,
    tensors={
        **bert.trunk("roberta"),
        "lm_dense": "lm_head.dense",
        "lm_norm": "lm_head.layer_norm",
        "lm_bias": "lm_head.bias",
    },
    untied={"unembedding": "lm_head.decoder.weight", "lm_bias": "lm_head.decoder.bias"},
    prefix="roberta.",
    head={
        "pooler/kernel": "classifier.dense.weight",
        "pooler/bias": "classifier.dense.bias",
        "kernel": "classifier.out_proj.weight",
        "bias": "classifier.out_proj.bias",
    },
    ignored=re.compile(r".*\.position_ids"),
)
