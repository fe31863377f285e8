"""Models as folders that `transformers` reads and writes: `config.json`, safetensors and the tokenizer."""

import dataclasses
import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ppo_jax.models import gguf_format, gguf_tokenizer, weights
from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.families import family_of
from ppo_jax.models.family import Family
from ppo_jax.models.sharding import placed
from ppo_jax.models.transformer import init_params
from ppo_jax.types import Params

_LOG = logging.getLogger(__name__)
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")


class Pretrained(NamedTuple):
    """A loaded model: our config, our parameters, and its `config.json` and `generation_config.json` to be written back."""

    config: TransformerConfig
    params: Params
    hf_config: dict[str, Any]
    generation: dict[str, Any] | None = None

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a text, as the model's own files say."""
        ids = [(self.generation or {}).get("eos_token_id"), self.hf_config.get("eos_token_id")]
        return tuple(dict.fromkeys(i for x in ids if x is not None for i in (x if isinstance(x, list) else [x])))


def resolve(model: str | Path, files: tuple[str, ...] = _FILES) -> Path:
    """A local folder as it is, else the snapshot of a Hugging Face id, of these files.

    Raises:
      ValueError: if there is neither.
    """
    if Path(model).is_dir():
        if not (Path(model) / "config.json").is_file() or not (Path(model) / "model" / "config.json").is_file():
            return Path(model)
        raise ValueError(f"{model} is the folder of a run; its model is {Path(model) / 'model'}.")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(str(model), allow_patterns=files))
    except Exception as error:  # the hub raises many kinds; each means that there is no such model to be had
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{str(model)!r} is no folder here, nor a model that the hub gives: {reason}") from error


def load_policy(model: str | Path, *, dtype: Any = jnp.float32, remat: bool = False, mesh: Mesh | None = None) -> Pretrained:
    """A language model; parameters float32 whatever the file holds.

    Args:
      model: a folder, a Hugging Face id or a .gguf file.
      dtype: compute type.
      remat: recompute blocks in the backward pass.
      mesh: where each tensor goes as it is read, by the rules of `models.sharding`.

    Raises:
      ValueError: naming what the folder lacks or the tensors that do not fit.
    """
    folder, hf, stored = _read(model)
    family, config = family_of(hf.get("model_type")), config_of(hf, dtype=dtype, remat=remat)
    rules = weights.expand(family.rules(config), config.layers)
    tensors = _named(stored, rules, family)
    if config.tied and _has_output_of_its_own(tensors, rules):  # as transformers does since 5.0
        _LOG.warning("%s says that its output is its embedding, but holds another matrix for it, which is used.", folder)
        hf = {**hf, "tie_word_embeddings": False}
        config = config_of(hf, dtype=dtype, remat=remat)
        rules = weights.expand(family.rules(config), config.layers)
        tensors = _named(stored, rules, family)
    for name in [name for name in tensors if config.tied and name in _OUTPUTS]:
        del tensors[name]  # a copy of the embedding, or of a bias
    for name in [name for name in tensors if name.startswith(f"{family.prefix}pooler.")]:
        del tensors[name]  # says nothing of the next token
    params = weights.to_params(tensors, rules, placed(_shapes(config), mesh), source=str(folder))
    generation = folder / "generation_config.json"
    return Pretrained(config, params, hf, _read_json(generation) if generation.is_file() else None)


def _has_output_of_its_own(tensors: Mapping[str, Any], rules: list[weights.Rule]) -> bool:
    embedding = next(rule.stored for rule in rules if rule.ours == ("embedding",))
    outputs = [name for name in tensors if name in _OUTPUTS and name.endswith("weight")]
    return embedding in tensors and any(not np.array_equal(tensors[name], tensors[embedding]) for name in outputs)


def load_trunk(model: str | Path, *, dtype: Any = jnp.float32, remat: bool = False) -> Pretrained:
    """A model without any head, such as a sentence encoder."""
    folder, hf, stored = _read(model)
    family = family_of(hf.get("model_type"))
    config = dataclasses.replace(config_of(hf, dtype=dtype, remat=remat), lm_transform=False, tied=True)
    rules = weights.expand(family.rules(config), config.layers)
    tensors = _named(stored, rules, family)
    part = lambda name: name.removeprefix(family.prefix).partition(".")[0]
    trunk = {part(rule.stored) for rule in rules}
    for name in [name for name in tensors if part(name) not in trunk]:
        del tensors[name]  # a head
    return Pretrained(config, weights.to_params(tensors, rules, _shapes(config), source=str(folder)), hf)


