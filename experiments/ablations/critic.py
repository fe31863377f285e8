"""Study 1: what the critic recipe of VC-PPO and VAPO is worth where answers are long.

Plain PPO has one lambda of 0.95 and one optimizer for policy and critic. The recipe pre-trains the
critic on the returns of the frozen policy, gives it an optimizer of its own and returns with a
lambda of 1 (decoupled GAE), lets the lambda of the policy grow with the length of the answer, clips
the ratio at 1.28 instead of 1.2 from above, averages over tokens and adds the likelihood of good
answers to the loss. Each variant `no_...` leaves one of these parts away. `fixed_lambda_0.9967` has
the lambda of an answer of the mean length for all lengths.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from experiments.ablations.training import LossMaker, Variant
from ppo_jax import (
    AdvantageFn,
    CriticConfig,
    LossFn,
    Metrics,
    PPOConfig,
    Rollout,
    Scores,
    Weighting,
    clipped_ppo,
    decoupled_gae,
    length_adaptive_lambda,
    positive_nll_loss,
    ppo_loss_fn,
)

LAMBDA, ALPHA = 0.95, 1.5
MEAN_LENGTH = 200  # tokens of an answer, of which the study has 100, 200 and 300
PRETRAINING = 5  # updates
NLL_COEF, GOOD = 0.1, 0.75  # the weight of the likelihood of the answers above this quantile


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The parts of the recipe, each of which can be left away."""

    pretraining: bool = True
    decoupling: bool = True
    adaptive_lambda: bool = True
    clip_higher: bool = True
    token_mean: bool = True
    positive_nll: bool = True


def advantages(recipe: Recipe, fixed_lambda: float) -> AdvantageFn:
    """Make the advantage estimator of a recipe; `fixed_lambda` is for one without the adaptive."""

    def estimate(
        rewards: jax.Array,
        values: jax.Array,
        mask: jax.Array,
        *,
        rollout: Rollout,
        scores: Scores,
    ) -> tuple[jax.Array, jax.Array]:
        lam = length_adaptive_lambda(mask, alpha=ALPHA) if recipe.adaptive_lambda else fixed_lambda
        return decoupled_gae(
            rewards,
            values,
            mask,
            gamma=1.0,
            lam_policy=lam,
            lam_value=1.0 if recipe.decoupling else lam,
        )

    return estimate


def with_positive_nll(config: PPOConfig, maker: LossMaker) -> LossFn:
    """Make the loss of the settings plus the negative log-likelihood of the best answers."""
    own, metrics = clipped_ppo(dataclasses.replace(config, vf_coef=0.0))
    least = jnp.quantile(maker.task_scores, GOOD)

    def loss(
        logprobs: jax.Array,
        *others: jax.Array,
        returns: jax.Array,
        mask: jax.Array,
        aggregate: Callable[[jax.Array, jax.Array], jax.Array],
        **arrays: jax.Array,
    ) -> tuple[jax.Array, Metrics]:
        total, terms = own(
            logprobs, *others, returns=returns, mask=mask, aggregate=aggregate, **arrays
        )
        # The return of the last token is the score, whatever lambda is.
        last = jnp.maximum(mask.sum(axis=1) - 1, 0)[:, None]
        good = jnp.take_along_axis(returns, last, axis=1)[:, 0] >= least
        nll = positive_nll_loss(logprobs, good, mask)
        return total + NLL_COEF * nll, terms

    return ppo_loss_fn(
        maker.model,
        maker.critic,
        loss,
        metrics,
        temperature=config.temperature,
        aggregation=config.weighting.function,
    )


def with_recipe(base: PPOConfig, recipe: Recipe, fixed_lambda: float = LAMBDA) -> Variant:
    """Return PPO with the recipe or a part of it."""
    critic = CriticConfig(
        learning_rate=base.learning_rate, warmup_updates=PRETRAINING if recipe.pretraining else 0
    )
    config = dataclasses.replace(
        base,
        critic=critic,
        clip_high=0.28 if recipe.clip_higher else base.clip_high,
        weighting=Weighting.TOKEN if recipe.token_mean else Weighting.SEQUENCE,
    )
    loss_fn = partial(with_positive_nll, config) if recipe.positive_nll else None
    return Variant(config, advantages(recipe, fixed_lambda), loss_fn)


def variants(base: PPOConfig) -> dict[str, Variant]:
    """Return plain PPO, the recipe, and the recipe without each part or with a fixed lambda."""
    without = {
        f"no_{field.name}": with_recipe(base, Recipe(**{field.name: False}))
        for field in dataclasses.fields(Recipe)
    }
    plain = Variant(dataclasses.replace(base, lam=LAMBDA))
    near_1 = 1 - 1 / (ALPHA * MEAN_LENGTH)
    fixed = with_recipe(base, Recipe(adaptive_lambda=False), near_1)
    variants = {"ppo": plain, "recipe": with_recipe(base, Recipe()), **without}
    return {**variants, f"fixed_lambda_{near_1:.4f}": fixed}
