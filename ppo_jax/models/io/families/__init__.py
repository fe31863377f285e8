"""The model families that can be loaded and saved. README.md in this folder says how to add one."""

import importlib

from ppo_jax.models.io.family import Family

# The module of each family. A new family needs one file in this folder and its name here.
_MODULES = ("bert", "distilbert", "gemma", "gpt2", "gpt_neo", "gpt_neox", "llama", "roberta")

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
