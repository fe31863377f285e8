"""What several commands read: a model with its tokenizer, prompts, a reward."""

import importlib.util
import sys
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ppo_jax import data
from ppo_jax.chat import as_chat, end_of_turn
from ppo_jax.models import heads, pretrained, scorers
from ppo_jax.models.config import TransformerConfig
from ppo_jax.provenance import text_hash
from ppo_jax.reward_functions import ModelReward, RewardFn, TextReward, TokenReward


def load_model(
    model: str, dtype: str = "float32", remat: bool = False, mesh: Mesh | None = None, *, causal: bool = True
) -> tuple[pretrained.Pretrained, Any]:
    """A policy and its tokenizer, checked against each other; `causal`: an encoder will not do."""
    policy = pretrained.load_policy(model, dtype=jnp.dtype(dtype), remat=remat, mesh=mesh)
    if causal and not policy.config.causal:
        raise ValueError(f"{model} is an encoder, which sees the words to come; a policy must not (is_decoder in its config.json).")
    tokenizer = pretrained.load_tokenizer(model)
    pretrained.check_tokenizer(tokenizer, policy.config)
    return policy, tokenizer


def pad_id(tokenizer: Any) -> int:
    """The tokenizer's pad id, or its end id, or 0: any will do, it is never read."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def stop_ids(tokenizer: Any, policy: pretrained.Pretrained, further: tuple[str, ...] = ()) -> tuple[int, ...]:
    """Ids that end a response: the tokenizer's end token (or separator, where it has none), those that the model's files name, its
    chat template's end of a turn, and further ones.

    Raises:
      ValueError: if a text is not exactly one token.
    """
    ids = [data.end_id(tokenizer), *policy.end_ids, *end_of_turn(tokenizer)]
    for text in further:
        one = tokenizer(text, add_special_tokens=False).input_ids
        if len(one) != 1:
            raise ValueError(f"stop_tokens: {text!r} is {len(one)} tokens of this tokenizer, not one.")
        ids += one
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def check_top_k(top_k: int | None, config: TransformerConfig) -> None:
    """Raises ValueError if there are fewer words than `top_k`."""
    if top_k is not None and not 1 <= top_k <= config.vocab_size:
        raise ValueError(f"top_k={top_k} must lie in 1 .. {config.vocab_size}, the model's vocabulary.")


def load_prompts(
    source: str | Path | list[Any], tokenizer: Any, policy: pretrained.Pretrained, new_tokens: int, chat: bool = False
) -> data.Prompts:
    """Prompts of whatever `data.read_rows` takes, as a policy's tokens."""
    rows = data.read_rows(source)
    rows = as_chat(rows) if chat else rows
    config = policy.config
    prompts = data.encode_prompts(rows, tokenizer, positions=config.positions, new_tokens=new_tokens, pad_id=pad_id(tokenizer))
    data.check_ids(prompts.tokens, config.vocab_size)
    return prompts


def load_reward(spec: str, given: Literal["text", "tokens"] = "text", label: str | None = None) -> RewardFn:
    """A reward of `file.py:function`, on texts or on arrays, or a reward model's folder or Hugging Face id.

    A reward model reads the end of a text that is longer than its positions: the response, and what fits of the prompt. Where it
    has several labels, the logit of `label` is the score.

    Raises:
      ValueError: if there is no such thing, or the reward model's tokenizer is not its own.
    """
    file, colon, name = spec.rpartition(":")
    if not colon or not file.endswith(".py"):
        if given == "tokens":
            raise ValueError(f"reward_given=tokens needs a function, my_file.py:function; {spec} would be a reward model.")
        try:
            scorer, tokenizer = scorers.load_scorer(spec, label=label), pretrained.load_tokenizer(spec)
            pretrained.check_tokenizer(tokenizer, scorer.config)
            if scorer.config.causal and heads.pooled(scorer.params["head"]):
                raise ValueError(f"{spec} takes its score from the first token, which as a decoder (is_decoder) sees no other.")
        except ValueError as error:
            raise ValueError(f"The reward is neither my_file.py:function nor a reward model: {error}") from error
        tokenizer.truncation_side = "left"  # of a text that is too long, the response stays
        score = jax.jit(heads.reward_model(scorer.config))
        return ModelReward(score, scorer.params, tokenizer, scorer.config.positions, pad_id(tokenizer), scorer.config.vocab_size)
    if label is not None:
        raise ValueError(f"reward_label={label} is of a reward model's labels; {spec} is a function.")
    if not Path(file).is_file():
        raise ValueError(f"The reward file {file} does not exist.")
    own_name = f"{Path(file).stem}_{text_hash(str(Path(file).resolve()))}"  # that of no other module
    module_spec = importlib.util.spec_from_file_location(own_name, file)
    sys.modules[own_name] = module = importlib.util.module_from_spec(module_spec)  # where classes are looked for
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"The reward file {file} does not run: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, name, None)):
        raise ValueError(f"The reward file {file} has no function {name!r}.")
    return (TextReward if given == "text" else TokenReward)(getattr(module, name))
