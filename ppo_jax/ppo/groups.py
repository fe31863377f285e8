"""Groups of responses to the same prompt."""

from ppo_jax.errors import SettingError
from ppo_jax.ppo.settings import PPOConfig


def check_groups(config: PPOConfig, rows: int) -> None:
    """Check that rows which are learned from together are whole groups.

    Args:
      config: the settings, which give the size of a group.
      rows: number of responses on each device, or of the batch if a device sees all of it.

    Raises:
      SettingError: if a group would be cut.
    """
    if rows % config.group_size:
        raise SettingError(
            f"group_size={config.group_size} must divide the number of responses on each device, "
            f"which is {rows}, so that all responses to a prompt are on the same one."
        )
