"""Published sizes as configurations, so that scaling studies can name them: GPT-2's, GPT-3's and Llama 3's.

GPT-3's source: Brown et al. 2020 (https://arxiv.org/abs/2005.14165), table 2.1: layers, width, heads and width of a head. Dense and
locally banded attention take turns, as in the Sparse Transformer; the paper does not give the band, so it is GPT-Neo's 256.
"""

from ppo_jax.models.config import Activation, NormKind, Rotary, TransformerConfig

_TABLE = {  # layers, width, heads, width of a head
    "gpt3-125m": (12, 768, 12, 64),
    "gpt3-350m": (24, 1024, 16, 64),
    "gpt3-760m": (24, 1536, 16, 96),
    "gpt3-1.3b": (24, 2048, 24, 128),
    "gpt3-2.7b": (32, 2560, 32, 80),
    "gpt3-6.7b": (32, 4096, 32, 128),
    "gpt3-13b": (40, 5140, 40, 128),
    "gpt3-175b": (96, 12288, 96, 128),
}
GPT3_SIZES = tuple(_TABLE)


def gpt3(size: str, *, band: int = 256) -> TransformerConfig:
    """The configuration of one of `GPT3_SIZES`.

    Args:
      size: its name; the two smallest are called Small and Medium in the paper.
      band: positions that every second layer sees.

    Raises:
      ValueError: for another name.

    Example:
      >>> config = gpt3("gpt3-125m")
      >>> config.layers, config.width, config.layer_windows[:2]
      (12, 768, (None, 256))
    """
    if size not in _TABLE:
        raise ValueError(f"There is no size {size!r}; known are {', '.join(GPT3_SIZES)}.")
    layers, width, heads, head = _TABLE[size]
    windows = tuple(band if i % 2 else None for i in range(layers))
    return TransformerConfig(
        vocab_size=50257,
        positions=2048,
        width=width,
        layers=layers,
        heads=heads,
        head_size=head,
        mlp_width=4 * width,
        windows=windows,
    )


def gpt2(size: str) -> TransformerConfig:
    """One of GPT-2's sizes: Radford et al. 2019, table 2, as released."""
    layers, width, heads = {
        "gpt2": (12, 768, 12),
        "gpt2-medium": (24, 1024, 16),
        "gpt2-large": (36, 1280, 20),
        "gpt2-xl": (48, 1600, 25),
    }[size]
    return TransformerConfig(
        vocab_size=50257,
        positions=1024,
        width=width,
        layers=layers,
        heads=heads,
        mlp_width=4 * width,
    )


def llama3(size: str) -> TransformerConfig:
    """One of Llama 3's sizes: Grattafiori et al. 2024 (https://arxiv.org/abs/2407.21783), table 3, with 8,192 positions."""
    layers, width, heads, mlp_width = {
        "llama3-8b": (32, 4096, 32, 14336),
        "llama3-70b": (80, 8192, 64, 28672),
    }[size]
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


SIZES = {
    **{size: gpt2 for size in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")},
    **{size: gpt3 for size in GPT3_SIZES},
    **{size: llama3 for size in ("llama3-8b", "llama3-70b")},
}