def load_scorer(model: str | Path, *, dtype: Any = jnp.float32, remat: bool = False, mesh: Mesh | None = None) -> Pretrained:
    """A reward model or separate critic (a class `...ForSequenceClassification`, one label): `{"trunk": ..., "head": ...}`."""
    folder, hf, stored = _read(model)
    family = family_of(hf.get("model_type"))
    config = dataclasses.replace(config_of(hf, dtype=dtype, remat=remat), lm_transform=False, tied=True)
    rules = weights.expand(family.rules(config), config.layers)
    head, tensors = {}, _named(stored, [*rules, *family.score], family)
    for rule in family.score:
        if rule.stored not in tensors:
            raise ValueError(f"{folder} needs a tensor {rule.stored} to score a text.")
        head |= rule.load(np.asarray(tensors.pop(rule.stored)).astype(np.float32))
    if head["kernel"].shape != (config.width, 1):
        raise ValueError(f"{folder} scores with a {family.score[0].stored} of {head['kernel'].shape[1]} labels, not one.")
    for name in [name for name in tensors if name in _OUTPUTS]:
        del tensors[name]
    trunk = weights.to_params(tensors, rules, placed(_shapes(config), mesh), source=str(folder))
    return Pretrained(config, {"trunk": trunk, "head": weights.unflatten_dict(head, sep="/")}, hf)


def config_of(hf: dict[str, Any], *, dtype: Any = jnp.float32, remat: bool = False) -> TransformerConfig:
    """Our config of a `config.json`.

    Raises:
      ValueError: for a family or a switch that is not supported, or a field that is missing.
    """
    kind = hf.get("model_type")
    try:
        config = TransformerConfig(**family_of(kind).config(hf), dtype=dtype, remat=remat)
    except KeyError as error:
        raise ValueError(f"The config of a {kind} needs {error}.") from error
    except (TypeError, AttributeError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"The config of a {kind} holds a value of the wrong kind: {error}.") from error
    for name in ("vocab_size", "positions", "width", "layers", "heads", "mlp_width"):
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < (4096 if name == "layers" else 2**31):
            raise ValueError(f"The config of a {kind} gives {name}={value!r}; that must be a positive whole number.")
    return config


def read_config(model: str | Path) -> dict[str, Any]:
    """The `config.json` of a model, or what a .gguf file says in its place; weights need not be there.

    Raises:
      ValueError: if there is none, or its family is not known.
    """
    return gguf_format.read(Path(model))[0] if gguf_format.is_gguf(model) else _config_in(resolve(model, ("config.json",)))


