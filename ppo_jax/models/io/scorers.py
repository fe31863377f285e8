"""Models without an output over words: bare trunks, and those whose head scores a text, as folders that `transformers` knows."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ppo_jax.models import heads
from ppo_jax.models.io import weights
from ppo_jax.models.io.families import family_of
from ppo_jax.models.io.pretrained import OUTPUTS, Pretrained, config_of, shapes_of, write_folder
from ppo_jax.models.io.stored import named, read
from ppo_jax.sharding import placed


def load_trunk(model: str | Path, *, dtype: Any = jnp.float32, remat: bool = False) -> Pretrained:
    """A model without any head, such as a sentence encoder; ValueError, naming the tensors of the trunk that do not fit."""
    folder, hf, found = read(model)
    family = family_of(hf.get("model_type"))
    config = dataclasses.replace(
        config_of(hf, dtype=dtype, remat=remat), lm_transform=False, tied=True
    )
    rules = weights.expand(family.rules(config), config.layers)
    tensors = named(found, rules, family)
    part = lambda name: name.removeprefix(family.prefix).partition(".")[0]
    trunk = {part(rule.stored) for rule in rules}
    for name in [name for name in tensors if part(name) not in trunk]:
        del tensors[name]  # a head
    return Pretrained(
        config, weights.to_params(tensors, rules, shapes_of(config), source=str(folder)), hf
    )


def load_scorer(
    model: str | Path,
    *,
    label: str | None = None,
    dtype: Any = jnp.float32,
    remat: bool = False,
    mesh: Mesh | None = None,
) -> Pretrained:
    """A reward model or separate critic, of a class `...ForSequenceClassification`: `{"trunk": ..., "head": ...}`.

    Of a classifier with several labels, `label` is the name or number of the one whose logit is the score.
    """
    folder, hf, found = read(model)
    family = family_of(hf.get("model_type"))
    config = dataclasses.replace(
        config_of(hf, dtype=dtype, remat=remat), lm_transform=False, tied=True
    )
    rules = weights.expand(family.rules(config), config.layers)
    head, tensors = {}, named(found, [*rules, *family.score], family)
    for rule in family.score:
        if rule.stored not in tensors:
            raise ValueError(f"{folder} needs a tensor {rule.stored} to score a text.")
        head |= rule.load(np.asarray(tensors.pop(rule.stored)).astype(np.float32))
    width, count = config.width, head["kernel"].shape[-1] if head["kernel"].ndim else 0
    fits = {"kernel": (width, count), "bias": (count,)}
    for path, x in head.items():
        want = fits.get(path, (width, width) if path.endswith("kernel") else (width,))
        if x.shape != want:
            raise ValueError(f"{folder} holds a head whose {path} is {x.shape}, not {want}.")
    at = _column(label, count, hf, folder)
    head |= {name: x[..., at : at + 1] for name, x in head.items() if name in fits}
    for name in [name for name in tensors if name in OUTPUTS]:
        del tensors[name]
    trunk = weights.to_params(tensors, rules, placed(shapes_of(config), mesh), source=str(folder))
    return Pretrained(config, {"trunk": trunk, "head": weights.unflatten_dict(head, sep="/")}, hf)


def _column(label: str | None, count: int, hf: dict[str, Any], folder: Path) -> int:
    """Which of a classifier's `count` labels is the score."""
    if label is None and count == 1:
        return 0
    given = hf.get("id2label") or {}
    names = [
        str(given.get(str(i), f"LABEL_{i}")) if isinstance(given, dict) else f"LABEL_{i}"
        for i in range(count)
    ]
    found = [i for i, name in enumerate(names) if label == name] or [
        i for i in range(count) if label == str(i)
    ]
    if len(found) != 1:
        raise ValueError(
            f"{folder} scores by labels ({', '.join(names)}): reward_label must name one, or be its number from 0, not {label!r}."
        )
    return found[0]


def start_scorer(model: str | Path, key: jax.Array) -> Pretrained:
    """A reward model that is yet to learn, `{"trunk": ..., "head": ...}`: a model's trunk under a head of its family's kind.

    The head is drawn from `key`, but for what the model holds of it, such as BERT's pooler. A BERT reads both ways in it, whatever
    its config says, for `transformers` takes its score from the first token.
    """
    loaded, (_, hf, found) = load_trunk(model), read(model)
    config, family = loaded.config, family_of(hf.get("model_type"))
    layer = heads.pooled(
        {path.partition("/")[0]: None for rule in family.score for path in rule.ours}
    )
    if layer:
        config, hf = dataclasses.replace(config, causal=False), {**hf, "is_decoder": False}
    head = weights.flatten_dict(
        heads.init_pooled_head(config.width, key, layer)
        if layer
        else heads.init_head(config.width, key),
        sep="/",
    )
    tensors = named(found, family.score, family)
    for rule in family.score:
        if rule.stored in tensors:
            part = rule.load(np.asarray(tensors[rule.stored]).astype(np.float32))
            head |= {
                path: jnp.asarray(x) for path, x in part.items() if x.shape == head[path].shape
            }  # of one label, as ours
    return Pretrained(
        config, {"trunk": loaded.params, "head": weights.unflatten_dict(head, sep="/")}, hf
    )


def save_scorer(folder: str | Path, model: Pretrained, tokenizer: Any = None) -> None:
    """Writes a folder that `transformers.AutoModelForSequenceClassification` loads.

    There a row ends before its last pad ids, so a config without a pad id gets the tokenizer's, or the end id.
    """
    kind = model.hf_config["model_type"]
    family, config = (
        family_of(kind),
        dataclasses.replace(model.config, lm_transform=False, tied=True),
    )
    # An output matrix of its own has no place in a model that scores.
    trunk = {
        name: part
        for name, part in model.params["trunk"].items()
        if name != "unembedding" and not name.startswith("lm_")
    }
    tensors = dict(weights.from_params(trunk, weights.expand(family.rules(config), config.layers)))
    tensors |= dict(weights.from_params(model.params["head"], family.score))
    extra = {
        "architectures": [family.classes[kind][1]],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
    }
    pads = [
        model.hf_config.get("pad_token_id"),
        *([] if tokenizer is None else [tokenizer.pad_token_id, tokenizer.eos_token_id]),
    ]
    extra["pad_token_id"] = next((i for i in (*pads, *model.end_ids) if i is not None), None)
    with weights.writing(folder):
        write_folder(folder, {**model.hf_config, **extra}, tensors.items(), tokenizer)
