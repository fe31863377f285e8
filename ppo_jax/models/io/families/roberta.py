"""RoBERTa and XLM-RoBERTa: BERT under other names, with positions that start after the pad id."""

import re

from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.io.families import bert
from ppo_jax.models.io.family import ConfigFields, Family, HFConfig, renamed
from ppo_jax.models.io.weights import Rule, linear

_NAMES = {
    "cls.predictions.transform.dense": "lm_head.dense",
    "cls.predictions.transform.LayerNorm": "lm_head.layer_norm",
    "cls.predictions": "lm_head",
    "bert": "roberta",
}


def config(hf: HFConfig) -> ConfigFields:
    """Return the fields of `TransformerConfig` of a RoBERTa's `config.json`."""
    # The dense layer before the output has GELU whatever the config says, and we have one for all.
    if hf.get("hidden_act", "gelu") != "gelu":
        raise ValueError(
            f"hidden_act {hf['hidden_act']!r} is not supported in RoBERTa; known: 'gelu'."
        )
    first = 1 + hf.get("pad_token_id", 1)
    fields = bert.config({"vocab_size": 50265, **hf} if hf["model_type"] == "roberta" else hf)
    return {**fields, "position_offset": first, "positions": fields["positions"] - first}


def rules(config: TransformerConfig) -> list[Rule]:
    """Return the table of the tensors of a RoBERTa."""
    return renamed(bert.rules(config), _NAMES)


FAMILY = Family(
    classes={
        "roberta": ("RobertaForCausalLM", "RobertaForSequenceClassification"),
        "xlm-roberta": ("XLMRobertaForCausalLM", "XLMRobertaForSequenceClassification"),
    },
    config=config,
    rules=rules,
    prefix="roberta.",
    score=(
        *linear("classifier.dense", "pooler"),
        Rule("classifier.out_proj.weight", ("kernel",), transpose=True),
        Rule("classifier.out_proj.bias", ("bias",)),
    ),
    ignored=re.compile(r".*\.position_ids"),
)
