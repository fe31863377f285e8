"""Low-rank adapters (LoRA): small matrices beside frozen linear layers.

    y = x W + b + s (x A) B,    A: [in, r],  B: [r, out],  s = α / r  (or α / √r)

An adapter tree has the paths of the linear layers that it adapts, with `lora_a` and `lora_b` in place of `kernel`; `types.overlay`
lays it over the base, and `layers.Linear` reads what is there. The base alone is the reference policy: there is no second copy.

Source: Hu et al. 2021 (https://arxiv.org/abs/2106.09685), eq. 3; α / √r: Kalajdzievski 2023 (https://arxiv.org/abs/2312.03732).
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ppo_jax.models import weights
from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.families import family_of
from ppo_jax.models.transformer import init_params
from ppo_jax.types import Params

# Settings of peft by which an adapter is another function than plain LoRA's, or brings parameters of other kinds.
_VARIANTS = (
    "use_dora", "lora_bias", "alora_invocation_tokens", "use_qalora", "use_bdlora", "monteclora_config", "arrow_config",
    "kasa_config", "layer_replication", "trainable_token_indices", "modules_to_save",
)  # fmt: skip
_STARTS = ("gaussian", "eva", "orthogonal", "mica")  # named beginnings that leave the base as it is


class LoRA(NamedTuple):
    """Which layers are adapted, and how: `targets` is searched for in paths such as `layer_0/attn/q`."""

    rank: int = 8
    alpha: float = 16.0
    targets: str = r"attn/(q|v)$"
    stabilised: bool = False  # α / √r

    @property
    def scale(self) -> float:
        """What `TransformerConfig.lora_scale` must be."""
        return self.alpha / (self.rank**0.5 if self.stabilised else self.rank)


def init_lora(base: Params, key: jax.Array, lora: LoRA) -> Params:
    """Fresh adapters, which change nothing: A uniform in ±1/√in, B zero.

    What they add is exactly 0, so the logits keep every bit, compiled or not. On a GPU or TPU a compiler may yet fuse the program
    otherwise and sum a norm in another order; on a CPU it does not (see `layers.mean`).

    Args:
      base: a model's parameters.
      key: `[]` typed key, consumed.
      lora: rank and targets.

    Returns:
      The adapter tree.

    Raises:
      ValueError: if no linear layer matches, or alpha is not positive.

    Example:
      >>> base = {"layer_0": {"attn": {"q": {"kernel": jnp.ones((4, 6))}}}}
      >>> jax.tree.map(jnp.shape, init_lora(base, jax.random.key(0), LoRA(rank=2)))
      {'layer_0': {'attn': {'q': {'lora_a': (4, 2), 'lora_b': (2, 6)}}}}
    """
    kernels = {path.removesuffix("/kernel"): x for path, x in flatten_dict(base, sep="/").items() if path.endswith("/kernel")}
    chosen = sorted(path for path in kernels if re.search(lora.targets, path))
    if not chosen or lora.rank < 1:
        raise ValueError(f"LoRA of rank {lora.rank} adapts no layer: {lora.targets!r} is found in none of {sorted(kernels)}.")
    if not lora.alpha > 0:
        raise ValueError(f"LoRA's alpha={lora.alpha} must be above 0.")
    adapters = {}
    for path, one in zip(chosen, jax.random.split(key, len(chosen)), strict=True):
        rows, columns = kernels[path].shape
        adapters[f"{path}/lora_a"] = jax.random.uniform(one, (rows, lora.rank), minval=-1, maxval=1) * rows**-0.5
        adapters[f"{path}/lora_b"] = jnp.zeros((lora.rank, columns))
    return unflatten_dict(adapters, sep="/")


def adapt(params: Params, key: jax.Array, lora: LoRA) -> tuple[Params, Params]:
    """A policy and critic, `{"policy": ..., "critic": ...}`, as what trains and what is frozen.

    The policy's adapters train, those of a critic with a trunk of its own, and its head. A trunk that starts from the policy is
    the policy's very arrays: one base in memory.

    Args:
      params: of the whole models.
      key: `[]` typed key, consumed.
      lora: rank and targets, for both.

    Returns:
      The trees `(params, frozen)` that `iteration` takes.
    """
    policy_key, critic_key = jax.random.split(key)
    critic = {name: part for name, part in params["critic"].items() if name != "trunk"}
    frozen = {"policy": params["policy"]}
    if "trunk" in params["critic"]:
        critic["trunk"] = init_lora(params["critic"]["trunk"], critic_key, lora)
        frozen["critic"] = {"trunk": params["critic"]["trunk"]}
    return {"policy": init_lora(params["policy"], policy_key, lora), "critic": critic}, frozen


def merge(params: Params, scale: float) -> Params:
    """Parameters without adapters, whose kernels are `W + s A B`."""
    flat = flatten_dict(params, sep="/")
    for path in [path.removesuffix("/lora_a") for path in flat if path.endswith("/lora_a")]:
        a, b = flat.pop(f"{path}/lora_a"), flat.pop(f"{path}/lora_b")
        flat[f"{path}/kernel"] = flat[f"{path}/kernel"] + scale * (a @ b)
    return unflatten_dict(flat, sep="/")


def save_adapter(folder: str | Path, adapters: Params, lora: LoRA, config: TransformerConfig, kind: str, base_name: str) -> None:
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
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "r": lora.rank,
        "lora_alpha": lora.alpha, "use_rslora": lora.stabilised, "target_modules": sorted(ranks), "lora_dropout": 0.0,
        "bias": "none", "fan_in_fan_out": kind == "gpt2", "inference_mode": True,
        "rank_pattern": {_exact(m): rank for m, rank in odd.items()},
        "alpha_pattern": {_exact(m): lora.alpha * (rank / lora.rank) ** power for m, rank in odd.items()},
    }  # fmt: skip
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
        raise ValueError(f"{folder} holds no adapter in the format of peft: its config is no JSON object.")
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
            what = f"{names[1]} is missing" if names[1] not in stored else f"lora_alpha is {alpha!r}, no number above 0"
            raise ValueError(f"{folder} does not fit: {what}.")
        a, b = (np.asarray(stored.pop(name), np.float32) for name in names)
        own = alpha / (a.shape[0] ** 0.5 if settings.get("use_rslora") else a.shape[0])
        scale = own if scale is None else scale
        for kernel, part in weights.transposed(rule).load(b).items():
            path = kernel.removesuffix("/kernel")
            if (a.shape[1], part.shape[1], part.shape[0]) != (*shapes[kernel].shape, a.shape[0]):
                raise ValueError(f"{folder} does not fit: {module} is {shapes[kernel].shape} in the model, but the adapter's parts "
                                 f"are {a.T.shape} and {part.shape}.")  # fmt: skip
            adapters[f"{path}/lora_a"], adapters[f"{path}/lora_b"] = jnp.asarray(a.T), jnp.asarray(part * (own / scale))
    if stored or scale is None:
        raise ValueError(f"{folder} does not fit: tensors {sorted(stored)} are left over; only linear layers can be adapted, no "
                         "embedding and no output matrix such as lm_head.")  # fmt: skip
    return unflatten_dict(adapters, sep="/"), scale


def _check_plain(settings: dict[str, Any], folder: Path) -> None:
    """Raises ValueError for an adapter that is more than a product of two matrices beside a layer of the model as it is."""
    if settings.get("peft_type") != "LORA" or settings.get("bias", "none") != "none":
        kind = {name: settings.get(name) for name in ("peft_type", "bias")}
        raise ValueError(f"{folder} holds an adapter of another kind than plain LoRA: {kind}.")
    found = [name for name in _VARIANTS if settings.get(name)]
    if found:
        raise ValueError(f"{folder} holds an adapter of another kind than plain LoRA: {found[0]} is {settings[found[0]]!r}.")
    start = settings.get("init_lora_weights")
    if not isinstance(start, bool | None) and str(start).lower() not in _STARTS:
        raise ValueError(f"{folder} holds an adapter over a base that init_lora_weights {start!r} changed; peft's save_pretrained "
                         "makes one for the base as it was by path_initial_model_for_weight_conversion.")  # fmt: skip


def _adapted(config: TransformerConfig, kind: str, paths: set[str]):
    """Rules of stored layers with adapters, and the paths of our layers in each."""
    for rule in weights.expand(family_of(kind).rules(config), config.layers):
        parts = [kernel.removesuffix("/kernel") for kernel in rule.ours]
        if any(f"{part}/lora_a" in paths for part in parts):
            yield rule, parts


def _out_features(flat: dict[str, Any], parts: list[str], config: TransformerConfig, path: str) -> int:
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
