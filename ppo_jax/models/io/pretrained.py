"""Language models as folders that `transformers` reads and writes: `config.json`, safetensors and the tokenizer."""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.io import gguf_format, gguf_tokenizer, weights
from ppo_jax.models.io.families import family_of
from ppo_jax.models.io.stored import named, read, read_json, resolve
from ppo_jax.models.transformer import init_params
from ppo_jax.sharding import placed
from ppo_jax.types import Params

_LOG = logging.getLogger(__name__)
_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)

OUTPUTS = (  # names of the matrix over words, and of a second copy of its bias
    "lm_head.weight",
    "embed_out.weight",
    "lm_head.decoder.weight",
    "lm_head.decoder.bias",
    "cls.predictions.decoder.weight",
    "cls.predictions.decoder.bias",
    "vocab_projector.weight",
)


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
        return tuple(
            dict.fromkeys(
                i for x in ids if x is not None for i in (x if isinstance(x, list) else [x])
            )
        )


def load_policy(
    model: str | Path, *, dtype: Any = jnp.float32, remat: bool = False, mesh: Mesh | None = None
) -> Pretrained:
    """A language model; parameters float32 whatever the file holds.

    Args:
      model: a folder, a Hugging Face id or a .gguf file.
      dtype: compute type.
      remat: recompute blocks in the backward pass.
      mesh: where each tensor goes as it is read, by the rules of `models.sharding`.

    Raises:
      ValueError: naming what the folder lacks or the tensors that do not fit.
    """
    folder, hf, found = read(model)
    family, config = family_of(hf.get("model_type")), config_of(hf, dtype=dtype, remat=remat)
    rules = weights.expand(family.rules(config), config.layers)
    tensors = named(found, rules, family)
    if config.tied and _has_output_of_its_own(tensors, rules):  # as transformers does since 5.0
        _LOG.warning(
            "%s says that its output is its embedding, but holds another matrix for it, which is used.",
            folder,
        )
        hf = {**hf, "tie_word_embeddings": False}
        config = config_of(hf, dtype=dtype, remat=remat)
        rules = weights.expand(family.rules(config), config.layers)
        tensors = named(found, rules, family)
    for name in [name for name in tensors if config.tied and name in OUTPUTS]:
        del tensors[name]  # a copy of the embedding, or of a bias
    for name in [name for name in tensors if name.startswith(f"{family.prefix}pooler.")]:
        del tensors[name]  # says nothing of the next token
    params = weights.to_params(tensors, rules, placed(shapes_of(config), mesh), source=str(folder))
    generation = folder / "generation_config.json"
    return Pretrained(config, params, hf, read_json(generation) if generation.is_file() else None)


def _has_output_of_its_own(tensors: Mapping[str, Any], rules: list[weights.Rule]) -> bool:
    embedding = next(rule.stored for rule in rules if rule.ours == ("embedding",))
    outputs = [name for name in tensors if name in OUTPUTS and name.endswith("weight")]
    return embedding in tensors and any(
        not np.array_equal(tensors[name], tensors[embedding]) for name in outputs
    )


def config_of(
    hf: dict[str, Any], *, dtype: Any = jnp.float32, remat: bool = False
) -> TransformerConfig:
    """Our config of a `config.json`.

    Raises:
      ValueError: for a family or a switch that is not supported, or a field that is missing.
    """
    kind = hf.get("model_type")
    for name in ("num_hidden_layers", "n_layer", "num_layers"):  # before a list of so many is made
        if isinstance(hf.get(name), int) and hf[name] >= 4096:
            raise ValueError(
                f"The config of a {kind} gives {name}={hf[name]}; at most 4095 layers are read."
            )
    try:
        config = TransformerConfig(**family_of(kind).config(hf), dtype=dtype, remat=remat)
    except KeyError as error:
        raise ValueError(f"The config of a {kind} needs {error}.") from error
    except (TypeError, AttributeError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(
            f"The config of a {kind} holds a value of the wrong kind: {error}."
        ) from error
    for name in ("vocab_size", "positions", "width", "layers", "heads", "mlp_width"):
        value = getattr(config, name)
        if (
            not isinstance(value, int)
            or isinstance(value, bool)
            or not 0 < value < (4096 if name == "layers" else 2**31)
        ):
            raise ValueError(
                f"The config of a {kind} gives {name}={value!r}; that must be a positive whole number."
            )
    return config


def save_policy(folder: str | Path, model: Pretrained, tokenizer: Any = None) -> None:
    """Writes a folder that `transformers.AutoModelForCausalLM` loads."""
    kind = model.hf_config["model_type"]
    family = family_of(kind)
    tensors = weights.from_params(
        model.params, weights.expand(family.rules(model.config), model.config.layers)
    )
    generation = model.generation
    if generation is None:
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation = {
            name: model.hf_config[name] for name in ids if model.hf_config.get(name) is not None
        }
    with weights.writing(folder):
        write_folder(
            folder,
            {**model.hf_config, "architectures": [family.classes[kind][0]]},
            tensors,
            tokenizer,
        )
        (Path(folder) / "generation_config.json").write_text(
            json.dumps(generation, indent=2) + "\n"
        )


def check_tokenizer(tokenizer: Any, config: TransformerConfig) -> None:
    """Raises ValueError if the tokenizer can produce an id that the model has no word for.

    Added tokens that stand for nothing in a text of words, such as Gemma 3's for an image, may be such: `data.check_ids` looks
    whether any text holds one.
    """
    beyond = {i for i in tokenizer.get_vocab().values() if i >= config.vocab_size}
    kinds = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
    used = {getattr(tokenizer, f"{kind}_token_id", None) for kind in kinds}
    if beyond & used or beyond - set(getattr(tokenizer, "added_tokens_decoder", ())):
        raise ValueError(
            f"The tokenizer gives ids up to {max(beyond)}, but the model has vocab_size={config.vocab_size}; use the model's own."
        )


def count_params(params: Params) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def load_tokenizer(model: str | Path) -> Any:
    """The tokenizer in a model's folder, hub snapshot or .gguf file.

    Raises:
      ValueError: if there is none.
    """
    try:
        if gguf_format.is_gguf(model):
            return gguf_tokenizer.load_tokenizer(Path(model))
        folder = resolve(model)
        if not any(
            (folder / name).is_file() for name in _VOCABULARIES
        ):  # for some families transformers would invent one
            raise ValueError(f"none of {', '.join(_VOCABULARIES)} is there.")
        from transformers import AutoTokenizer  # slow to import, and `--help` does without

        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise ValueError(f"{model} holds no tokenizer that can be loaded: {error}") from error


def shapes_of(config: TransformerConfig) -> Params:
    """The parameters of a config, as shapes; ValueError, if there can be none."""
    try:
        return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    except (TypeError, OverflowError, ZeroDivisionError, AttributeError) as error:
        raise ValueError(
            f"No model can be made of the config {config}: {str(error).splitlines()[0]}"
        ) from error


def write_folder(folder: str | Path, hf: dict[str, Any], tensors: Any, tokenizer: Any) -> None:
    """Writes config, float32 tensors and tokenizer."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # The tensors are float32 whatever they were read from, and `transformers` loads them as the config says.
    hf = {name: value for name, value in hf.items() if name != "torch_dtype"} | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
    weights.write_safetensors(folder, tensors)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
