"""The model families that can be loaded and saved. README.md in this folder says how to add one."""

import importlib

import jax.numpy as jnp
from jax.typing import DTypeLike

from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.io.family import Family, HFConfig

# The module of each family. A new family needs one file in this folder and its name here.
_MODULES = (
    "bert",
    "distilbert",
    "gemma",
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "llama",
    "phi3",
    "roberta",
    "stablelm",
)

FAMILIES: tuple[Family, ...] = tuple(
    importlib.import_module(f"{__name__}.{module}").FAMILY for module in _MODULES
)


def family_of(model_type: str | None) -> Family:
    """Return the family of the `model_type` of a `config.json`.

    Raises:
      ValueError: if the model type is not supported; the message names those that are.
    """
    for family in FAMILIES:
        if isinstance(model_type, str) and model_type in family.classes:
            return family
    known = sorted(name for family in FAMILIES for name in family.classes)
    raise ValueError(f"model_type {model_type!r} is not supported; known are {', '.join(known)}.")


def config_of(
    hf: HFConfig, *, dtype: DTypeLike = jnp.float32, remat: bool = False
) -> TransformerConfig:
    """Return our config for a parsed `config.json`.

    Args:
      hf: the parsed `config.json`.
      dtype: dtype of the activations and matrix products.
      remat: whether the backward pass recomputes the activations of each block to save memory.

    Raises:
      ValueError: if the family or a setting is not supported, or a field is missing or wrong.
    """
    kind = hf.get("model_type")
    # Checked before the family reads the config, because it may make a list of as many entries.
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        if isinstance(hf.get(name), int) and hf[name] >= 4096:
            raise ValueError(
                f"The config of a {kind} has {name}={hf[name]}; at most 4095 layers are supported."
            )
    try:
        fields = {"init_std": hf.get("initializer_range", 0.02), **family_of(kind).config(hf)}
        config = TransformerConfig(**fields, dtype=dtype, remat=remat)
    except KeyError as error:
        raise ValueError(f"The config of a {kind} needs {error}.") from error
    except (TypeError, AttributeError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"The config of a {kind} cannot be used: {error}.") from error
    for name in ("vocab_size", "positions", "width", "layers", "heads", "mlp_width"):
        value, bound = getattr(config, name), 4096 if name == "layers" else 2**31
        if type(value) is not int or not 0 < value < bound:
            raise ValueError(
                f"The config of a {kind} has {name}={value!r}; it must be a positive integer below "
                f"{bound}."
            )
    return config
