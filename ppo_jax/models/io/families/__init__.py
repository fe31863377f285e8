"""The model families that can be read and written. A new one is a file with a `Family` here, and its name in `FAMILIES`."""

from ppo_jax.models.io.families import (
    bert,
    distilbert,
    gemma,
    gpt2,
    gpt_neo,
    gpt_neox,
    llama,
    roberta,
)
from ppo_jax.models.io.family import Family

FAMILIES: tuple[Family, ...] = (
    gpt2.FAMILY,
    gpt_neo.FAMILY,
    gpt_neox.FAMILY,
    llama.FAMILY,
    gemma.FAMILY,
    bert.FAMILY,
    roberta.FAMILY,
    distilbert.FAMILY,
)


def family_of(model_type: str | None) -> Family:
    """The family of a `config.json`'s `model_type`.

    Raises:
      ValueError: naming what is known.
    """
    for family in FAMILIES:
        if isinstance(model_type, str) and model_type in family.classes:
            return family
    known = sorted(name for family in FAMILIES for name in family.classes)
    raise ValueError(f"model_type {model_type!r} is not supported; known are {', '.join(known)}.")
