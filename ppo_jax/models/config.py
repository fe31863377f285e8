"""What fixes a decoder's function and its shapes: one config for all families, a switch for each thing in which they differ."""

import dataclasses
import enum
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class Activation(enum.Enum):
    """The non-linearity of the MLP, by the names of Hugging Face configs."""

    GELU = "gelu"
    GELU_NEW = "gelu_new"
    GELU_TANH = "gelu_pytorch_tanh"  # the same function as GELU_NEW
    GELU_FAST = "gelu_fast"  # and so is this
    RELU = "relu"
    SILU = "silu"
    TANH = "tanh"

    def __call__(self, x: jax.Array) -> jax.Array:
        match self:
            case Activation.GELU:
                return jax.nn.gelu(x, approximate=False)
            case Activation.GELU_NEW | Activation.GELU_TANH | Activation.GELU_FAST:
                return jax.nn.gelu(x, approximate=True)
            case Activation.RELU:
                return jax.nn.relu(x)
            case Activation.SILU:
                return jax.nn.silu(x)
            case Activation.TANH:
                return jnp.tanh(x)


class NormKind(enum.Enum):
    """`LAYER`: mean 0 and variance 1, scale and bias. `RMS`: mean square 1, scale. `RMS_PLUS_1`: the scale is stored less 1."""

    LAYER = "layer"
    RMS = "rms"
    RMS_PLUS_1 = "rms_plus_1"


class NormAt(enum.Enum):
    """Where a block normalises around its sublayers `f`: `x + f(n(x))`, `n(x + f(x))`, or `x + n'(f(n(x)))`."""

    BEFORE = "before"
    AFTER = "after"
    AROUND = "around"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary position embeddings (Su et al. 2021, https://arxiv.org/abs/2104.09864), the two halves of a head paired.

    `scale > 1` stretches all wavelengths alike ("linear"); with `bands`, the wavelengths over which it fades in (Llama 3.1+):
    those over `bands[0]` are stretched in full, those under `bands[1]` not at all.
    """

    base: float
    width: int  # numbers of each head that rotate, from its first on
    scale: float = 1.0
    bands: tuple[float, float] | None = None

    def frequencies(self) -> np.ndarray:
        """Radians a position, `[width / 2]` float32."""
        frequency = 1.0 / self.base ** (np.arange(0, self.width, 2, dtype=np.float32) / self.width)
        if self.bands is None:
            return (frequency / self.scale).astype(np.float32)
        long, short = self.bands
        wavelength = 2 * np.pi / frequency
        kept = np.clip((long / wavelength - 1) / (long / short - 1), 0, 1)
        return ((1 - kept) * frequency / self.scale + kept * frequency).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """A decoder. The defaults are GPT-2's."""

    vocab_size: int  # V
    positions: int  # the longest sequence
    width: int  # D
    layers: int  # L
    heads: int  # H
    mlp_width: int
    kv_heads: int | None = None  # K, each shared by H / K query heads; None: H
    head_size: int | None = None  # C; None: D / H
    activation: Activation = Activation.GELU_NEW
    gated: bool = False  # the MLP is down(activation(gate(x)) · up(x))
    norm: NormKind = NormKind.LAYER
    norm_at: NormAt = NormAt.BEFORE
    norm_eps: float = 1e-5
    qk_norm: bool = False  # queries and keys are normalised within each head
    parallel: bool = False  # attention and MLP read the same x and are added at once
    qkv_bias: bool = True
    out_bias: bool = True  # of the attention's output
    mlp_bias: bool = True
    learned_positions: bool = True
    position_offset: int = 0  # the row of the first position in the table
    rotary: Rotary | None = None
    local_rotary: Rotary | None = None  # that of layers with a window, if it is another
    windows: tuple[int | None, ...] | None = (
        None  # positions that each layer sees, its own included; None: all
    )
    causal: bool = True
    tied: bool = True  # the output matrix is the embedding
    scale_embedding: bool = False  # embeddings times √D
    embedding_norm: bool = False
    token_types: int = 0  # rows of a table whose first is added to every embedding
    lm_transform: bool = False  # a dense layer, activation, norm and bias before and after the output matrix, as BERT's
    attention_scale: float | None = None  # of attention's logits; None: 1 / √C
    scale_attention_by_layer: bool = False  # ... divided by the layer's number, from 1
    attention_cap: float | None = None  # attention's logits x become cap · tanh(x / cap)
    logit_cap: float | None = None  # and so do the output's
    init_std: float = 0.02
    lora_scale: float = 1.0  # of the low-rank part of a linear layer that has one
    dtype: Any = jnp.float32  # of activations and matrix products; parameters are float32
    remat: bool = False  # recompute each block in the backward pass instead of keeping it

    def __post_init__(self):
        if self.head_size is None and self.width % self.heads:
            raise ValueError(f"width={self.width} must be a multiple of heads={self.heads}.")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}.")
        if self.windows is not None and len(self.windows) != self.layers:
            raise ValueError(f"windows has {len(self.windows)} entries for layers={self.layers}.")

    @property
    def head_width(self) -> int:  # C
        return self.head_size or self.width // self.heads

    @property
    def key_heads(self) -> int:  # K
        return self.kv_heads or self.heads

    @functools.cached_property
    def layer_windows(self) -> tuple[int | None, ...]:
        return self.windows or (None,) * self.layers
