"""The configuration of the decoder: its sizes, and the options in which families differ."""

import enum
from dataclasses import dataclass, field
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from ppo_jax.errors import check_choices


class Activation(enum.Enum):
    """The activation function of the MLP, by its name in a Hugging Face config.

    `GELU_TANH` and `GELU_FAST` are the same function as `GELU_NEW`, under the names that other
    families give it. Further names of these functions, such as `swish`, are accepted too.

    Example:
      >>> Activation("swish")
      <Activation.SILU: 'silu'>
    """

    GELU = "gelu"
    GELU_NEW = "gelu_new"
    GELU_TANH = "gelu_pytorch_tanh"
    GELU_FAST = "gelu_fast"
    RELU = "relu"
    SILU = "silu"
    TANH = "tanh"

    @classmethod
    def _missing_(cls, value: object) -> "Activation | None":
        """Return the function that `transformers` also knows by the name `value`, if any."""
        others = {
            "gelu_python": cls.GELU,
            "gelu_accurate": cls.GELU_NEW,
            "gelu_python_tanh": cls.GELU_TANH,
            "swish": cls.SILU,
        }
        return others.get(value) if isinstance(value, str) else None

    def __call__(self, x: Array) -> Array:
        """Apply the function to every element of `x`."""
        match self:
            case Activation.RELU:
                return jax.nn.relu(x)
            case Activation.SILU:
                return jax.nn.silu(x)
            case Activation.TANH:
                return jnp.tanh(x)
            case (
                Activation.GELU | Activation.GELU_NEW | Activation.GELU_TANH | Activation.GELU_FAST
            ):
                return jax.nn.gelu(x, approximate=self is not Activation.GELU)


class NormKind(enum.Enum):
    """The kind of normalisation.

    Attributes:
      LAYER: layer norm, to mean 0 and variance 1, with a scale and a bias.
      RMS: RMS norm, to mean square 1, with a scale.
      RMS_PLUS_1: RMS norm whose scale is 1 plus the stored parameter, as in Gemma.
    """

    LAYER = "layer"
    RMS = "rms"
    RMS_PLUS_1 = "rms_plus_1"


