"""Low-rank adapters (LoRA): small matrices that train beside frozen linear layers.

    y = x W + b + s (x A) B,    A: [in, r],  B: [r, out],  s = α / r  (or α / √r)

The adapters of a model are a tree with the paths of the linear layers that they adapt, which holds
`lora_a` and `lora_b` in the place of `kernel`. `ppo.state.overlay` combines it with the parameters
of the model, and `layers.Linear` computes the low-rank part where there is one. The model without
adapters is the reference policy, so that no second copy of it is needed.

Source: Hu et al. 2021 (https://arxiv.org/abs/2106.09685), eq. 3; for α / √r Kalajdzievski 2023
(https://arxiv.org/abs/2312.03732).
"""

import re

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from ppo_jax.models.lora_settings import LoRA
from ppo_jax.types import Params


def init_lora(base: Params, key: Array, lora: LoRA) -> Params:
    """Return fresh adapters, which do not change the model.

    A is uniform in ±1/√in and B is 0. The low-rank part is then exactly 0, so that on a CPU the
    logits keep every bit, compiled or not. On a GPU or TPU the compiler may fuse the larger program
    differently and sum a norm in another order.

    Args:
      base: parameters of a model.
      key: `[]` typed key, consumed.
      lora: rank, scale and layers of the adapters.

    Returns:
      The tree of adapters, float32.

    Raises:
      ValueError: if the rank is below 1, alpha is not positive, or no linear layer matches.

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
    adapted = sorted(path for path in kernels if re.search(lora.targets, path))
    if not adapted:
        raise ValueError(
            f"targets={lora.targets!r} adapts no layer; it must match some of {sorted(kernels)}."
        )
    if lora.rank < 1 or not lora.alpha > 0:
        raise ValueError(f"rank={lora.rank} must be at least 1, and alpha={lora.alpha} above 0.")
    adapters = {}
    for path, layer_key in zip(adapted, jax.random.split(key, len(adapted)), strict=True):
        rows, columns = kernels[path].shape
        uniform = jax.random.uniform(layer_key, (rows, lora.rank), jnp.float32, minval=-1, maxval=1)
        adapters[f"{path}/lora_a"] = uniform * rows**-0.5
        adapters[f"{path}/lora_b"] = jnp.zeros((lora.rank, columns), jnp.float32)
    return unflatten_dict(adapters, sep="/")


def adapt(params: Params, key: Array, lora: LoRA) -> tuple[Params, Params]:
    """Split a policy and a critic into parameters that train and parameters that are frozen.

    The adapters of the policy train, and so do the head of the critic and, if it has a trunk of its
    own, the adapters of the trunk. No array is copied: a trunk that starts as the policy shares its
    frozen arrays with it.

    Args:
      params: `{"policy": ..., "critic": ...}`, parameters of the whole models.
      key: `[]` typed key, consumed.
      lora: rank, scale and layers of the adapters of both models.

    Returns:
      The trees `(params, frozen)`, as `init_state` and `ppo_iteration` take them.

    Raises:
      ValueError: as `init_lora`.

    Example:
      >>> model = {"layer_0": {"attn": {"q": {"kernel": jnp.ones((4, 6))}}}}
      >>> critic = {"trunk": model, "head": {"kernel": jnp.zeros((4, 1))}}
      >>> params, frozen = adapt({"policy": model, "critic": critic}, jax.random.key(0), LoRA())
      >>> sorted(params["critic"]), sorted(frozen["critic"])
      (['head', 'trunk'], ['trunk'])
    """
    policy_key, critic_key = jax.random.split(key)
    critic, frozen = dict(params["critic"]), {"policy": params["policy"]}
    if "trunk" in critic:
        frozen["critic"] = {"trunk": critic["trunk"]}
        critic["trunk"] = init_lora(critic["trunk"], critic_key, lora)
    return {"policy": init_lora(params["policy"], policy_key, lora), "critic": critic}, frozen


def merge(params: Params, scale: float) -> Params:
    """Add adapters to the kernels of their layers, `W + s A B`.

    Args:
      params: parameters of a model together with adapters, as from `ppo.state.overlay`.
      scale: factor of the low-rank part (s), `LoRA.scale`.

    Returns:
      Parameters of a model without adapters.

    Example:
      >>> a, b = jnp.ones((1, 3)), jnp.ones((3, 2))
      >>> merge({"q": {"kernel": jnp.ones((1, 2)), "lora_a": a, "lora_b": b}}, scale=2.0)
      {'q': {'kernel': Array([[7., 7.]], dtype=float32)}}
    """
    flat = flatten_dict(params, sep="/")
    for path in [path.removesuffix("/lora_a") for path in flat if path.endswith("/lora_a")]:
        low_rank = flat.pop(f"{path}/lora_a") @ flat.pop(f"{path}/lora_b")
        flat[f"{path}/kernel"] = flat[f"{path}/kernel"] + scale * low_rank
    return unflatten_dict(flat, sep="/")
