"""Models as folders that `transformers` reads and writes: `config.json`, `model.safetensors` and the tokenizer."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax.models import gpt2, weights
from ppo_jax.models.transformer import TransformerConfig, init_params
from ppo_jax.types import Params

_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")
_HEAD = "score.weight"  # of GPT2ForSequenceClassification, (labels, D)


class Pretrained(NamedTuple):
    """A loaded model: our config, our parameters, and its `config.json` to be written back."""

    config: TransformerConfig
    params: Params
    hf_config: dict[str, Any]


def resolve(model: str | Path) -> Path:
    """A local folder as it is, else the snapshot of a Hugging Face id.

    Raises:
      ValueError: if there is neither.
    """
    if Path(model).is_dir():
        return Path(model)
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(str(model), allow_patterns=_FILES))
    except Exception as error:  # the hub raises many kinds; each means that there is no such model to be had
        raise ValueError(f"{model!r} is neither a folder nor a model that the hub gives: {error}") from error


def load_policy(model: str | Path, *, dtype: Any = jnp.float32, remat: bool = False) -> Pretrained:
    """A language model of the GPT-2 family; parameters float32 whatever the file holds.

    Args:
      model: a folder or a Hugging Face id.
      dtype: compute type.
      remat: recompute blocks in the backward pass.

    Raises:
      ValueError: naming what the folder lacks or the tensors that do not fit.
    """
    folder, hf, config = _read_config(model, dtype, remat)
    rules = _rules(config)
    tensors = _trunk_names(weights.read_safetensors(folder))
    if config.tied:
        tensors.pop("lm_head.weight", None)  # a copy of the embedding
    return Pretrained(config, weights.to_params(tensors, rules, _shapes(config), source=str(folder)), hf)


def load_scorer(model: str | Path, *, dtype: Any = jnp.float32, remat: bool = False) -> Pretrained:
    """A reward model or separate critic (`GPT2ForSequenceClassification`, one label): `{"trunk": ..., "head": ...}`."""
    folder, hf, config = _read_config(model, dtype, remat)
    tensors = _trunk_names(weights.read_safetensors(folder))
    head = tensors.pop(_HEAD, None)
    if head is None or head.shape != (1, config.width):
        found = None if head is None else head.shape
        raise ValueError(f"{folder} needs a {_HEAD} of shape (1, {config.width}) to score a text, not {found}.")
    trunk = weights.to_params(tensors, _rules(config), _shapes(config), source=str(folder))
    return Pretrained(config, {"trunk": trunk, "head": {"kernel": jnp.asarray(head.T, jnp.float32)}}, hf)


def save_policy(folder: str | Path, model: Pretrained, tokenizer: Any = None) -> None:
    """Writes a folder that `transformers.AutoModelForCausalLM` loads."""
    tensors = {
        name if name.startswith("lm_head") else f"transformer.{name}": tensor
        for name, tensor in weights.from_params(model.params, _rules(model.config)).items()
    }
    _write(folder, {**model.hf_config, "architectures": ["GPT2LMHeadModel"]}, tensors, tokenizer)


def save_scorer(folder: str | Path, model: Pretrained, tokenizer: Any = None) -> None:
    """Writes a folder that `transformers.AutoModelForSequenceClassification` loads."""
    trunk = weights.from_params(model.params["trunk"], _rules(model.config))
    tensors = {f"transformer.{name}": tensor for name, tensor in trunk.items() if not name.startswith("lm_head")}
    tensors[_HEAD] = jax.device_get(model.params["head"]["kernel"]).T.copy()
    extra = {"architectures": ["GPT2ForSequenceClassification"], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    _write(folder, {**model.hf_config, **extra}, tensors, tokenizer)


def check_tokenizer(tokenizer: Any, config: TransformerConfig) -> None:
    """Raises ValueError if the tokenizer can produce an id that the model has no word for."""
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= config.vocab_size:
        raise ValueError(
            f"The tokenizer gives ids up to {largest}, but the model has vocab_size={config.vocab_size}; use the model's own."
        )


def count_params(params: Params) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def _read_config(model: str | Path, dtype: Any, remat: bool) -> tuple[Path, dict[str, Any], TransformerConfig]:
    folder = resolve(model)
    file = folder / "config.json"
    if not file.exists():
        raise ValueError(f"{folder} holds no config.json, so it is no model in the Hugging Face format.")
    try:
        hf = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} is not readable JSON: {error}.") from error
    return folder, hf, gpt2.config_from_hf(hf, dtype=dtype, remat=remat)


def _rules(config: TransformerConfig) -> list[weights.Rule]:
    return weights.expand((*gpt2.RULES, *(() if config.tied else (gpt2.UNTIED,))), config.layers)


def _shapes(config: TransformerConfig) -> Params:
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def _trunk_names(tensors: dict) -> dict:
    """Names without the `transformer.` that some files have, and without stored masks."""
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in bare.items() if not gpt2.BUFFERS.fullmatch(name)}


def _write(folder: str | Path, hf: dict[str, Any], tensors: dict, tokenizer: Any) -> None:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
    weights.write_safetensors(folder, tensors)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