class NormAt(enum.Enum):
    """Where a block normalises around a sublayer `f`, which is attention or the MLP.

    Attributes:
      BEFORE: `x + f(norm(x))`, as in GPT-2 and Llama.
      AFTER: `norm(x + f(x))`, as in BERT.
      AROUND: `x + post_norm(f(norm(x)))`, as in Gemma 2.
    """

    BEFORE = "before"
    AFTER = "after"
    AROUND = "around"


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary position embeddings, which pair element `i` of a head with element `i + width / 2`.

    Source: Su et al. 2021 (https://arxiv.org/abs/2104.09864), who pair neighbouring elements
    instead. Without `bands`, `scale` is that of Chen et al. 2023
    (https://arxiv.org/abs/2306.15595); with `bands` it is that of Llama 3.1.

    Attributes:
      base: the base of the geometric series of frequencies.
      width: how many elements of each head are rotated, from the first on; an even number.
      scale: factor by which wavelengths are stretched.
      bands: two wavelengths as numbers of positions, the longer one first. Wavelengths above
        `bands[0]` are stretched in full and those below `bands[1]` not at all, with a smooth
        transition between them. None stretches all wavelengths.

    Example:
      >>> Rotary(base=100.0, width=4).frequencies()
      array([1. , 0.1], dtype=float32)
    """

    base: float
    width: int
    scale: float = 1.0
    bands: tuple[float, float] | None = None

    def frequencies(self) -> np.ndarray:
        """Return the frequencies `[width / 2]` float32, in radians per position."""
        frequency = 1.0 / self.base ** (np.arange(0, self.width, 2, dtype=np.float32) / self.width)
        if self.bands is None:
            return (frequency / self.scale).astype(np.float32)
        long, short = self.bands
        wavelength = 2 * np.pi / frequency
        kept = np.clip((long / wavelength - 1) / (long / short - 1), 0, 1)
        return ((1 - kept) * frequency / self.scale + kept * frequency).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The configuration of a transformer. The defaults are those of GPT-2.

    Letters in brackets are the axes of `ppo_jax.types`. Parameters are always float32.

    Attributes:
      vocab_size: size of the vocabulary (V).
      positions: length of the longest sequence, in tokens.
      width: width of the hidden states (D).
      layers: number of blocks (L).
      heads: number of query heads (H).
      mlp_width: width of the hidden layer of the MLP.
      kv_heads: number of key/value heads (K), each shared by `H / K` query heads. None means H.
      head_size: width of one head (C). None means `D / H`.
      activation: activation function of the MLP.
      gated: whether the MLP is `down(activation(gate(x)) * up(x))` instead of
        `down(activation(up(x)))`.
      norm: kind of all norms.
      norm_at: where a block normalises.
      norm_eps: added to the variance or mean square in a norm.
      qk_norm: whether queries and keys are normalised within each head.
      parallel: whether attention and the MLP read the same hidden states and are added together,
        instead of one after the other.
      qkv_bias: whether the query, key and value layers have a bias.
      out_bias: whether the output layer of attention has a bias.
      mlp_bias: whether the layers of the MLP have a bias.
      learned_positions: whether learned position embeddings are added to the token embeddings.
      position_offset: row of the position table that belongs to the first position.
      rotary: rotary position embeddings, or None for none.
      local_rotary: rotary position embeddings of the layers with a window. None means `rotary`.
      windows: for each layer, over how many positions it attends, the current one included, or
        None for all. None instead of a tuple gives no layer a window.
      causal: whether positions attend only to earlier ones; false for an encoder such as BERT.
      tied: whether the output matrix is the token embedding.
      scale_embedding: whether embeddings are multiplied by `sqrt(D)`.
      embedding_norm: whether the embeddings are normalised.
      token_types: number of rows of the token type embedding, whose first row is added to all
        embeddings. 0 means none.
      lm_transform: whether the output matrix is preceded by a dense layer, the activation and a
        norm, and followed by a bias, as in BERT.
      attention_scale: factor of the attention logits. None means `1 / sqrt(C)`.
      scale_attention_by_layer: whether the attention logits are also divided by the number of the
        layer, counted from 1.
      attention_cap: cap of the attention logits `x`, which become `cap * tanh(x / cap)`. None means
        no cap.
      logit_cap: the same for the output logits of the model.
      init_std: standard deviation of fresh weights. The layers that write to the residual stream
        use `init_std / sqrt(2 L)`.
      lora_scale: factor of the low-rank part of adapted layers, `LoRA.scale`. Without it the model
        refuses parameters that hold adapters.
      pad_id: the token that a scorer skips at the end of a text, as the classifiers of
        `transformers` skip the `pad_token_id` of their config. Only scorers have one.
      dtype: type of activations and of the operands of matrix products.
      remat: whether the backward pass recomputes each block instead of keeping its activations.
      loop_layers: whether programs that read several tokens at once loop over the layers. This
        compiles faster, but copies the parameters in `dtype`, to which their gradients are then
        rounded. None means on TPUs, with many layers.

    Raises:
      SettingError: if `activation`, `norm` or `norm_at` is none of the choices.
      ValueError: if `heads` does not divide `width` and no `head_size` is given, if `kv_heads` does
        not divide `heads`, or if `windows` has not one entry per layer.

    Example:
      >>> config = TransformerConfig(
      ...     vocab_size=50257, positions=1024, width=768, layers=12, heads=12, mlp_width=3072
      ... )
      >>> config.key_heads, config.head_width
      (12, 64)
    """

    vocab_size: int
    positions: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    kv_heads: int | None = None
    head_size: int | None = None
    activation: Activation = Activation.GELU_NEW
    gated: bool = False
    norm: NormKind = NormKind.LAYER
    norm_at: NormAt = NormAt.BEFORE
    norm_eps: float = 1e-5
    qk_norm: bool = False
    parallel: bool = False
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    learned_positions: bool = True
    position_offset: int = 0
    rotary: Rotary | None = None
    local_rotary: Rotary | None = None
    windows: tuple[int | None, ...] | None = None
    causal: bool = True
    tied: bool = True
    scale_embedding: bool = False
    embedding_norm: bool = False
    token_types: int = 0
    lm_transform: bool = False
    attention_scale: float | None = None
    scale_attention_by_layer: bool = False
    attention_cap: float | None = None
    logit_cap: float | None = None
    init_std: float = 0.02
    lora_scale: float | None = None
    # Left out of the repr, which identifies the model of a run, because policies have none.
    pad_id: int | None = field(default=None, repr=False)
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    # Left out of the repr, because the numbers are the same to rounding.
    loop_layers: bool | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_choices(self)
        if self.head_size is None and self.width % self.heads:
            raise ValueError(f"width={self.width} must be a multiple of heads={self.heads}.")
        if self.heads % self.key_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}.")
        if self.windows is not None and len(self.windows) != self.layers:
            raise ValueError(
                f"windows has {len(self.windows)} entries, but must have one per layer"
                f" (layers={self.layers})."
            )

    @property
    def head_width(self) -> int:
        """The width of one head (C)."""
        return self.head_size or self.width // self.heads

    @property
    def key_heads(self) -> int:
        """The number of key/value heads (K)."""
        return self.kv_heads or self.heads

    @cached_property
    def layer_windows(self) -> tuple[int | None, ...]:
        """The window of each layer, or None for a layer that attends to all positions."""
        return self.windows or (None,) * self.layers

    @property
    def residual_std(self) -> float:
        """Standard deviation of fresh weights that write to the residual stream, as in GPT-2."""
        return self.init_std * (2 * self.layers) ** -0.5

    @property
    def low_precision(self) -> bool:
        """Whether activations have another type than float32, such as bfloat16."""
        return jnp.dtype(self.dtype) != jnp.float32
