"""The only file that knows devices: the mesh, arrays onto it and back, the compiled steps of an iteration, several processes.

Every function works in one process and in many. In many, each runs the same program; each holds the rows of the batch that lie on
its devices (`rows_here`), and no number that shapes the result is known to one process alone.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ppo_jax import iteration
from ppo_jax.config import PPOConfig, SettingError
from ppo_jax.iteration import Agent, PPOState
from ppo_jax.models.sharding import AXES, put, rows_sharding, shardings
from ppo_jax.types import Params
from ppo_jax.update import LossFn


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes of a mesh's axes.

    Raises:
      SettingError: if the text is not like the example.

    Example:
      >>> parse_mesh("data=2,fsdp=4")
      {'data': 2, 'fsdp': 4}
    """
    sizes = {}
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name not in AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise SettingError(f"mesh must be like data=2,fsdp=4, of the axes {', '.join(AXES)}, each once; not {text!r}.")
        sizes[name] = int(size)
    return sizes


def make_mesh(sizes: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the given devices, by default all; what `sizes` leaves open is on `data`. One process may use fewer of them.

    Raises:
      SettingError: if the sizes do not fit the devices.

    Example:
      >>> dict(make_mesh({"fsdp": 1}, jax.devices()[:1]).shape)
      {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    devices = jax.devices() if devices is None else devices
    sizes = dict(sizes or {})
    rest = int(np.prod([size for name, size in sizes.items() if name != "data"], dtype=int))
    sizes.setdefault("data", max(1, len(devices) // rest))
    need = sizes["data"] * rest
    said = ",".join(f"{name}={sizes[name]}" for name in AXES if name in sizes)
    if need > len(devices) or (need < len(devices) and jax.process_count() > 1):
        raise SettingError(f"The mesh {said} needs {need} devices; there are {len(devices)}.")
    shape = tuple(sizes.get(name, 1) for name in AXES)
    try:
        return Mesh(lay_out(shape, devices[:need]), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    except (AssertionError, NotImplementedError, ValueError) as error:  # JAX asserts that a part of a TPU slice is a block
        block = isinstance(error, AssertionError)
        reason = "in a TPU slice they must form a block" if block else f"{type(error).__name__}: {error}"
        raise SettingError(f"The mesh {said} cannot be laid over {need} of {len(devices)} devices: {reason:.300}") from error


def lay_out(shape: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """Devices `[*shape]`, neighbours on the last axes the closest to each other. `jax.make_mesh` knows a single slice alone; here
    the first axes go over the slices of TPUs, or the hosts of GPUs, as far as their sizes allow.

    Raises:
      ValueError: if the shape does not divide by the slices, which must be of one size.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    outer, left = [], slices
    for size in shape:
        outer.append(math.gcd(size, left))
        left //= outer[-1]
    if left > 1:
        raise ValueError(f"its sizes do not divide by the number of slices or hosts, {slices}.")
    inner = [size // parts for size, parts in zip(shape, outer, strict=True)]
    if slices == 1:
        return mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)


def check_rows(config: PPOConfig, devices: int) -> None:
    """Raises SettingError, naming it, if a number of rows does not spread evenly over so many devices."""
    rows = {
        "batch_size": config.batch_size,
        "batch_size / minibatches": config.batch_size // config.minibatches,
        "micro_batch": config.rows_at_a_time,
        "rollout_rows": config.rollout_rows,
    }
    for name, count in rows.items():
        if count is not None and count % devices:
            raise SettingError(f"{name}={count} rows do not spread evenly over {devices} devices; change it, or the mesh.")


def devices_of_rows(mesh: Mesh | None) -> int:
    """Over how many devices the rows of a batch are spread."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def place(tree: Any, mesh: Mesh | None) -> Any:
    """Parameters, or a whole `PPOState`, where the rules of `models.sharding` want them."""
    if mesh is None:
        return tree
    return (jax.device_put if jax.process_count() == 1 else _put_everywhere)(tree, shardings(tree, mesh))


def _put_everywhere(tree: Any, where: Any) -> Any:
    """`jax.device_put`, which in several processes takes neither keys nor arrays that each process has for itself."""

    def one(x: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return x if x.sharding == sharding else jax.jit(lambda x: x, out_shardings=sharding)(x)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(np.asarray(jax.random.key_data(x)), sharding))
        return put(np.asarray(x), sharding)

    return jax.tree.map(one, tree, where)


def start_state(agent: Agent, params: Params, key: jax.Array, *, updates: int, mesh: Mesh | None) -> PPOState:
    """`iteration.init_state` from placed parameters; no array of it is one of theirs, since an update donates its state's."""
    copies = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
    return place(iteration.init_state(agent, copies, key, updates=updates), mesh)


def rows_here(mesh: Mesh | None, rows: int) -> np.ndarray:
    """Numbers of those rows of a batch that lie on this process's devices."""
    if mesh is None:
        return np.arange(rows)
    spread = rows_sharding(mesh).addressable_devices_indices_map((rows,))
    return np.unique(np.concatenate([np.arange(rows)[index[0]] for index in spread.values()]))


def to_mesh(tree: Any, mesh: Mesh | None) -> Any:
    """Host arrays `[B, ...]`, spread by rows; a process reads the rows that it holds."""
    if mesh is None:
        return tree
    spread = lambda x: jax.make_array_from_callback(x.shape, rows_sharding(mesh), lambda index: x[index])
    return jax.tree.map(spread, tree)


def to_host(tree: Any, *, everywhere: bool = True) -> Any:
    """Numpy arrays, whole in every process, or in the first alone; the others then hold one at a time, and get None for each."""
    keep = everywhere or jax.process_index() == 0

    def whole(x: Any) -> Any:
        spread = isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
        x = multihost_utils.process_allgather(x, tiled=True) if spread else x
        return x if keep else None

    return jax.device_get(jax.tree.map(whole, tree))


def join_rows_here(tree: Any, mesh: Mesh | None, rows: int) -> Any:
    """Host arrays of this process's rows to those of all `rows` rows, in every process."""
    if jax.process_count() == 1:
        return tree
    numbers, parts = multihost_utils.process_allgather((rows_here(mesh, rows), tree))

    def join(x: np.ndarray) -> np.ndarray:
        whole = np.zeros((rows, *x.shape[2:]), x.dtype)
        whole[numbers.reshape(-1)] = x.reshape(-1, *x.shape[2:])
        return whole

    return jax.tree.map(join, parts)


# What the model rounds, the compiler shall not keep in float32: on a GPU it would write and read arrays of twice the size.
COMPILER_OPTIONS = {"xla_allow_excess_precision": False}


class Steps(NamedTuple):
    """`iteration.sample`, `score` and `learn`, compiled, without their `agent`."""

    sample: Callable
    score: Callable
    learn: Callable


def jit_steps(agent: Agent, mesh: Mesh | None = None, state: PPOState | None = None, *, loss_fn: LossFn | None = None) -> Steps:
    """By `jit`; on a mesh, with the rows spread and `learn`'s new state lying as `state` does."""
    sample, score, learn = (functools.partial(f, agent) for f in (iteration.sample, iteration.score, iteration.learn))
    learn = functools.partial(learn, loss_fn=loss_fn)
    jit = functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
    if mesh is None:
        return Steps(jit(sample), jit(score), jit(learn, donate_argnums=0))
    rows, whole = rows_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    return Steps(
        _on(mesh, jit(sample, out_shardings=rows)),
        _on(mesh, jit(score, out_shardings=rows)),
        _on(mesh, jit(learn, donate_argnums=0, out_shardings=(shardings(state, mesh), whole))),
    )


def _on(mesh: Mesh, function: Callable) -> Callable:
    @functools.wraps(function)
    def call(*args, **more):
        with jax.set_mesh(mesh):
            return function(*args, **more)

    return call


def pmap_steps(agent: Agent, devices: Sequence[Any] | None = None, *, loss_fn: LossFn | None = None) -> Steps:
    """By `pmap`: a replica of everything on each device, rows spread, gradients and averages summed over the devices.

    The same results as `jit_steps` with all devices on `data`, which is to be preferred: only a mesh can cut parameters, and JAX
    keeps `pmap` for what exists. Use this one inside programs that are built on `pmap`. One process.
    """
    devices = jax.local_devices() if devices is None else devices
    n, axis = len(devices), "devices"
    cut = functools.partial(jax.tree.map, lambda x: jnp.asarray(x).reshape(n, x.shape[0] // n, *x.shape[1:]))
    join = functools.partial(jax.tree.map, lambda x: x.reshape(-1, *x.shape[2:]))
    mapped = functools.partial(jax.pmap, axis_name=axis, devices=devices)

    def own_sample(state, frozen, prompts, mask, row_ids):
        return iteration.sample(agent, state, prompts, mask, row_ids=row_ids, frozen=frozen)

    def own_score(state, ref_params, frozen, rollout):
        return iteration.score(agent, state, ref_params, rollout, frozen=frozen)

    def own_learn(state, frozen, rollout, scores, task_scores, token_scores):
        more = {"frozen": frozen, "loss_fn": loss_fn, "axis_name": axis}
        return iteration.learn(agent, state, rollout, scores, task_scores, token_scores, **more)

    all_sample = mapped(own_sample, in_axes=(None, None, 0, 0, 0))
    all_score = mapped(own_score, in_axes=(None, None, None, 0))
    all_learn = mapped(own_learn, in_axes=(None, None, 0, 0, 0, 0), out_axes=None)

    def sample(state: PPOState, prompts: jax.Array, mask: jax.Array, *, frozen: Params | None = None):
        return join(all_sample(state, frozen, *cut((prompts, mask, np.arange(len(prompts))))))

    def score(state: PPOState, ref_params: Params, rollout, *, frozen: Params | None = None):
        return join(all_score(state, ref_params, frozen, cut(rollout)))

    def learn(state: PPOState, rollout, scores, task_scores, token_scores=None, *, frozen: Params | None = None):
        return all_learn(state, frozen, *cut((rollout, scores, task_scores, token_scores)))

    return Steps(sample, score, learn)
