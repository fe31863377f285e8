"""Adapters in the format of the `peft` library."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.io import weights
from ppo_jax.models.io.families import family_of
from ppo_jax.models.lora import LoRA
from ppo_jax.models.transformer import init_params
from ppo_jax.types import Params

# Settings of peft by which an adapter is another function than plain LoRA's, or brings parameters of other kinds.
_VARIANTS = (
    "use_dora",
    "lora_bias",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "monteclora_config",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "trainable_token_indices",
    "modules_to_save",
)


_STARTS = ("gaussian", "eva", "orthogonal", "mica")  # named beginnings that leave the base as it is


def save_adapter(
    folder: str | Path,
    adapters: Params,
    lora: LoRA,
    config: TransformerConfig,
    kind: str,
    base_name: str,
) -> None:
    """Writes adapters in the format of the `peft` library.

    Where the stored layer holds several of ours (GPT-2's `c_attn`), their low-rank parts stand side by side in one of higher rank.

    Args:
      folder: for `adapter_config.json` and `adapter_model.safetensors`.
      adapters: the adapter tree.
      lora: as it was made with.
      config: the model's.
      kind: the `model_type` of the model's `config.json`.
      base_name: the folder or id of the base.
    """
    flat, tensors, ranks = flatten_dict(adapters, sep="/"), {}, {}
    for rule, parts in _adapted(config, kind, set(flat)):
        module, r = rule.stored.removesuffix(".weight"), lora.rank
        present = [path for path in parts if f"{path}/lora_a" in flat]
        rank = r * len(present)
        bs = {}
        for path, kernel in zip(parts, rule.ours, strict=True):
            out = _out_features(flat, parts, config, path)
            b = np.zeros((rank, out), np.float32)
            if path in present:
                at = present.index(path) * r
                b[at : at + r] = flat[f"{path}/lora_b"]
            bs[kernel] = b
        a = np.concatenate([np.asarray(flat[f"{path}/lora_a"]) for path in present], axis=1)
        tensors[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(a.T)
        tensors[f"base_model.model.{module}.lora_B.weight"] = weights.transposed(rule).save(bs)
        ranks[module] = rank
    odd = {module: rank for module, rank in ranks.items() if rank != lora.rank}
    power = 0.5 if lora.stabilised else 1
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.stabilised,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": kind == "gpt2",
        "inference_mode": True,
        "rank_pattern": {_exact(m): rank for m, rank in odd.items()},
        "alpha_pattern": {
            _exact(m): lora.alpha * (rank / lora.rank) ** power for m, rank in odd.items()
        },
    }
    folder = Path(folder)
    with weights.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        weights.save_file(tensors, folder / "adapter_model.safetensors")


def load_adapter(folder: str | Path, config: TransformerConfig, kind: str) -> tuple[Params, float]:
    """Adapters that `peft` or `save_adapter` wrote, and the scale that `TransformerConfig.lora_scale` must be.

    It is that of the first layer; where another's differs (`rank_pattern`, `alpha_pattern`), its B makes up for it.

    Raises:
      ValueError: if the files are not there, hold another kind of adapter, or layers that the model lacks.
    """
    folder = Path(folder)
    try:
        settings = json.loads((folder / "adapter_config.json").read_text())
        stored = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no adapter in the format of peft: {error}.") from error
    if not isinstance(settings, dict):
        raise ValueError(
            f"{folder} holds no adapter in the format of peft: its config is no JSON object."
        )
    _check_plain(settings, folder)
    adapters, scale = {}, None
    shapes = flatten_dict(jax.eval_shape(lambda: init_params(config, jax.random.key(0))), sep="/")
    for rule in weights.expand(family_of(kind).rules(config), config.layers):
        module = rule.stored.removesuffix(".weight")
        names = [f"base_model.model.{module}.lora_{x}.weight" for x in "AB"]
        if names[0] not in stored or not rule.ours[0].endswith("/kernel"):
            continue
        alpha = _pattern(settings.get("alpha_pattern"), module, settings.get("lora_alpha"))
        if names[1] not in stored or not isinstance(alpha, int | float) or alpha <= 0:
            what = (
                f"{names[1]} is missing"
                if names[1] not in stored
                else f"lora_alpha is {alpha!r}, no number above 0"
            )
            raise ValueError(f"{folder} does not fit: {what}.")
        a, b = (np.asarray(stored.pop(name), np.float32) for name in names)
        own = alpha / (a.shape[0] ** 0.5 if settings.get("use_rslora") else a.shape[0])
        scale = own if scale is None else scale
        for kernel, part in weights.transposed(rule).load(b).items():
            path = kernel.removesuffix("/kernel")
            if (a.shape[1], part.shape[1], part.shape[0]) != (*shapes[kernel].shape, a.shape[0]):
                raise ValueError(
                    f"{folder} does not fit: {module} is {shapes[kernel].shape} in the model, but the adapter's parts "
                    f"are {a.T.shape} and {part.shape}."
                )
            adapters[f"{path}/lora_a"], adapters[f"{path}/lora_b"] = (
                jnp.asarray(a.T),
                jnp.asarray(part * (own / scale)),
            )
    if stored or scale is None:
        raise ValueError(
            f"{folder} does not fit: tensors {sorted(stored)} are left over; only linear layers can be adapted, no "
            "embedding and no output matrix such as lm_head."
        )
    return unflatten_dict(adapters, sep="/"), scale


def _check_plain(settings: dict[str, Any], folder: Path) -> None:
    """Raises ValueError for an adapter that is more than a product of two matrices beside a layer of the model as it is."""
    if settings.get("peft_type") != "LORA" or settings.get("bias", "none") != "none":
        kind = {name: settings.get(name) for name in ("peft_type", "bias")}
        raise ValueError(f"{folder} holds an adapter of another kind than plain LoRA: {kind}.")
    found = [name for name in _VARIANTS if settings.get(name)]
    if found:
        raise ValueError(
            f"{folder} holds an adapter of another kind than plain LoRA: {found[0]} is {settings[found[0]]!r}."
        )
    start = settings.get("init_lora_weights")
    if not isinstance(start, bool | None) and str(start).lower() not in _STARTS:
        raise ValueError(
            f"{folder} holds an adapter over a base that init_lora_weights {start!r} changed; peft's save_pretrained "
            "makes one for the base as it was by path_initial_model_for_weight_conversion."
        )


def _adapted(config: TransformerConfig, kind: str, paths: set[str]):
    """Rules of stored layers with adapters, and the paths of our layers in each."""
    for rule in weights.expand(family_of(kind).rules(config), config.layers):
        parts = [kernel.removesuffix("/kernel") for kernel in rule.ours]
        if any(f"{part}/lora_a" in paths for part in parts):
            yield rule, parts


def _out_features(
    flat: dict[str, Any], parts: list[str], config: TransformerConfig, path: str
) -> int:
    """Columns of a layer; of one without an adapter, those of its neighbours in the stored tensor."""
    known = [p for p in (path, *parts) if f"{p}/lora_b" in flat]
    return flat[f"{known[0]}/lora_b"].shape[1]


def _exact(module: str) -> str:
    return f"^{re.escape(module)}$"


def _pattern(patterns: dict[str, Any] | None, module: str, default: float) -> float:
    """The value of the first pattern that ends the module's name, as peft reads them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
