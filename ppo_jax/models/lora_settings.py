"""The settings of low-rank adapters; `ppo_jax.models.lora` makes them."""

import re
from dataclasses import dataclass

from ppo_jax.errors import SettingError, check_numbers


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters over the frozen model, which is then the reference policy too.

    Attributes:
      rank: rank of the adapters (r); 0 means no adapters.
      alpha: the numerator of their scale (α), above 0.
      targets: regular expression that is searched for in the path of each linear layer, such as
        `layer_0/attn/q`.
      stabilised: whether the scale is `alpha / sqrt(rank)` instead of `alpha / rank`.

    Raises:
      SettingError: if the rank is negative, a number is not finite, or `targets` is not a regular
        expression.

    Example:
      >>> LoRA(rank=4, alpha=8.0).scale
      2.0
    """

    rank: int = 8
    """Rank of each adapter; 0 trains the whole model without adapters."""
    alpha: float = 16.0
    """The low-rank product is scaled by alpha / rank."""
    targets: str = r"attn/(q|v)$"
    """Regular expression that is searched for in the paths of the linear layers, such as
    layer_0/attn/q or layer_0/mlp/up; the matching layers are adapted."""
    stabilised: bool = False
    """Scale the low-rank product by alpha / sqrt(rank) instead (rank-stabilised LoRA)."""

    def __post_init__(self) -> None:
        check_numbers(self, "lora.")
        if self.rank < 0:
            raise SettingError(f"lora.rank must not be negative, but is {self.rank}.")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise SettingError(
                f"lora.targets {self.targets!r} is not a regular expression: {error}."
            ) from error

    @property
    def scale(self) -> float:
        """The factor of the low-rank part, to be set as the `lora_scale` of the model's config.

        A model whose config has no scale refuses adapters.
        """
        return self.alpha / (self.rank**0.5 if self.stabilised else self.rank)


NO_LORA = LoRA(rank=0)  # the default of the commands, which train the whole model
