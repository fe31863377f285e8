"""A reward from its name on the command line."""

import importlib.util
import sys
from pathlib import Path
from typing import Literal

import jax

from ppo_jax.data.text import pad_id
from ppo_jax.hashing import text_hash
from ppo_jax.models import heads
from ppo_jax.models.io import pretrained, scorers
from ppo_jax.reward_functions.model import ModelReward
from ppo_jax.reward_functions.protocol import RewardFn
from ppo_jax.reward_functions.text import TextReward
from ppo_jax.reward_functions.tokens import TokenReward


def load_reward(
    spec: str, given: Literal["text", "tokens"] = "text", label: str | None = None
) -> RewardFn:
    """A reward of `file.py:function`, on texts or on arrays, or a reward model's folder or Hugging Face id.

    A reward model reads the end of a text that is longer than its positions: the response, and what fits of the prompt. Where it
    has several labels, the logit of `label` is the score.

    Raises:
      ValueError: if there is no such thing, or the reward model's tokenizer is not its own.
    """
    file, colon, name = spec.rpartition(":")
    if not colon or not file.endswith(".py"):
        if given == "tokens":
            raise ValueError(
                f"reward_given=tokens needs a function, my_file.py:function; {spec} would be a reward model."
            )
        try:
            scorer, tokenizer = (
                scorers.load_scorer(spec, label=label),
                pretrained.load_tokenizer(spec),
            )
            pretrained.check_tokenizer(tokenizer, scorer.config)
            if scorer.config.causal and heads.pooled(scorer.params["head"]):
                raise ValueError(
                    f"{spec} takes its score from the first token, which as a decoder (is_decoder) sees no other."
                )
        except ValueError as error:
            raise ValueError(
                f"The reward is neither my_file.py:function nor a reward model: {error}"
            ) from error
        tokenizer.truncation_side = "left"  # of a text that is too long, the response stays
        score = jax.jit(heads.reward_model(scorer.config))
        return ModelReward(
            score,
            scorer.params,
            tokenizer,
            scorer.config.positions,
            pad_id(tokenizer),
            scorer.config.vocab_size,
        )
    if label is not None:
        raise ValueError(
            f"reward_label={label} is of a reward model's labels; {spec} is a function."
        )
    if not Path(file).is_file():
        raise ValueError(f"The reward file {file} does not exist.")
    own_name = (
        f"{Path(file).stem}_{text_hash(str(Path(file).resolve()))}"  # that of no other module
    )
    module_spec = importlib.util.spec_from_file_location(own_name, file)
    sys.modules[own_name] = module = importlib.util.module_from_spec(
        module_spec
    )  # where classes are looked for
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"The reward file {file} does not run: {type(error).__name__}: {error}"
        ) from error
    if not callable(getattr(module, name, None)):
        raise ValueError(f"The reward file {file} has no function {name!r}.")
    return (TextReward if given == "text" else TokenReward)(getattr(module, name))
