"""Terms that the settings add to the loss of a minibatch: KL, and likelihood of good responses."""

from functools import partial
from typing import TYPE_CHECKING, Protocol

from jax import Array

from ppo_jax.errors import SettingError
from ppo_jax.ops.likelihood_losses import positive_nll_loss
from ppo_jax.ops.masked import Aggregation, masked_mean
from ppo_jax.types import Counts, Experience, Metrics

if TYPE_CHECKING:
    from ppo_jax.ppo.settings import PPOConfig


class LossTerm(Protocol):
    """Computes a weighted term of the loss, `[]` float32, and metrics.

    `logprobs [B, R]` float32 are those of the policy that trains, in nats.
    """

    def __call__(self, logprobs: Array, batch: Experience, counts: Counts) -> tuple[Array, Metrics]:
        """Return the term and its metrics."""


def loss_terms(config: "PPOConfig") -> tuple[LossTerm, ...]:
    """Make the terms whose coefficients in the settings are not 0.

    Args:
      config: the settings.

    Returns:
      The terms, for `ppo_loss_fn`.

    Example:
      >>> from ppo_jax import PPOConfig
      >>> len(loss_terms(PPOConfig())), len(loss_terms(PPOConfig(kl_loss_coef=0.1)))
      (0, 1)
    """
    terms: list[LossTerm] = []
    if config.kl_loss_coef:
        terms.append(partial(_kl_term, config, config.weighting.function))
    if config.positive_nll_coef:
        terms.append(partial(_positive_term, config))
    return tuple(terms)


def _kl_term(
    config: "PPOConfig",
    aggregation: Aggregation,
    logprobs: Array,
    batch: Experience,
    counts: Counts,
) -> tuple[Array, Metrics]:
    if batch.ref_logprobs is None:
        raise SettingError(
            f"kl_loss_coef={config.kl_loss_coef} needs Experience.ref_logprobs, which is None."
        )
    kl = config.kl_loss.function(
        logprobs,
        batch.ref_logprobs,
        batch.response_mask,
        old_logprobs=batch.logprobs,
        aggregate=partial(aggregation.mean, count=counts.policy),
    )
    return config.kl_loss_coef * kl, {"loss/kl": kl}


def _positive_term(
    config: "PPOConfig", logprobs: Array, batch: Experience, counts: Counts
) -> tuple[Array, Metrics]:
    if batch.scores is None:
        raise SettingError(
            f"positive_nll_coef={config.positive_nll_coef} needs Experience.scores, which is None."
        )
    aggregate = partial(masked_mean, count=counts.good)
    nll = positive_nll_loss(logprobs, batch.scores > 0, batch.response_mask, aggregate=aggregate)
    return config.positive_nll_coef * nll, {"loss/positive_nll": nll}
