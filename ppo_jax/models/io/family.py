"""What a family of models is: how its `config.json` becomes ours, and where its tensors go."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from ppo_jax.models.config import Activation, Rotary, TransformerConfig
from ppo_jax.models.io.weights import Rule


class Family(NamedTuple):
    """One family.

    Attributes:
      classes: each `model_type`, with the names of its classes in `transformers`: for text, and for a score.
      config: fields of `TransformerConfig` of a `config.json`; raises ValueError for a switch that the decoder does not have.
      rules: the table of a config's tensors, names as in the class for text.
      prefix: what the names of the trunk begin with there; files of the bare trunk lack it.
      score: the rules of the head of a model that scores, paths as in `models.heads`.
      ignored: names of stored tensors that are no parameters.
    """

    classes: dict[str, tuple[str, str]]
    config: Callable[[dict[str, Any]], dict[str, Any]]
    rules: Callable[[TransformerConfig], list[Rule]]
    prefix: str
    score: tuple[Rule, ...] = (Rule("score.weight", ("kernel",), transpose=True),)
    ignored: re.Pattern = re.compile(r"(?!)")


def renamed(rules: list[Rule], names: dict[str, str]) -> list[Rule]:
    """Another family's rules, where the first of `names` that a stored name begins with has become its own."""

    def own(rule: Rule) -> Rule:
        theirs = next(name for name in names if rule.stored.startswith(f"{name}."))
        return dataclasses.replace(rule, stored=names[theirs] + rule.stored.removeprefix(theirs))

    return [own(rule) for rule in rules]


def activation(hf: dict[str, Any], key: str, default: str) -> Activation:
    """The activation that a config names.

    Raises:
      ValueError: if it is none of ours.
    """
    name = hf.get(key) or default
    if name not in [a.value for a in Activation]:
        raise ValueError(
            f"{key} {name!r} is not supported; known: {[a.value for a in Activation]}."
        )
    return Activation(name)


def rotary(
    settings: dict[str, Any], *, base: float, head: int, positions: int, share: float | None = None
) -> Rotary:
    """Rotary positions of a config's `rope_parameters` (or the older `rope_scaling`).

    Args:
      settings: those.
      base: where they hold no `rope_theta`.
      head: `C`.
      positions: those that the model was trained on, where they do not say.
      share: of each head that rotates, where they hold no `partial_rotary_factor`; if None, all of it whatever they hold.

    Raises:
      ValueError: for a kind that is not supported.
    """
    kind = settings.get("rope_type") or settings.get("type") or "default"
    base = float(settings.get("rope_theta") or base)
    width = head if share is None else int(head * (settings.get("partial_rotary_factor") or share))
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(f"rope_type {kind!r} is not supported; known: default, linear, llama3.")
    if kind == "default":
        return Rotary(base=base, width=width)
    factor = float(settings["factor"])
    if kind == "linear":
        return Rotary(base=base, width=width, scale=factor)
    old = settings.get("original_max_position_embeddings") or positions
    bands = (old / settings["low_freq_factor"], old / settings["high_freq_factor"])
    return Rotary(base=base, width=width, scale=factor, bands=bands)


def rope_settings(hf: dict[str, Any]) -> dict[str, Any]:
    """What a config of any age says of its rotary positions."""
    settings = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    if hf.get("rope_theta") is not None:
        settings.setdefault("rope_theta", hf["rope_theta"])
    if hf.get("partial_rotary_factor") is not None:
        settings.setdefault("partial_rotary_factor", hf["partial_rotary_factor"])
    return settings


def windows(size: int | None, kinds: list[str], layers: int) -> tuple[int | None, ...] | None:
    """The window of each layer, of a config's `layer_types` or what stands for them."""
    if len(kinds) != layers:
        raise ValueError(f"layer_types has {len(kinds)} entries for {layers} layers.")
    found = tuple(size if kind == "sliding_attention" else None for kind in kinds)
    return found if any(found) else None
