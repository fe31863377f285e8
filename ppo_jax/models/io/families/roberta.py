"""RoBERTa and XLM-RoBERTa: BERT whose positions begin after the padding id, with other names."""

import re
from typing import Any

from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.io.families import bert
from ppo_jax.models.io.family import Family, renamed
from ppo_jax.models.io.weights import Rule

_NAMES = {
    "cls.predictions.transform.dense": "lm_head.dense",
    "cls.predictions.transform.LayerNorm": "lm_head.layer_norm",
    "cls.predictions": "lm_head",
    "bert": "roberta",
}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    if (
        hf.get("hidden_act", "gelu") != "gelu"
    ):  # the output's layer is gelu whatever the blocks have
        raise ValueError(
            f"hidden_act {hf['hidden_act']!r} is not supported in RoBERTa; known: 'gelu'."
        )
    first = 1 + hf.get("pad_token_id", 1)
    fields = bert.config({"vocab_size": 50265, **hf} if hf["model_type"] == "roberta" else hf)
    return {**fields, "position_offset": first, "positions": fields["positions"] - first}


def rules(config: TransformerConfig) -> list[Rule]:
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
        Rule("classifier.dense.weight", ("pooler/kernel",), transpose=True),
        Rule("classifier.dense.bias", ("pooler/bias",)),
        Rule("classifier.out_proj.weight", ("kernel",), transpose=True),
        Rule("classifier.out_proj.bias", ("bias",)),
    ),
    ignored=re.compile(r".*\.position_ids"),
)
