"""The table of the mesh axes over which each parameter is sharded.

A new kind of layer needs a new line in `RULES` and nothing else.
"""

import re
from typing import Any, NamedTuple

import jax

Axes = tuple[Any, ...]
"""For each dimension of an array, the mesh axis or a tuple of axes that shard it, None if it is
not sharded, or `PartitionSpec.UNCONSTRAINED` if the compiler chooses."""


class ShardRule(NamedTuple):
    """The mesh axes of all parameters whose path matches.

    Attributes:
      path: a regular expression for the last components of the path of a parameter, which is
        written with slashes, such as `layer_0/attn/q/kernel`.
      axes: for each dimension of the parameter, the mesh axis that shards it, or None.

    Example:
      >>> import numpy as np
      >>> from jax.sharding import AbstractMesh, AxisType
      >>> from ppo_jax.sharding import AXES, shardings
      >>> rules = (ShardRule(r"bias", (None,)), *RULES)
      >>> mesh = AbstractMesh((1, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)
      >>> shardings({"mlp": {"up": {"bias": np.zeros(8)}}}, mesh, rules)["mlp"]["up"]["bias"].spec
      P(None,)
    """

    path: str
    axes: Axes


# Layers whose output dimension is sharded over `tensor`, and layers that read such an output.
_COLUMN = r"(attn/(q|k|v)|mlp/(up|gate)|lm_dense|pooler|pre_classifier)"
_ROW = r"(attn/o|mlp/down)"

RULES = (
    ShardRule(r"(embedding|unembedding)", ("tensor", "fsdp")),
    ShardRule(r"(position|type)_embedding", (None, "fsdp")),
    ShardRule(rf"{_COLUMN}/kernel", ("fsdp", "tensor")),
    ShardRule(rf"{_COLUMN}/bias", ("tensor",)),
    ShardRule(rf"{_ROW}/kernel", ("tensor", "fsdp")),
    ShardRule(rf"{_ROW}/bias", (None,)),
    ShardRule(rf"{_COLUMN}/lora_a", ("fsdp", None)),
    ShardRule(rf"{_COLUMN}/lora_b", (None, "tensor")),
    ShardRule(rf"{_ROW}/lora_a", ("tensor", None)),
    ShardRule(rf"{_ROW}/lora_b", (None, "fsdp")),
    ShardRule(r"\w*norm/(scale|bias)", (None,)),
    ShardRule(r"lm_bias", ("tensor",)),
    ShardRule(r"head/kernel", (None, None)),
    ShardRule(r"head/bias", (None,)),
)
"""The rules for the parameters of all model families, and for the optimizer states of these."""

DECODING_RULES = (
    ShardRule(r"(embedding|unembedding)", (("tensor", "fsdp"), None)),
    ShardRule(rf"{_COLUMN}/(kernel|lora_b)", (None, ("tensor", "fsdp"))),
    ShardRule(rf"{_COLUMN}/lora_a", (None, None)),
    ShardRule(rf"{_ROW}/lora_a", ("tensor", None)),
    *RULES,
)
"""The rules while decoding, where products shard their output features over `fsdp`.

A step then moves activations of one position between the devices instead of all parameters (Pope et
al. 2022, https://arxiv.org/abs/2211.05102, section 3.2).
"""


def axes_of(path: tuple[Any, ...], rank: int, rules: tuple[ShardRule, ...]) -> Axes:
    """Return the axes of the first rule that matches the path of a parameter."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    for rule in rules:
        if re.fullmatch(rf"(.*/)?{rule.path}", name):
            if len(rule.axes) != rank:
                raise ValueError(
                    f"The sharding rule {rule.path!r} has {len(rule.axes)} axes; the parameter"
                    f" {name} has {rank}."
                )
            return rule.axes
    raise ValueError(
        f"No sharding rule matches the parameter {name}; add one to RULES in "
        "ppo_jax/sharding_rules.py."
    )
