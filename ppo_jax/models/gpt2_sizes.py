"""The sizes of GPT-2 and of new small models, as numbers that are read without importing JAX."""

from ppo_jax.errors import SettingError

GPT2 = {  # layers, width, heads
    "gpt2": (12, 768, 12),
    "gpt2-medium": (24, 1024, 16),
    "gpt2-large": (36, 1280, 20),
    "gpt2-xl": (48, 1600, 25),
}
NEW = {  # layers, width, heads, size of the vocabulary
    "tiny": (4, 128, 4, 4096),
    "small": (6, 384, 6, 8192),
}


def check_new_size(size: str) -> None:
    """Raise SettingError if a GPT-2 of this size cannot be trained from scratch."""
    if size not in NEW and size not in GPT2:
        names = ", ".join([*NEW, *GPT2])
        raise SettingError(f"from_scratch={size} is not a size; choose one of {names}.")
