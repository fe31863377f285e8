"""Language models in folders that `transformers` reads and writes.

Such a folder has `config.json`, safetensors files and the files of the tokenizer. Models in GGUF
files can be loaded too.
"""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.io import adapter_files
from ppo_jax.models.io.families import config_of, family_of
from ppo_jax.models.io.family import HFConfig, shapes_of
from ppo_jax.models.io.safetensors_format import writing
from ppo_jax.models.io.stored import (
    adapter_base,
    file_format,
    read,
    read_json,
    resolve,
    table_tensors,
    write,
)
from ppo_jax.models.io.weights import Rule, TensorReader, from_params, to_params
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


class Pretrained(NamedTuple):
    """A loaded model, with all that is needed to save it again.

    Attributes:
      config: the config of the decoder.
      params: its parameters, float32. Those of a scorer are `{"trunk": ..., "head": ...}`.
      hf_config: the parsed `config.json`, which is written back when the model is saved.
      generation: the parsed `generation_config.json`, or None if there is none.

    Example:
      >>> from ppo_jax.models.transformer import init_params
      >>> config = TransformerConfig(
      ...     vocab_size=7, positions=8, width=4, layers=1, heads=2, mlp_width=16
      ... )
      >>> params = init_params(config, jax.random.key(0))
      >>> Pretrained(config, params, {"model_type": "gpt2", "eos_token_id": [5, 6]}).end_ids
      (5, 6)
    """

    config: TransformerConfig
    params: Params
    hf_config: HFConfig
    generation: HFConfig | None = None

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids of the tokens that end a text, from `generation` and then from `hf_config`."""
        ids: list[int] = []
        for settings in (self.generation or {}, self.hf_config):
            end = settings.get("eos_token_id")
            ids += end if isinstance(end, list) else [] if end is None else [end]
        return tuple(dict.fromkeys(ids))


def load_policy(
    model: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    remat: bool = False,
    mesh: Mesh | None = None,
) -> Pretrained:
    """Load a language model, to train it or to sample from it.

    Args:
      model: a folder, a Hugging Face id or a .gguf file. An adapter in the format of `peft` is
        merged into the base model that it names, and the folder of a run stands for its result.
      dtype: dtype of the activations and matrix products. The parameters are float32 in any case.
      remat: whether the backward pass recomputes the activations of each block to save memory.
      mesh: if given, each tensor is sharded over it as it is read, by the rules of `sharding`.

    Returns:
      The model; its `params` are those that `language_model(config)` takes.

    Raises:
      ValueError: if the model cannot be found or read, its architecture is not supported, or its
        tensors do not fit; the message says which.

    Example:
      >>> import tempfile
      >>> from ppo_jax.models.io.families.gpt2 import config_to_hf
      >>> from ppo_jax.models.transformer import init_params
      >>> config = TransformerConfig(
      ...     vocab_size=7, positions=8, width=4, layers=1, heads=2, mlp_width=16
      ... )
      >>> params = init_params(config, jax.random.key(0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_policy(folder, Pretrained(config, params, config_to_hf(config)))
      ...     loaded = load_policy(folder, dtype=jnp.bfloat16)
      >>> loaded.config.width, loaded.params["embedding"].dtype.name
      (4, 'float32')
    """
    if not file_format(model) and (base := adapter_base(folder := resolve(model))) is not None:
        loaded = load_policy(base, dtype=dtype, remat=remat, mesh=mesh)
        kind = loaded.hf_config["model_type"]
        params = adapter_files.merge_adapter(loaded.params, folder, loaded.config, kind)
        return loaded._replace(params=params)
    stored = read(model)
    hf, family = stored.hf, stored.family
    config = config_of(hf, dtype=dtype, remat=remat)
    rules = family.table(config)
    tensors = table_tensors(stored, rules, tied=config.tied)
    # In the file of a tied model these are copies of the embedding and the output bias.
    copies = set(family.untied.values()) if config.tied else set()
    if not _is_copy(tensors, rules, copies):  # As transformers decides since version 5.0.
        _LOG.warning(
            "The config of %s says that the output matrix is the embedding, but the file holds "
            "another matrix for it, which is used.",
            stored.path,
        )
        hf, copies = {**hf, "tie_word_embeddings": False}, set()
        config = replace(config, tied=False)
        rules = family.table(config)
    if any(name.startswith("v_head.") for name in tensors):
        _LOG.warning(
            "%s also holds a value head, which is not used; load_scorer and --critic read it.",
            stored.path,
        )
    for name in list(tensors):
        # Only classifiers use the pooler, and only TRL's critics use the value head.
        if name in copies or name.startswith((f"{family.prefix}pooler.", "v_head.")):
            del tensors[name]
    if (head := family.head["kernel"]) in tensors:
        raise ValueError(
            f"{stored.path} is a reward model or another classifier: it has {head} and no output "
            "over the vocabulary. It can be a reward or the start of a critic, but no policy."
        )
    shapes = placed(shapes_of(config), mesh)
    params = to_params(tensors, rules, shapes, source=stored.path)
    generation = stored.path / "generation_config.json"
    return Pretrained(config, params, hf, read_json(generation) if generation.is_file() else None)


def _is_copy(tensors: Mapping[str, TensorReader], rules: list[Rule], names: set[str]) -> bool:
    """Return whether each stored output matrix, of those in `names`, equals the embedding."""
    embedding = next(rule.stored for rule in rules if rule.paths == ("embedding",))
    outputs = [name for name in names if name in tensors and name.endswith("weight")]
    return embedding not in tensors or all(
        np.array_equal(tensors[output](), tensors[embedding]()) for output in outputs
    )


def save_policy(folder: str | Path, model: Pretrained, tokenizer: Any = None) -> None:
    """Save a language model in a folder that `transformers.AutoModelForCausalLM` loads.

    Args:
      folder: the folder to write; it is made if it does not exist.
      model: the model. Its tensors are saved in float32.
      tokenizer: a tokenizer of `transformers` to save with it, or None.

    Raises:
      ValueError: if the folder cannot be written, or the family's table lacks a parameter.

    Example:
      >>> import tempfile
      >>> from ppo_jax.models.io.families.gpt2 import config_to_hf
      >>> from ppo_jax.models.transformer import init_params
      >>> config = TransformerConfig(
      ...     vocab_size=7, positions=8, width=4, layers=1, heads=2, mlp_width=16
      ... )
      >>> params = init_params(config, jax.random.key(0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_policy(folder, Pretrained(config, params, config_to_hf(config)))
      ...     print(*sorted(file.name for file in Path(folder).iterdir()))
      config.json generation_config.json model.safetensors
    """
    kind = model.hf_config["model_type"]
    family = family_of(kind)
    tensors = from_params(model.params, family.table(model.config))
    generation = model.generation
    if generation is None:
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation = {
            name: model.hf_config[name] for name in ids if model.hf_config.get(name) is not None
        }
    hf = {**model.hf_config, "architectures": [family.classes[kind][0]]}
    with writing(folder):
        write(folder, hf, tensors, tokenizer)
        file = Path(folder) / "generation_config.json"
        file.write_text(json.dumps(generation, indent=2) + "\n")


def check_tokenizer(tokenizer: Any, config: TransformerConfig) -> None:
    """Check that every token of a text has a row in the model's embedding.

    The pad token and added tokens that never come from a text, such as Gemma 3's token for an
    image, may have larger ids; `data.check_ids` checks that no text contains one, and `data.pad_id`
    chooses another id for padding.

    Args:
      tokenizer: a tokenizer of `transformers`.
      config: the config of the model.

    Raises:
      ValueError: if the tokenizer can produce an id that is not below `config.vocab_size`.
    """
    beyond = {i for i in tokenizer.get_vocab().values() if i >= config.vocab_size}
    kinds = ("bos", "eos", "unk", "sep", "cls", "mask")
    used = {getattr(tokenizer, f"{kind}_token_id", None) for kind in kinds}
    unused = {
        getattr(tokenizer, "pad_token_id", None),
        *getattr(tokenizer, "added_tokens_decoder", ()),
    } - used
    if beyond - unused:
        raise ValueError(
            f"The tokenizer gives ids up to {max(beyond)}, but the model has "
            f"vocab_size={config.vocab_size}; use the model's own tokenizer."
        )


def count_params(params: Params) -> int:
    """Return the number of parameters in a tree of arrays or shapes."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def load_tokenizer(model: str | Path) -> Any:
    """Load the tokenizer of a model.

    Args:
      model: a folder, a Hugging Face id or a .gguf file.

    Returns:
      A tokenizer of `transformers`.

    Raises:
      ValueError: if the model has no tokenizer, or it cannot be loaded.

    Example:
      >>> import tempfile
      >>> from tokenizers import Tokenizer, models
      >>> from transformers import PreTrainedTokenizerFast
      >>> words = Tokenizer(models.WordLevel({"yes": 0, "no": 1}, unk_token="no"))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
      ...     tokenizer = load_tokenizer(folder)
      >>> tokenizer("yes").input_ids
      [0]
    """
    try:
        if single := file_format(model):
            return single.load_tokenizer(Path(model))
        folder = resolve(model)
        base = adapter_base(folder)
        if base is not None and not any((folder / name).is_file() for name in _VOCABULARIES):
            return load_tokenizer(base)
        # Without a vocabulary file, transformers would invent a tokenizer for some families.
        if not any((folder / name).is_file() for name in _VOCABULARIES):
            raise ValueError(f"none of {', '.join(_VOCABULARIES)} is there.")
        from transformers import AutoTokenizer  # Imported here because it is slow.

        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise ValueError(f"{model} holds no tokenizer that can be loaded: {error}") from error
