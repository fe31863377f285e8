"""Conversion between stored tensors and parameter trees, by one table of rules per model family.

A table is a list of `Rule`s. A conversion fails unless the table covers every tensor and every
parameter, so no weight is lost.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ppo_jax.sharding import put
from ppo_jax.types import Params

TensorReader = Callable[[], np.ndarray]


@dataclass(frozen=True)
class Rule:
    """One stored tensor and the parameters that it contains.

    Attributes:
      stored: name of the tensor in the file, such as `transformer.h.0.attn.c_attn.weight`.
      paths: path of the parameter in our tree, with `/` between levels, such as
        `layer_0/attn/q/kernel`. With several paths, the parameters are concatenated along the
        last axis of the tensor (after the transpose).
      transpose: whether the stored matrix is `[out, in]`; our kernels are `[in, out]`.
      heads: number of heads, if the parameters are concatenated within each head; otherwise 1.
      widths: with several paths, the size of the last axis of each parameter.
    """

    stored: str
    paths: tuple[str, ...]
    transpose: bool = False
    heads: int = 1
    widths: tuple[int, ...] = ()

    def load(self, tensor: np.ndarray) -> dict[str, np.ndarray]:
        """Return the parameters in a stored tensor, by path.

        Raises:
          ValueError: if the tensor does not have the size of the parameters together.
        """
        tensor = tensor.T if self.transpose else tensor
        if len(self.paths) == 1:
            return {self.paths[0]: tensor}
        if not tensor.ndim or tensor.shape[-1] != sum(self.widths):
            raise ValueError(f"{self.stored} cannot be split into parts of {self.widths}.")
        by_head = tensor.reshape(*tensor.shape[:-1], self.heads, -1)
        ends = np.cumsum(self.widths) // self.heads
        parts = np.split(by_head, ends[:-1], axis=-1)
        return {
            path: part.reshape(*part.shape[:-2], -1)
            for path, part in zip(self.paths, parts, strict=True)
        }

    def save(self, params: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the stored tensor of parameters given by path; the inverse of `load`."""
        parts = [np.asarray(params[path]) for path in self.paths]
        tensor = parts[0]
        if len(parts) > 1:
            by_head = [part.reshape(*part.shape[:-1], self.heads, -1) for part in parts]
            tensor = np.concatenate(by_head, axis=-1)
            tensor = tensor.reshape(*tensor.shape[:-2], -1)
        return np.ascontiguousarray(tensor.T if self.transpose else tensor)


def to_params(
    tensors: Mapping[str, TensorReader], rules: list[Rule], shapes: Params, *, source: object
) -> Params:
    """Convert stored tensors to a tree of float32 parameters, reading one tensor at a time.

    Args:
      tensors: for each stored tensor, by its name in the table, the function that reads it.
      rules: the table, with the rules of every layer.
      shapes: the tree to return, with leaves that have a `shape`. If a leaf has a `sharding`, the
        parameter is put on the devices with it.
      source: what the tensors come from, for error messages.

    Raises:
      ValueError: if tensors are missing, left over or of another shape; the message names each.
    """
    wanted = flatten_dict(shapes, sep="/")
    missing = [rule.stored for rule in rules if rule.stored not in tensors]
    left_over = sorted(set(tensors) - {rule.stored for rule in rules})
    if missing or left_over:
        raise ValueError(
            f"{source} does not fit the model: missing tensors {missing}, left over {left_over}."
        )
    params, misfits = {}, []
    for rule in rules:
        tensor = tensors[rule.stored]()
        try:
            parts = rule.load(tensor)
        except ValueError:  # The tensor cannot be split, so no part has the right shape.
            parts = dict.fromkeys(rule.paths, tensor)
        for path, part in parts.items():
            leaf = wanted[path]
            if part.shape == leaf.shape:
                params[path] = put(part.astype(np.float32), getattr(leaf, "sharding", None))
            else:
                misfits.append(f"{path} is {part.shape} in {rule.stored}, not {leaf.shape}")
    if misfits:
        raise ValueError(f"{source} holds tensors of the wrong shape: {'; '.join(misfits)}.")
    return unflatten_dict({path: params[path] for path in wanted}, sep="/")


def from_params(params: Params, rules: list[Rule]) -> Iterator[tuple[str, np.ndarray]]:
    """Convert parameters to pairs of a name and a stored tensor; the inverse of `to_params`.

    Args:
      params: the parameter tree.
      rules: the table, with the rules of every layer.

    Returns:
      An iterator that makes one tensor at a time.

    Raises:
      ValueError: if the table has no rule for a parameter; the message names each.
    """
    flat = flatten_dict(params, sep="/")
    uncovered = sorted(set(flat) - {path for rule in rules for path in rule.paths})
    if uncovered:
        raise ValueError(f"The weight table has no rule for {uncovered}.")
    return ((rule.stored, rule.save(flat)) for rule in rules)
