"""Models without an output over the vocabulary: trunks, and models whose head scores a text.

Scorers are the sequence classifiers of `transformers`, with one label.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.sharding import Mesh
from jax.typing import DTypeLike

from ppo_jax.models import heads
from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.io.families import config_of, family_of
from ppo_jax.models.io.family import HFConfig, shapes_of
from ppo_jax.models.io.pretrained import Pretrained
from ppo_jax.models.io.safetensors_format import writing
from ppo_jax.models.io.stored import StoredModel, read, table_tensors, write
from ppo_jax.models.io.weights import Rule, TensorReader, from_params, to_params
from ppo_jax.sharding import placed

# The head of TRL's AutoModelForCausalLMWithValueHead, beside the tensors of the language model.
_VALUE_HEAD = [
    Rule("v_head.summary.weight", ("kernel",), transpose=True),
    Rule("v_head.summary.bias", ("bias",)),
]


def _trunk_config(config: TransformerConfig) -> TransformerConfig:
    """Return the config of the trunk, which has no output layers."""
    return replace(config, lm_transform=False, tied=True)


def load_trunk(
    model: str | Path, *, dtype: DTypeLike = jnp.float32, remat: bool = False
) -> Pretrained:
    """Load a model without its head, such as a sentence encoder.

    Args:
      model: a folder, a Hugging Face id or a .gguf file.
      dtype: as in `load_policy`.
      remat: as in `load_policy`.

    Returns:
      The model; its `params` are those that `language_model(config).hidden` takes.

    Raises:
      ValueError: as in `load_policy`, but the tensors of a head are ignored.
    """
    stored = read(model)
    full = config_of(stored.hf, dtype=dtype, remat=remat)
    family, config = stored.family, _trunk_config(full)

    def module(name: str) -> str:
        return name.removeprefix(family.prefix).partition(".")[0]

    rules = family.table(config)
    trunk = {module(rule.stored) for rule in rules}
    tensors = table_tensors(stored, rules, tied=full.tied)
    tensors = {name: reader for name, reader in tensors.items() if module(name) in trunk}
    params = to_params(tensors, rules, shapes_of(config), source=stored.path)
    return Pretrained(config, params, stored.hf)


def load_scorer(
    model: str | Path,
    *,
    label: str | None = None,
    dtype: DTypeLike = jnp.float32,
    remat: bool = False,
    mesh: Mesh | None = None,
) -> Pretrained:
    """Load a model that scores texts: a reward model, or the start of a separate critic.

    The scores are those of `transformers`, whose classifiers skip the `pad_token_id` of their
    config at the end of a text; it becomes the `pad_id` of the config. A checkpoint of TRL's
    `AutoModelForCausalLMWithValueHead` can be loaded too; its value head is then the head.

    Args:
      model: a folder, a Hugging Face id or a .gguf file of a `...ForSequenceClassification` class.
      label: if the classifier has several labels, the name or number (from 0) of the label whose
        logit is the score.
      dtype: as in `load_policy`.
      remat: as in `load_policy`.
      mesh: as in `load_policy`.

    Returns:
      The model; its `params` are `{"trunk": ..., "head": ...}`, which `models.heads.reward_model`
      takes.

    Raises:
      ValueError: as in `load_policy`, or if there is no head that fits or `label` is not one of the
        labels.

    Example:
      >>> import tempfile
      >>> import jax
      >>> from ppo_jax.models.io.families.gpt2 import config_to_hf
      >>> config = TransformerConfig(
      ...     vocab_size=7, positions=8, width=4, layers=1, heads=2, mlp_width=16
      ... )
      >>> params = heads.init_scorer(config, jax.random.key(0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_scorer(folder, Pretrained(config, params, config_to_hf(config)))
      ...     loaded = load_scorer(folder)
      >>> loaded.params["head"]["kernel"].shape
      (4, 1)
    """
    opened, tensors, stored = _open_scorer(model, label, dtype, remat)
    rules = stored.family.table(opened.config)
    shapes = placed(shapes_of(opened.config), mesh)
    trunk = to_params(tensors, rules, shapes, source=stored.path)
    return opened._replace(params={"trunk": trunk, **opened.params})


def open_scorer(model: str | Path, *, label: str | None = None) -> Pretrained:
    """Read a model that scores texts without its trunk.

    Args:
      model: as in `load_scorer`.
      label: as in `load_scorer`.

    Returns:
      The model; its `params` are `{"head": ...}`.

    Raises:
      ValueError: as in `load_scorer`, but the tensors of the trunk are not looked at.
    """
    return _open_scorer(model, label, jnp.float32, remat=False)[0]


def _open_scorer(
    model: str | Path, label: str | None, dtype: DTypeLike, remat: bool
) -> tuple[Pretrained, dict[str, TensorReader], StoredModel]:
    """Return a scorer with its head only, the readers of the other tensors, and its files."""
    stored = read(model)
    family, full = stored.family, config_of(stored.hf, dtype=dtype, remat=remat)
    config = replace(_trunk_config(full), pad_id=_pad_id(stored.hf))
    rules = family.table(config)
    tensors = table_tensors(stored, [*rules, *family.score], tied=full.tied)
    head: dict[str, np.ndarray] = {}
    for rule in _VALUE_HEAD if _VALUE_HEAD[0].stored in tensors else family.score:
        if rule.stored not in tensors:
            raise ValueError(f"{stored.path} needs a tensor {rule.stored} to score a text.")
        head |= rule.load(tensors.pop(rule.stored)().astype(np.float32))
    for name in family.untied.values():
        tensors.pop(name, None)
    head = _one_label(head, config.width, label, stored)
    opened = Pretrained(config, {"head": unflatten_dict(head, sep="/")}, stored.hf)
    return opened, tensors, stored


def _pad_id(hf: HFConfig, *others: int | None, vocab_size: int = 0) -> int | None:
    """Return the token that the classifiers of `transformers` skip at the end of a text.

    Args:
      hf: the `config.json`, or what will become it.
      *others: ids to choose from if it has none; those that are not below `vocab_size` are no
        choice, because they have no row in the embedding.
      vocab_size: number of tokens in the model's vocabulary.

    Raises:
      ValueError: if `pad_token_id` is not an integer.
    """
    pad = hf.get("pad_token_id", family_of(hf["model_type"]).pad_id)
    if pad is not None and type(pad) is not int:
        raise ValueError(f"pad_token_id must be an integer or null, not {pad!r:.60}.")
    if pad is not None:
        return pad
    return next((i for i in others if i is not None and i < vocab_size), None)


def _one_label(
    head: dict[str, np.ndarray], width: int, label: str | None, stored: StoredModel
) -> dict[str, np.ndarray]:
    """Check the shapes of a classifier's head, and return it with the output of one label only."""
    kernel = head["kernel"]
    labels = kernel.shape[-1] if kernel.ndim else 0
    outputs = {"kernel": (width, labels), "bias": (labels,)}
    for path, x in head.items():
        shape = outputs.get(path, (width, width) if path.endswith("kernel") else (width,))
        if x.shape != shape:
            raise ValueError(f"{stored.path} holds a head whose {path} is {x.shape}, not {shape}.")
    given = stored.hf.get("id2label")
    given = given if isinstance(given, dict) else {}
    names = [str(given.get(str(i), f"LABEL_{i}")) for i in range(labels)]
    known = names if label in names else map(str, range(labels))
    indices = [
        i for i, name in enumerate(known) if name == label or (label is None and labels == 1)
    ]
    if len(indices) != 1:
        raise ValueError(
            f"{stored.path} scores by labels ({', '.join(names)}): reward_label must name one, or "
            f"be its number from 0, not {label!r}."
        )
    return {path: x[..., indices] if path in outputs else x for path, x in head.items()}


def start_scorer(model: str | Path, key: Array, tokenizer: Any = None) -> Pretrained:
    """Return an untrained scorer: the trunk of a model under a new head of its family's kind.

    Layers of the head that the model has, such as BERT's pooler, are kept. A BERT attends in both
    directions whatever its config says, because `transformers` scores its first token.

    Args:
      model: a folder, a Hugging Face id or a .gguf file.
      key: `[]` typed key, consumed.
      tokenizer: the tokenizer that will be saved with the scorer. If the model's config has no pad
        id, it is chosen here as in `save_scorer`, so that training and use read the same token.

    Returns:
      The model; its `params` are `{"trunk": ..., "head": ...}`.

    Raises:
      ValueError: as in `load_trunk`.
    """
    loaded, stored = load_trunk(model), read(model)
    config, hf, family = loaded.config, stored.hf, stored.family
    layer = heads.pooled(unflatten_dict(family.head, sep="/"))
    if layer:
        config, hf = replace(config, causal=False), {**hf, "is_decoder": False}
        head = flatten_dict(heads.init_pooled_head(config.width, key, layer), sep="/")
    else:
        head = heads.init_head(config.width, key)
    tensors = table_tensors(stored, family.score)
    for rule in family.score:
        if rule.stored in tensors:
            tensor = tensors[rule.stored]().astype(np.float32)
            for path, x in rule.load(tensor).items():
                # The output layer of a classifier with several labels does not fit and is dropped.
                if x.shape == head[path].shape:
                    head[path] = jnp.asarray(x)
    if tokenizer is not None:
        hf = {**hf, "pad_token_id": _saved_pad_id(loaded, tokenizer)}
    config = replace(config, pad_id=_pad_id(hf))
    return Pretrained(config, {"trunk": loaded.params, "head": unflatten_dict(head, sep="/")}, hf)


def save_scorer(folder: str | Path, model: Pretrained, tokenizer: Any = None) -> None:
    """Save a scorer in a folder that `transformers.AutoModelForSequenceClassification` loads.

    That class needs a pad id to find the last token of a text. If the config has none, the
    tokenizer's pad id or else an end id is saved as the pad id. Tokens with this id at the end of a
    text are not read then; see `models.heads.reward_model`.

    Args:
      folder: the folder to write; it is made if it does not exist.
      model: the scorer, whose `params` are `{"trunk": ..., "head": ...}`.
      tokenizer: a tokenizer of `transformers` to save with it, or None.

    Raises:
      ValueError: if the folder cannot be written, or the family's table lacks a parameter.

    Example:
      >>> import tempfile
      >>> import jax
      >>> from ppo_jax.models.io.families.gpt2 import config_to_hf
      >>> config = TransformerConfig(
      ...     vocab_size=7, positions=8, width=4, layers=1, heads=2, mlp_width=16
      ... )
      >>> params = heads.init_scorer(config, jax.random.key(0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_scorer(folder, Pretrained(config, params, config_to_hf(config)))
      ...     print(*sorted(file.name for file in Path(folder).iterdir()))
      config.json model.safetensors
    """
    kind = model.hf_config["model_type"]
    family, config = family_of(kind), _trunk_config(model.config)
    # A scorer's files have no place for the output layers of a language model.
    trunk = {
        name: part
        for name, part in model.params["trunk"].items()
        if name != "unembedding" and not name.startswith("lm_")
    }
    tensors = dict(from_params(trunk, family.table(config)))
    tensors |= dict(from_params(model.params["head"], family.score))
    hf = {
        **model.hf_config,
        "architectures": [family.classes[kind][1]],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": _saved_pad_id(model, tokenizer),
    }
    with writing(folder):
        write(folder, hf, tensors.items(), tokenizer)


def _saved_pad_id(model: Pretrained, tokenizer: Any) -> int | None:
    """Return the pad id of a scorer's config: its own, else the tokenizer's, else an end id."""
    ids = [] if tokenizer is None else [tokenizer.pad_token_id, tokenizer.eos_token_id]
    return _pad_id(model.hf_config, *ids, *model.end_ids, vocab_size=model.config.vocab_size)
