"""Make the critic that a run starts with."""

from dataclasses import replace
from pathlib import Path

from jax.sharding import Mesh

from ppo_jax.errors import SettingError
from ppo_jax.models import heads
from ppo_jax.models.io import scorers
from ppo_jax.models.io.pretrained import Pretrained
from ppo_jax.ppo.critic import no_critic
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.ppo.state import init_key
from ppo_jax.types import CriticFn, Params

_CRITIC = 0  # Each part of the new parameters has a key of its own.


def check_critic(critic: str | Path, ppo: PPOConfig) -> None:
    """Raise SettingError if a run without a critic has settings that need one."""
    if critic != "none":
        return
    if ppo.advantage.reads_values:
        raise SettingError(
            "critic=none needs an advantage estimator that reads no values, but "
            f"advantage={ppo.advantage.value} reads them."
        )
    if ppo.critic.learning_rate is not None:
        raise SettingError(
            f"critic.learning_rate={ppo.critic.learning_rate} needs a critic, but critic=none."
        )


def make_critic(
    critic: str | Path, policy: Pretrained, seed: int, mesh: Mesh | None
) -> tuple[CriticFn, Params, Pretrained | None]:
    """The critic's function, its initial parameters, and its trunk if it has one of its own."""
    config = policy.config
    if critic == "none":
        return no_critic, {}, None
    if critic == "shared":
        return heads.shared_critic(), {"head": heads.zero_head(config.width)}, None
    if critic == "separate":
        params = heads.init_scorer(config, init_key(seed, _CRITIC), trunk=policy.params)
        return heads.separate_critic(config), params, policy._replace(params={})
    try:
        scorer = scorers.load_scorer(critic, dtype=config.dtype, remat=config.remat, mesh=mesh)
    except ValueError as error:
        raise ValueError(
            f"The critic must start from a reward model with one label: {error}"
        ) from error
    if scorer.config.vocab_size != config.vocab_size:
        raise ValueError(
            f"The critic {critic} has vocab_size={scorer.config.vocab_size} and the policy has "
            f"{config.vocab_size}; choose a critic that reads the policy's tokens."
        )
    scorer_config = replace(scorer.config, lora_scale=config.lora_scale)
    trunk = scorer._replace(config=scorer_config, params={})
    return heads.separate_critic(scorer_config), scorer.params, trunk
