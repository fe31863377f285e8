"""Critics in folders that `transformers` reads and that `--critic` and `load_scorer` take."""

from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from ppo_jax.models.io.families import family_of
from ppo_jax.models.io.pretrained import Pretrained
from ppo_jax.models.io.scorers import save_scorer


def save_critic(folder: str | Path, critic: Pretrained, tokenizer: Any = None) -> None:
    """Save a critic in the format of a reward model with one label.

    `transformers.AutoModelForSequenceClassification` loads the folder. Its score of a text is the
    critic's value at the last token, and its head, applied to the hidden states at all positions,
    gives all values.

    Args:
      folder: the folder to write; it is made if it does not exist.
      critic: the critic, whose `params` are `{"trunk": ..., "head": ...}`. The trunk of a critic
        that shares the policy's is the policy.
      tokenizer: a tokenizer of `transformers` to save with it, or None.

    Raises:
      ValueError: if the classifiers of the trunk's family have a head of another kind, or if the
        folder cannot be written.

    Example:
      >>> import tempfile
      >>> import jax
      >>> from ppo_jax.models import heads
      >>> from ppo_jax.models.config import TransformerConfig
      >>> from ppo_jax.models.io.families.gpt2 import config_to_hf
      >>> config = TransformerConfig(
      ...     vocab_size=7, positions=8, width=4, layers=1, heads=2, mlp_width=16
      ... )
      >>> params = heads.init_scorer(config, jax.random.key(0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_critic(folder, Pretrained(config, params, config_to_hf(config)))
      ...     print(*sorted(file.name for file in Path(folder).iterdir()))
      config.json model.safetensors
    """
    kind = critic.hf_config["model_type"]
    head = flatten_dict(critic.params["head"], sep="/").keys()
    expected = family_of(kind).head.keys()
    if head != expected:
        raise ValueError(
            f"The critic's head has {sorted(head)}, and the classifiers of {kind} in transformers "
            f"have {sorted(expected)}, so that it has no format there."
        )
    save_scorer(folder, critic, tokenizer)
