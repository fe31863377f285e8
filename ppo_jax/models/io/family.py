"""What a model family is, and helpers to read the settings that several families share."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from ppo_jax.models.config import Activation, Rotary, TransformerConfig
from ppo_jax.models.io.weights import Rule, expand

HFConfig = dict[str, Any]  # A parsed `config.json`.
ConfigFields = dict[str, Any]  # Keyword arguments of `TransformerConfig`.


class Family(NamedTuple):
    """A family of models: how its `config.json` and its tensors map to our config and parameters.

    Attributes:
      classes: for each `model_type`, the names of two classes of `transformers`: the language model
        and the sequence classifier.
      config: function from the parsed `config.json` to the fields of `TransformerConfig`. `dtype`
        and `remat` are set elsewhere, and `init_std` is `initializer_range` if it is left out. The
        function raises ValueError for a setting that the decoder does not support.
      rules: function from a config to the table of its tensors, with the names that they have in
        the language model class.
      prefix: the start of the names of the trunk's tensors in that class. Files of the trunk alone
        (without a head) lack it.
      score: rules of the head of the sequence classifier; the paths are those of `models.heads`.
      ignored: pattern of the full names of stored tensors that are not parameters.
    """

    classes: dict[str, tuple[str, str]]
    config: Callable[[HFConfig], ConfigFields]
    rules: Callable[[TransformerConfig], list[Rule]]
    prefix: str
    score: tuple[Rule, ...] = (Rule("score.weight", ("kernel",), transpose=True),)
    ignored: re.Pattern[str] = re.compile(r"(?!)")

    def table(self, config: TransformerConfig) -> list[Rule]:
        """Return the rules with those of a layer repeated for each layer."""
        return expand(self.rules(config), config.layers)

    def untied_names(self, config: TransformerConfig) -> set[str]:
        """Return the names of the tensors that only a model with an untied output matrix needs.

        The file of a tied model may contain them too, as copies of the embedding and output bias.
        """
        untied, tied = (
            {rule.stored for rule in self.rules(dataclasses.replace(config, tied=tied))}
            for tied in (False, True)
        )
        return untied - tied


def renamed(rules: list[Rule], prefixes: dict[str, str]) -> list[Rule]:
    """Return the rules of another family with the start of every stored name replaced.

    Args:
      rules: the rules of the other family.
      prefixes: maps the start of a name, up to a dot, to its replacement. The first entry that
        matches a name is used; every name needs one.
    """

    def rename(rule: Rule) -> Rule:
        old = next(prefix for prefix in prefixes if rule.stored.startswith(f"{prefix}."))
        return dataclasses.replace(rule, stored=prefixes[old] + rule.stored.removeprefix(old))

    return [rename(rule) for rule in rules]


def activation(hf: HFConfig, key: str, default: str) -> Activation:
    """Return the activation function that a `config.json` names.

    Args:
      hf: the parsed `config.json`.
      key: the key of the activation.
      default: the name to use if the key is missing.

    Raises:
      ValueError: if the activation is not supported.
    """
    name = hf.get(key) or default
    try:
        return Activation(name)
    except ValueError as error:
        known = [a.value for a in Activation]
        raise ValueError(f"{key} {name!r} is not supported; known: {known}.") from error


def rotary(
    settings: dict[str, Any], *, base: float, head: int, positions: int, share: float | None = None
) -> Rotary:
    """Return the rotary position embedding of a config's `rope_parameters` or `rope_scaling`.

    Args:
      settings: those parameters, as `rope_settings` returns them.
      base: the base of the wavelengths if `settings` has no `rope_theta`.
      head: `C`, the width of a head.
      positions: length of the training sequences if `settings` does not give it.
      share: share of each head that rotates if `settings` has no `partial_rotary_factor`. If None,
        the whole head rotates and `partial_rotary_factor` is ignored.

    Raises:
      ValueError: if the kind of scaling is not supported.
    """
    kind = settings.get("rope_type") or settings.get("type") or "default"
    base = float(settings.get("rope_theta") or base)
    width = head if share is None else int(head * (settings.get("partial_rotary_factor") or share))
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(f"rope_type {kind!r} is not supported; known: default, linear, llama3.")
    scale = 1.0 if kind == "default" else float(settings["factor"])
    bands = None
    if kind == "llama3":
        length = settings.get("original_max_position_embeddings") or positions
        bands = (length / settings["low_freq_factor"], length / settings["high_freq_factor"])
    return Rotary(base=base, width=width, scale=scale, bands=bands)


def rope_settings(hf: HFConfig) -> dict[str, Any]:
    """Return the rotary settings of a `config.json` in the form of its newest version.

    Older files name them `rope_scaling`, and have some of them at the top level.
    """
    settings = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    for key in ("rope_theta", "partial_rotary_factor"):
        if hf.get(key) is not None:
            settings.setdefault(key, hf[key])
    return settings


def windows(hf: HFConfig, kinds: list[str]) -> tuple[int | None, ...] | None:
    """Return the attention window of each layer, or None if no layer has one.

    Args:
      hf: a config with `sliding_window`, the number of positions that a window contains.
      kinds: the kind of each layer, as in `layer_types`; those of kind `sliding_attention` have a
        window.

    Raises:
      ValueError: if there is not one kind per layer.
    """
    size, layers = hf.get("sliding_window", 4096), hf["num_hidden_layers"]
    if len(kinds) != layers:
        raise ValueError(f"layer_types has {len(kinds)} entries for {layers} layers.")
    sizes = tuple(size if kind == "sliding_attention" else None for kind in kinds)
    return sizes if any(sizes) else None
