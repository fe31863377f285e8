"""Configurations of published model sizes, GPT-2, GPT-3 and Llama 3, and of new small models.

GPT-3: Brown et al. 2020 (https://arxiv.org/abs/2005.14165), table 2.1. Dense layers alternate with
layers of locally banded attention. The paper does not give the width of the band, so it is 256 as
in GPT-Neo.
GPT-2: Radford et al. 2019, table 2, with the numbers of heads of the released models.
Llama 3: Grattafiori et al. 2024 (https://arxiv.org/abs/2407.21783), table 3, with 8,192 positions.
Llama 3.1 has 131,072 positions, whose rotary wavelengths are stretched eightfold.
"""

from dataclasses import replace
from typing import Any

from ppo_jax.models.config import Activation, NormKind, Rotary, TransformerConfig
from ppo_jax.models.gpt2_sizes import GPT2, NEW, check_new_size

_GPT3 = {  # layers, width, heads, width of a head
    "gpt3-125m": (12, 768, 12, 64),
    "gpt3-350m": (24, 1024, 16, 64),
    "gpt3-760m": (24, 1536, 16, 96),
    "gpt3-1.3b": (24, 2048, 24, 128),
    "gpt3-2.7b": (32, 2560, 32, 80),
    "gpt3-6.7b": (32, 4096, 32, 128),
    "gpt3-13b": (40, 5140, 40, 128),
    "gpt3-175b": (96, 12288, 96, 128),
}
_LLAMA3 = {  # layers, width, heads, width of the MLP
    "llama3-8b": (32, 4096, 32, 14336),
    "llama3-70b": (80, 8192, 64, 28672),
}


def gpt2(size: str) -> TransformerConfig:
    """Return the configuration of a size of GPT-2, such as `gpt2-medium`."""
    return _gpt(*GPT2[size], positions=1024)


def new_gpt(size: str) -> TransformerConfig:
    """Return the configuration of a GPT-2 that is trained from scratch.

    Args:
      size: `tiny`, `small`, or a published size of GPT-2.

    Raises:
      SettingError: if there is no such size.

    Example:
      >>> new_gpt("tiny").positions
      512
    """
    check_new_size(size)
    if size in GPT2:
        return gpt2(size)
    layers, width, heads, vocab_size = NEW[size]
    config = _gpt(layers, width, heads, positions=512)
    return replace(config, vocab_size=vocab_size)


def gpt3(size: str, *, band: int = 256) -> TransformerConfig:
    """Return the configuration of a size of GPT-3.

    Args:
      size: such as `gpt3-1.3b`. The paper calls the two smallest sizes Small and Medium.
      band: over how many positions every second layer attends.

    Raises:
      ValueError: if there is no such size.

    Example:
      >>> config = gpt3("gpt3-125m")
      >>> config.layers, config.width, config.layer_windows[:2]
      (12, 768, (None, 256))
    """
    if size not in _GPT3:
        raise ValueError(f"size={size!r} must be one of {', '.join(_GPT3)}.")
    windows = (None, band) * (_GPT3[size][0] // 2)
    return _gpt(*_GPT3[size], positions=2048, windows=windows)


def _gpt(
    layers: int, width: int, heads: int, head_size: int | None = None, **options: Any
) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=50257,
        width=width,
        layers=layers,
        heads=heads,
        head_size=head_size,
        mlp_width=4 * width,
        **options,
    )


def llama3(size: str) -> TransformerConfig:
    """Return the configuration of a size of Llama 3, such as `llama3-8b`."""
    layers, width, heads, mlp_width = _LLAMA3[size]
    return TransformerConfig(
        vocab_size=128256,
        positions=8192,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=8,
        mlp_width=mlp_width,
        activation=Activation.SILU,
        gated=True,
        norm=NormKind.RMS,
        norm_eps=1e-5,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        learned_positions=False,
        rotary=Rotary(base=500000.0, width=width // heads),
        tied=False,
    )


def llama31(size: str) -> TransformerConfig:
    """Return the configuration of a size of Llama 3.1, such as `llama3.1-8b`."""
    config = llama3(size.replace("3.1", "3"))
    bands = 8192.0, 2048.0
    rotary = Rotary(base=500000.0, width=config.head_width, scale=8.0, bands=bands)
    return replace(config, positions=131072, rotary=rotary)


SIZES = {
    **dict.fromkeys(GPT2, gpt2),
    **dict.fromkeys(_GPT3, gpt3),
    **dict.fromkeys(_LLAMA3, llama3),
    **{size.replace("3", "3.1", 1): llama31 for size in _LLAMA3},
}
"""For the name of each size, the function that returns its configuration."""
