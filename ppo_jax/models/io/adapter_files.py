"""LoRA adapters in the format of the `peft` library."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.io.families import family_of
from ppo_jax.models.io.family import HFConfig, shapes_of
from ppo_jax.models.io.safetensors_format import save_file, writing
from ppo_jax.models.io.stored import read_json
from ppo_jax.models.io.weights import Rule
from ppo_jax.models.lora import merge
from ppo_jax.models.lora_settings import LoRA
from ppo_jax.types import Params

# Settings of peft with which an adapter is not plain LoRA, or has other parameters as well.
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
# Named initializations that leave the base model unchanged.
_INITIALIZATIONS = ("gaussian", "eva", "orthogonal", "mica")


def save_adapter(
    folder: str | Path,
    adapters: Params,
    lora: LoRA,
    config: TransformerConfig,
    kind: str,
    base_name: str,
) -> None:
    """Save adapters in the format of the `peft` library.

    If a stored layer contains several of ours, as GPT-2's `c_attn` contains the query, key and
    value layers, their adapters are combined into one of a higher rank.

    Args:
      folder: the folder for `adapter_config.json` and `adapter_model.safetensors`.
      adapters: the adapter tree, as `init_lora` makes it.
      lora: the settings that the adapters were made with.
      config: the config of the model.
      kind: the `model_type` of the model's `config.json`.
      base_name: the folder or Hugging Face id of the base model, which peft loads.

    Raises:
      ValueError: if the folder cannot be written, the family is not supported, or the config has
        another scale than `lora`.

    Example:
      >>> import tempfile
      >>> import jax
      >>> from ppo_jax.models.lora import init_lora
      >>> from ppo_jax.models.transformer import init_params
      >>> config = TransformerConfig(
      ...     vocab_size=7, positions=8, width=4, layers=1, heads=2, mlp_width=16
      ... )
      >>> lora = LoRA(rank=2)
      >>> adapters = init_lora(init_params(config, jax.random.key(0)), jax.random.key(1), lora)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_adapter(folder, adapters, lora, config, "gpt2", "openai-community/gpt2")
      ...     print(*sorted(file.name for file in Path(folder).iterdir()))
      adapter_config.json adapter_model.safetensors
    """
    if config.lora_scale not in (None, lora.scale):
        raise ValueError(
            f"lora has the scale {lora.scale}, but the model was made with "
            f"lora_scale={config.lora_scale}; pass the LoRA that the adapters were trained with."
        )
    flat = flatten_dict(adapters, sep="/")
    tensors, ranks = {}, {}
    for module, rule in _linear_rules(config, kind):
        if not flat.keys().isdisjoint(rule.paths):
            a, b = _combined(flat, rule)
            ranks[module] = a.shape[1]
            tensors[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(a.T)
            tensors[f"base_model.model.{module}.lora_B.weight"] = b
    settings = json.dumps(_settings(lora, ranks, kind, base_name), indent=2)
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(settings + "\n")
        save_file(tensors, folder / "adapter_model.safetensors")


def _linear_rules(config: TransformerConfig, kind: str) -> Iterator[tuple[str, Rule]]:
    """Yield the name of each stored linear layer in peft, and the rule of its `lora_B` matrix."""
    for rule in family_of(kind).table(config):
        if rule.paths[0].endswith("/kernel"):
            paths = tuple(f"{path.removesuffix('/kernel')}/lora_b" for path in rule.paths)
            # peft stores all matrices as `[out, in]`, whatever the base model does.
            yield (
                rule.stored.removesuffix(".weight"),
                replace(rule, paths=paths, transpose=True),
            )


def _combined(flat: dict[str, Any], rule: Rule) -> tuple[np.ndarray, np.ndarray]:
    """Return one pair of low-rank matrices for all adapters of a stored layer.

    A is the concatenation of theirs, `[in, r]`. B is in stored form, `[out, r]`; each layer's part
    of it is 0 for the ranks of the other adapters.
    """
    present = [path for path in rule.paths if path in flat]
    a = np.concatenate([np.asarray(flat[f"{path[:-1]}a"]) for path in present], axis=1)
    parts = {}
    for path, width in zip(rule.paths, rule.widths, strict=True):
        parts[path] = np.zeros((a.shape[1], width), np.float32)
        if path in flat:
            rank = len(flat[path])
            row = present.index(path) * rank
            parts[path][row : row + rank] = flat[path]
    return a, rule.save(parts)


def _settings(lora: LoRA, ranks: dict[str, int], kind: str, base_name: str) -> HFConfig:
    """Return the `adapter_config.json` of adapters with these ranks."""
    other_ranks = {f"^{re.escape(m)}$": rank for m, rank in ranks.items() if rank != lora.rank}
    # The scale of a layer with another rank stays the same if alpha grows with this power of it.
    power = 0.5 if lora.stabilised else 1
    return {
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
        "rank_pattern": other_ranks,
        "alpha_pattern": {
            name: lora.alpha * (rank / lora.rank) ** power for name, rank in other_ranks.items()
        },
    }


def load_adapter(folder: str | Path, config: TransformerConfig, kind: str) -> tuple[Params, float]:
    """Load adapters that `peft` or `save_adapter` saved.

    Args:
      folder: the folder with `adapter_config.json` and `adapter_model.safetensors`.
      config: the config of the base model.
      kind: the `model_type` of the base model's `config.json`.

    Returns:
      The adapter tree, and its scale, which must become `TransformerConfig.lora_scale`. It is the
      scale of the first layer; the B of a layer with another scale is multiplied by their ratio.

    Raises:
      ValueError: if the files cannot be read, are not of plain LoRA, or do not fit the model.

    Example:
      >>> import tempfile
      >>> import jax
      >>> from ppo_jax.models.lora import init_lora
      >>> from ppo_jax.models.transformer import init_params
      >>> config = TransformerConfig(
      ...     vocab_size=7, positions=8, width=4, layers=1, heads=2, mlp_width=16
      ... )
      >>> lora = LoRA(rank=2, alpha=8.0, targets="mlp/up$")
      >>> adapters = init_lora(init_params(config, jax.random.key(0)), jax.random.key(1), lora)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_adapter(folder, adapters, lora, config, "gpt2", "openai-community/gpt2")
      ...     loaded, scale = load_adapter(folder, config, "gpt2")
      >>> loaded["layer_0"]["mlp"]["up"]["lora_a"].shape, scale
      ((4, 2), 4.0)
    """
    folder = Path(folder)
    settings, stored = _read(folder)
    shapes = flatten_dict(shapes_of(config), sep="/")
    adapters: dict[str, Array] = {}
    scale = None
    for module, rule in _linear_rules(config, kind):
        names = [f"base_model.model.{module}.lora_{x}.weight" for x in "AB"]
        if names[0] not in stored:
            continue
        if names[1] not in stored:
            raise ValueError(f"{folder} does not fit: {names[1]} is missing.")
        alpha = _pattern(settings.get("alpha_pattern"), module, settings.get("lora_alpha"))
        if not isinstance(alpha, int | float) or alpha <= 0:
            raise ValueError(
                f"{folder} does not fit: lora_alpha is {alpha!r}, not a positive number."
            )
        a, b = (np.asarray(stored.pop(name), np.float32) for name in names)
        layer_scale = alpha / (len(a) ** 0.5 if settings.get("use_rslora") else len(a))
        scale = layer_scale if scale is None else scale
        for path, part in rule.load(b).items():
            layer = path.removesuffix("/lora_b")
            shape = shapes[f"{layer}/kernel"].shape
            if (a.shape[1], part.shape[1], len(part)) != (*shape, len(a)):
                raise ValueError(
                    f"{folder} does not fit: {module} is {shape} in the model, but the adapter's "
                    f"parts are {a.T.shape} and {part.shape}."
                )
            adapters[f"{layer}/lora_a"] = jnp.asarray(a.T)
            adapters[path] = jnp.asarray(part * (layer_scale / scale))
    if stored or scale is None:
        raise ValueError(
            f"{folder} does not fit: tensors {sorted(stored)} are left over; only linear layers "
            "can be adapted, no embedding and no output matrix such as lm_head."
        )
    return unflatten_dict(adapters, sep="/"), scale


def merge_adapter(
    params: Params, folder: str | Path, config: TransformerConfig, kind: str
) -> Params:
    """Load adapters as `load_adapter` does, and merge them into the parameters of their base.

    Args:
      params: the parameters of the base model.
      folder: as in `load_adapter`.
      config: as in `load_adapter`.
      kind: as in `load_adapter`.

    Returns:
      Parameters of a model without adapters.

    Raises:
      ValueError: as in `load_adapter`.
    """
    adapters, scale = load_adapter(folder, config, kind)
    both = flatten_dict(params, sep="/") | flatten_dict(adapters, sep="/")
    return merge(unflatten_dict(both, sep="/"), scale)


def _read(folder: Path) -> tuple[HFConfig, dict[str, np.ndarray]]:
    """Return the settings and tensors of an adapter, checked to be of plain LoRA."""
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds no adapter in the format of peft, because it has no "
            "adapter_config.json; that of a run with LoRA is in its folder adapter."
        )
    try:
        settings = read_json(folder / "adapter_config.json")
        stored = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no adapter in the format of peft: {error}") from error
    if settings.get("peft_type") != "LORA" or settings.get("bias", "none") != "none":
        kind = {name: settings.get(name) for name in ("peft_type", "bias")}
        raise ValueError(f"{folder} holds an adapter that is not plain LoRA: {kind}.")
    for name in _VARIANTS:
        if settings.get(name):
            raise ValueError(
                f"{folder} holds an adapter that is not plain LoRA: {name} is {settings[name]!r}."
            )
    start = settings.get("init_lora_weights")
    if not isinstance(start, bool | None) and str(start).lower() not in _INITIALIZATIONS:
        raise ValueError(
            f"{folder} holds an adapter over a base that init_lora_weights {start!r} changed; save "
            "it for the original base with path_initial_model_for_weight_conversion in peft's "
            "save_pretrained."
        )
    return settings, stored


def _pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of a module's name, as in peft."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
