"""Low-rank adapters (LoRA): small matrices beside frozen linear layers.

    y = x W + b + s (x A) B,    A: [in, r],  B: [r, out],  s = α / r  (or α / √r)

An adapter tree has the paths of the linear layers that it adapts, with `lora_a` and `lora_b` in place of `kernel`; `types.overlay`
lays it over the base, and `layers.Linear` reads what is there. The base alone is the reference policy: there is no second copy.

Source: Hu et al. 2021 (https://arxiv.org/abs/2106.09685), eq. 3; α / √r: Kalajdzievski 2023 (https://arxiv.org/abs/2312.03732).
"""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from ppo_jax.types import Params


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
    kernels = {
        path.removesuffix("/kernel"): x
        for path, x in flatten_dict(base, sep="/").items()
        if path.endswith("/kernel")
    }
    chosen = sorted(path for path in kernels if re.search(lora.targets, path))
    if not chosen or lora.rank < 1:
        raise ValueError(
            f"LoRA of rank {lora.rank} adapts no layer: {lora.targets!r} is found in none of {sorted(kernels)}."
        )
    if not lora.alpha > 0:
        raise ValueError(f"LoRA's alpha={lora.alpha} must be above 0.")
    adapters = {}
    for path, one in zip(chosen, jax.random.split(key, len(chosen)), strict=True):
        rows, columns = kernels[path].shape
        adapters[f"{path}/lora_a"] = (
            jax.random.uniform(one, (rows, lora.rank), minval=-1, maxval=1) * rows**-0.5
        )
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
