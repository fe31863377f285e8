"""The command `ppo-jax value`, which trains a critic before PPO begins."""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import tyro

from ppo_jax.commands.train import Train
from ppo_jax.errors import SettingError


@dataclass(frozen=True, kw_only=True)
class Value:
    """Train a critic on the returns of a policy that does not change.

    The options are those of ppo-jax train. The critic learns with the learning rate
    ppo.critic.learning-rate, or with ppo.learning-rate if there is none, and its targets are the
    sums of later rewards (lambda 1). ppo-jax train takes it as --critic OUT/critic
    (arXiv:2503.01491).
    """

    example: ClassVar[str] = """
    ppo-jax value --model gpt2 --prompts prompts.txt \\
        --reward my_reward.py:score --out runs/critic --updates 50"""

    train: Annotated[Train, tyro.conf.arg(name="")]

    def run(self) -> None:
        """Train the critic, and write it to `critic/` in the run's folder."""
        from ppo_jax.distributed import processes

        command = value_training(self.train)
        command.run()
        processes.print_once(f"The critic is in {command.out / 'critic'}; --critic takes it.")


def value_training(train: Train) -> Train:
    """Return the options of a run that trains the critic only.

    Args:
      train: the options of a run.

    Returns:
      The same options with the policy frozen during all updates.

    Raises:
      SettingError: if the run has no critic with a trunk of its own, or its advantage estimator
        reads no values.
    """
    if train.critic in ("shared", "none"):
        raise SettingError(
            f"critic={train.critic} cannot be trained before PPO; use critic=separate or name a "
            "reward model."
        )
    start = "separate" if train.critic == "auto" else train.critic
    ppo = train.ppo
    if not ppo.advantage.reads_values:
        raise SettingError(
            f"advantage={ppo.advantage.value} reads no values, so there is no critic to train."
        )
    critic = replace(
        ppo.critic,
        learning_rate=ppo.critic.learning_rate or ppo.learning_rate,
        warmup_updates=train.loop.updates,
    )
    # The other estimators have such returns already.
    lam = ppo.lam if "lam" in ppo.advantage.unread else 1.0
    return replace(train, critic=start, ppo=replace(ppo, critic=critic, lam=lam))