def save_policy(folder: str | Path, model: Pretrained, tokenizer: Any = None) -> None:
    """Writes a folder that `transformers.AutoModelForCausalLM` loads."""
    kind = model.hf_config["model_type"]
    family = family_of(kind)
    tensors = weights.from_params(model.params, weights.expand(family.rules(model.config), model.config.layers))
    generation = model.generation
    if generation is None:
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation = {name: model.hf_config[name] for name in ids if model.hf_config.get(name) is not None}
    with weights.writing(folder):
        _write(folder, {**model.hf_config, "architectures": [family.classes[kind][0]]}, tensors, tokenizer)
        (Path(folder) / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def save_scorer(folder: str | Path, model: Pretrained, tokenizer: Any = None) -> None:
    """Writes a folder that `transformers.AutoModelForSequenceClassification` loads.

    There a row ends before its last pad ids, so a config without a pad id gets the tokenizer's, or the end id.
    """
    kind = model.hf_config["model_type"]
    family, config = family_of(kind), dataclasses.replace(model.config, lm_transform=False, tied=True)
    # An output matrix of its own has no place in a model that scores.
    trunk = {name: part for name, part in model.params["trunk"].items() if name != "unembedding" and not name.startswith("lm_")}
    tensors = dict(weights.from_params(trunk, weights.expand(family.rules(config), config.layers)))
    tensors |= dict(weights.from_params(model.params["head"], family.score))
    extra = {"architectures": [family.classes[kind][1]], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    pads = [model.hf_config.get("pad_token_id"), *([] if tokenizer is None else [tokenizer.pad_token_id, tokenizer.eos_token_id])]
    extra["pad_token_id"] = next((i for i in (*pads, *model.end_ids) if i is not None), None)
    with weights.writing(folder):
        _write(folder, {**model.hf_config, **extra}, tensors.items(), tokenizer)


def check_tokenizer(tokenizer: Any, config: TransformerConfig) -> None:
    """Raises ValueError if the tokenizer can produce an id that the model has no word for."""
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= config.vocab_size:
        raise ValueError(
            f"The tokenizer gives ids up to {largest}, but the model has vocab_size={config.vocab_size}; use the model's own."
        )


def count_params(params: Params) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


_OUTPUTS = (
    "lm_head.weight", "embed_out.weight", "lm_head.decoder.weight", "lm_head.decoder.bias",
    "cls.predictions.decoder.weight", "cls.predictions.decoder.bias",
)  # fmt: skip


def load_tokenizer(model: str | Path) -> Any:
    """The tokenizer in a model's folder, hub snapshot or .gguf file.

    Raises:
      ValueError: if there is none.
    """
    try:
        if gguf_format.is_gguf(model):
            return gguf_tokenizer.load_tokenizer(Path(model))
        folder = resolve(model)
        if not any((folder / name).is_file() for name in _VOCABULARIES):  # for some families transformers would invent one
            raise ValueError(f"none of {', '.join(_VOCABULARIES)} is there.")
        from transformers import AutoTokenizer  # slow to import, and `--help` does without

        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise ValueError(f"{model} holds no tokenizer that can be loaded: {error}") from error


def _read(model: str | Path) -> tuple[Path, dict[str, Any], Mapping[str, Any]]:
    """Where a model is, its `config.json` and its tensors."""
    if gguf_format.is_gguf(model):
        return Path(model), *gguf_format.read(Path(model))
    folder = resolve(model)
    hf = _config_in(folder)  # before the tensors, so that a family that is unknown is named
    return folder, hf, weights.StoredTensors(folder)


def _config_in(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.exists():
        raise ValueError(f"{folder} holds no config.json, so it is no model in the Hugging Face format.")
    hf = _read_json(file)
    family_of(hf.get("model_type"))
    return hf


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{file} is not readable JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is no JSON object.")
    return content


def _shapes(config: TransformerConfig) -> Params:
    try:
        return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    except (TypeError, OverflowError, ZeroDivisionError, AttributeError) as error:
        raise ValueError(f"No model can be made of the config {config}: {str(error).splitlines()[0]}") from error


def _named(stored: Mapping[str, Any], rules: list[weights.Rule], family: Family) -> "_Renamed":
    """The stored tensors by the names of the table, without those that are no parameters."""
    known = {rule.stored for rule in rules}
    today = {name: re.sub(r"\.(gamma|beta)$", _of_norms, name) for name in stored}
    names = {new if new in known or family.prefix + new not in known else family.prefix + new: name for name, new in today.items()}
    if len(names) < len(stored):
        raise ValueError(f"One parameter is stored under two names: {', '.join(sorted(set(stored) - set(names.values())))} is one.")
    return _Renamed(stored, {new: old for new, old in names.items() if not family.ignored.fullmatch(old)})


def _of_norms(match: re.Match) -> str:
    """What files converted from TensorFlow call gamma and beta."""
    return {"gamma": ".weight", "beta": ".bias"}[match.group(1)]


class _Renamed(dict):
    """Tensors under new names, read when they are asked for."""

    def __init__(self, stored: Mapping[str, Any], names: dict[str, str]):
        super().__init__(names)
        self._stored = stored

    def __getitem__(self, name: str) -> Any:
        return self._stored[super().__getitem__(name)]

    def pop(self, name: str) -> Any:
        return self._stored[super().pop(name)]


def _write(folder: str | Path, hf: dict[str, Any], tensors: Any, tokenizer: Any) -> None:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # The tensors are float32 whatever they were read from, and `transformers` loads them as the config says.
    hf = {name: value for name, value in hf.items() if name != "torch_dtype"} | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
    weights.write_safetensors(folder, tensors)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
