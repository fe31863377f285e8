"""The parts of a learner beside the policy: its critic, its reference and trained adapters."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict
from jax import Array
from jax.sharding import Mesh

from ppo_jax.errors import SettingError
from ppo_jax.models import heads
from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.io import scorers
from ppo_jax.models.io.adapter_files import load_adapter
from ppo_jax.models.io.pretrained import Pretrained
from ppo_jax.models.lora_settings import LoRA
from ppo_jax.models.transformer import language_model
from ppo_jax.ppo.critic import no_critic
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.types import CriticFn, LanguageModel, Params


def make_critic(
    critic: str | Path, policy: Pretrained, key: Array, mesh: Mesh | None
) -> tuple[CriticFn, Params, Pretrained | None]:
    """Make a critic; the arguments are those of `assemble`, and the key of its new parameters.

    Returns:
      Its function, its initial parameters, and its trunk, without parameters, if it has its own.

    Raises:
      ValueError: if the critic cannot be read, or cannot read the policy's tokens.
    """
    config = policy.config
    if critic == "none":
        return no_critic, {}, None
    if critic == "shared":
        return heads.shared_critic(), {"head": heads.zero_head(config.width)}, None
    if critic == "separate":
        params = heads.init_scorer(config, key, trunk=policy.params)
        return heads.separate_critic(config), params, policy._replace(params={})
    load = partial(scorers.load_scorer, dtype=config.dtype, remat=config.remat, mesh=mesh)
    scorer = read_critic(critic, config, load)
    scorer_config = replace(scorer.config, lora_scale=config.lora_scale)
    trunk = scorer._replace(config=scorer_config, params={})
    return heads.separate_critic(scorer_config), scorer.params, trunk


def read_critic(
    critic: str | Path,
    config: TransformerConfig,
    read: Callable[[str | Path], Pretrained] = scorers.open_scorer,
) -> Pretrained:
    """Read a reward model that a critic starts from.

    Args:
      critic: its folder or Hugging Face id.
      config: the config of the policy.
      read: reads a reward model; by default only its config and its head are read.

    Returns:
      The reward model.

    Raises:
      ValueError: if it is none, or cannot read the policy's tokens.
    """
    try:
        scorer = read(critic)
    except ValueError as error:
        raise ValueError(
            f"The critic must start from a reward model with one label: {error}"
        ) from error
    if scorer.config.vocab_size != config.vocab_size:
        raise ValueError(
            f"The critic {critic} has vocab_size={scorer.config.vocab_size} and the policy has "
            f"{config.vocab_size}; choose a critic that reads the policy's tokens."
        )
    return scorer


def reference_model(
    reference: Pretrained | None, config: TransformerConfig
) -> tuple[LanguageModel | None, int | None]:
    """Return the functions of another reference, and the longest sequence that it can read.

    Args:
      reference: the reference, or None.
      config: the config of the policy.

    Returns:
      Its functions, or None if they are those of the policy, and its number of positions, or None
      if there is no other reference.

    Raises:
      ValueError: if its vocabulary has another size than the policy's.
    """
    if reference is None:
        return None, None
    if reference.config.vocab_size != config.vocab_size:
        raise ValueError(
            f"The reference has vocab_size={reference.config.vocab_size} and the policy has "
            f"{config.vocab_size}; choose a reference that reads the policy's tokens."
        )
    same = reference.config == config
    return None if same else language_model(reference.config), reference.config.positions


def check_reference(given: bool, ppo: PPOConfig) -> None:
    """Raise SettingError if another reference is given to settings that move the reference."""
    if given and ppo.moves_reference:
        raise SettingError(
            f"reference_every={ppo.reference_every} and reference_decay={ppo.reference_decay} move "
            "a reference that starts as the policy; leave out the other reference."
        )


def initial_reference(params: Params, frozen: Params | None, ref_params: Params | None) -> Params:
    """Return the reference policy's parameters; see `Learner.ref_params`."""
    return ref_params or (frozen or {}).get("policy") or params["policy"]


def check_vocabulary(tokenizer: Any, other: Any, name: str) -> None:
    """Raise ValueError if the tokenizer of the model `name` has other tokens than the policy's."""
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    if ours != theirs:
        token, number = min(set(ours.items()) ^ set(theirs.items()), key=lambda item: item[1])
        raise ValueError(
            f"The reference {name} has another tokenizer than the policy: token {number} is "
            f"{token!r} in only one of them; choose a reference with the policy's tokenizer."
        )


def starting_adapters(folder: Path, policy: Pretrained) -> tuple[Params, LoRA]:
    """Load adapters in the format of `peft` to train them further.

    Args:
      folder: their folder.
      policy: the model that they were trained over.

    Returns:
      The adapters, and their settings. Layers of another rank than most keep it, and the scale is
      that of all layers.

    Raises:
      ValueError: if the files cannot be read, are not of plain LoRA, or do not fit the model.
    """
    adapters, scale = load_adapter(folder, policy.config, policy.hf_config["model_type"])
    flat = flatten_dict(adapters, sep="/")
    ranks = Counter(len(x) for path, x in flat.items() if path.endswith("/lora_b"))
    rank = ranks.most_common(1)[0][0]
    layers = {re.sub(r"^layer_\d+/|/lora_[ab]$", "", path) for path in flat}
    targets = f"({'|'.join(sorted(map(re.escape, layers)))})$"
    return adapters, LoRA(rank=rank, alpha=scale * rank, targets=targets)
