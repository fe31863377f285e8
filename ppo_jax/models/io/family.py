"""What a model family is, and helpers to read the settings that several families share."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
from flax.traverse_util import flatten_dict

from ppo_jax.models.config import Activation, Rotary, TransformerConfig
from ppo_jax.models.io.weights import Rule
from ppo_jax.models.transformer import init_params
from ppo_jax.types import Params

HFConfig = dict[str, Any]  # A parsed `config.json`.
ConfigFields = dict[str, Any]  # Keyword arguments of `TransformerConfig`.

# The ends of the names of the parameters of a layer, in our tree and in the files. A single array
# has the same name as its line of a table.
_ENDS = {"": "", "/kernel": ".weight", "/scale": ".weight", "/bias": ".bias"}


class Family(NamedTuple):
    """A family of models: how its `config.json` and its tensors map to our config and parameters.

    Attributes:
      classes: for each `model_type`, the names of two classes of `transformers`: the language model
        and the sequence classifier.
      config: function from the parsed `config.json` to the fields of `TransformerConfig`. `dtype`
        and `remat` are set elsewhere, and `init_std` is `initializer_range` if it is left out. The
        function raises ValueError for a setting that the decoder does not support.
      tensors: for each layer of the decoder, by its path, such as `layer_{i}/attn/q`, its name in
        the language model class. A name that contains `{i}` is repeated for each block. An array
        that is not part of a layer, such as `embedding`, has the full name of its tensor. A line is
        used if the decoder has such a parameter. Layers with the same name are stored as one, with
        their outputs concatenated in the order of the table.
      prefix: the start of the names of the trunk's tensors in that class. Files of the trunk alone
        (without a head) lack it.
      untied: the same as `tensors`, for what only a model with an untied output matrix needs. The
        file of a tied model may contain these too, as copies of the embedding and output bias.
      head: for each parameter of the head of the sequence classifier, by its path in
        `models.heads`, the full name of its tensor.
      ignored: pattern of the full names of stored tensors that are not parameters.
      transpose: whether matrices are stored as `[out, in]`, as in PyTorch's `Linear`.
      by_head: whether layers that are stored as one are concatenated within each key/value head,
        together with the query heads that share it.
      pad_id: the `pad_token_id` of a `config.json` that has none.
    """

    classes: dict[str, tuple[str, str]]
    config: Callable[[HFConfig], ConfigFields]
    tensors: Mapping[str, str]
    prefix: str
    untied: Mapping[str, str] = {"unembedding": "lm_head.weight"}
    head: Mapping[str, str] = {"kernel": "score.weight"}
    ignored: re.Pattern[str] = re.compile(r"(?!)")
    transpose: bool = True
    by_head: bool = False
    pad_id: int | None = None

    def table(self, config: TransformerConfig) -> list[Rule]:
        """Return the rules of the tensors of a model, with those of a block for every block.

        Raises:
          ValueError: as `shapes_of`.
        """
        parameters = flatten_dict(shapes_of(replace(config, layers=1, windows=None)), sep="/")
        paths: dict[str, list[str]] = {}
        untied = {} if config.tied else self.untied
        for path, stored in (*self.tensors.items(), *untied.items()):
            for end, stored_end in _ENDS.items():
                if path.format(i=0) + end in parameters:
                    paths.setdefault(stored + stored_end, []).append(path + end)
        return [
            Rule(
                stored.format(i=i),
                tuple(path.format(i=i) for path in ours),
                transpose=self.transpose and ours[0].endswith("kernel"),
                heads=config.key_heads if self.by_head else 1,
                widths=tuple(parameters[path.format(i=0)].shape[-1] for path in ours),
            )
            for stored, ours in paths.items()
            for i in range(config.layers if "{i}" in stored else 1)
        ]

    @property
    def score(self) -> list[Rule]:
        """The rules of the head of the sequence classifier."""
        return [
            Rule(stored, (path,), path.endswith("kernel")) for path, stored in self.head.items()
        ]


def shapes_of(config: TransformerConfig) -> Params:
    """Return the shapes of a config's parameters, as a tree of `jax.ShapeDtypeStruct`.

    Raises:
      ValueError: if no model can be made from the config.
    """
    try:
        return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    except (TypeError, OverflowError, ZeroDivisionError, AttributeError) as error:
        raise ValueError(
            f"No model can be made from the config {config}: {str(error).splitlines()[0]}"
        ) from error


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
