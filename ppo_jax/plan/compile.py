"""A PPO iteration compiled for TPUs that are not there: what each chip would hold, compute and send.

The compiler is the TPU's own (package `libtpu`); nothing runs, and no parameter exists: shapes suffice.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ppo_jax.distributed import compilation, meshes
from ppo_jax.errors import SettingError
from ppo_jax.models import heads, lora
from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.transformer import init_params, language_model
from ppo_jax.plan import hlo
from ppo_jax.plan.flops import matmul_flops
from ppo_jax.ppo import iteration
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.sharding import placed, rows_sharding, shardings


class Chip(NamedTuple):
    """Of one JAX device: a chip, or on v4, as the compiler sees it without its joined mode, one of a chip's two cores."""

    memory: float  # GiB that programs may use, as the compiler says
    peak: float  # TFLOP/s in bfloat16, as published
    clock: float  # GHz: the peak over what the matrix units multiply and add a cycle


CHIPS = {
    "v4": Chip(15.25, 137.5, 1.05),
    "v5e": Chip(15.75, 197, 1.5),
    "v5p": Chip(95.74, 459, 1.75),
    "v6e": Chip(31.25, 918, 1.75),
}


# Or the compiler looks for the TPU that it is on.
_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Program(NamedTuple):
    """One compiled phase, per chip; bytes."""

    name: str
    arguments: int
    temporary: int
    peak: int  # arguments, results and temporaries at the fullest moment
    needed: int  # the peak, and what else lies on the chip meanwhile
    flops: (
        float  # of matrix products, a response at its longest, shared evenly (but see `undivided`)
    )
    moved: int  # a bound from above
    seconds: float  # of the compiler's estimate, without waiting for other chips
    collectives: dict[str, hlo.Collective]
    compile_s: float


class TooLarge(Exception):
    """The compiler found no way to fit a program; says what it said, and how many bytes lie on a chip before any program runs."""

    def __init__(self, said: str, resident: int = 0):
        super().__init__(said)
        self.resident = resident


def make_topology(name: str) -> list[Any]:
    """Devices of a slice such as "v5e:4x4" (see `CHIPS`).

    Raises:
      SettingError: if there is no such slice, or no compiler for it.
    """
    if name.partition(":")[0] not in CHIPS or not re.fullmatch(r"\w+:\d+(x\d+)+", name):
        raise SettingError(
            f"topology must be like v5e:4x4, of the chips {', '.join(CHIPS)}; not {name!r}."
        )
    for key, value in _ALONE.items():
        os.environ.setdefault(key, value)
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:  # of several kinds; libtpu missing is one
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        lacks = (
            ""
            if importlib.util.find_spec("libtpu")
            else " (libtpu comes with pip install 'ppo-jax[tpu-aot]')"
        )
        raise SettingError(f"No compiler for {name}: {reason}{lacks}") from error


def compile_iteration(
    config: TransformerConfig,
    ppo: PPOConfig,
    mesh: Mesh,
    chip: Chip,
    *,
    prompt_tokens: int,
    critic: str = "separate",
    adapters: lora.LoRA | None = None,
    stop_ids: tuple[int, ...] = (0,),
) -> dict[str, Program | TooLarge]:
    """Compiles rollout, scoring and update for the chips of `mesh`.

    Args:
      config: of policy, reference and critic.
      ppo: settings of the iteration.
      mesh: of `meshes.make_mesh(sizes, make_topology(...))`.
      chip: what each device is.
      prompt_tokens: `P`.
      critic: "shared" or "separate".
      adapters: if only these train.
      stop_ids: end a response; the account is of the longest all the same.

    Returns:
      By name, `rollout`, `scoring` and `update`: the program, or why there is none.
    """
    meshes.check_rows(ppo, meshes.batch_shards(mesh))
    if adapters is not None:
        config = dataclasses.replace(config, lora_scale=adapters.scale)
    own_critic = heads.shared_critic() if critic == "shared" else heads.separate_critic(config)
    agent = iteration.Agent(language_model(config), own_critic, ppo, stop_ids, 0)
    state, frozen, reference = _shapes(agent, config, critic, adapters, mesh)
    # Under adapters, policy and critic have one frozen trunk, which programs take twice.
    twice = 0 if frozen is None or critic == "shared" else _size(frozen["critic"]["trunk"])
    resident = _size((state, frozen, reference if frozen is None else None)) - twice
    B, rows = ppo.batch_size, rows_sharding(mesh)
    row = lambda dtype, *shape: jax.ShapeDtypeStruct((B, *shape), dtype, sharding=rows)
    of_rows = functools.partial(jax.tree.map, lambda x: row(x.dtype, *x.shape[1:]))
    functions = (iteration.sample, iteration.score, iteration.learn)
    sample, score, learn = (
        functools.partial(f, agent)
        if frozen is None
        else functools.partial(_frozen_first, f, agent)
        for f in functions
    )
    further = () if frozen is None else (frozen,)
    prompts = (row(jnp.int32, prompt_tokens), row(bool, prompt_tokens))
    whole = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        rollout = of_rows(jax.eval_shape(sample, *further, state, *prompts))
        scores = of_rows(jax.eval_shape(score, *further, state, reference, rollout))
        phases = {
            "rollout": (sample, (*further, state, *prompts), {"out_shardings": rows}),
            "scoring": (score, (*further, state, reference, rollout), {"out_shardings": rows}),
            "update": (
                learn,
                (*further, state, rollout, scores, row(jnp.float32)),
                {"out_shardings": (shardings(state, mesh), whole), "donate_argnums": len(further)},
            ),
        }
        of = lambda name: (resident, 0 if name == "rollout" else twice, ppo.max_new_tokens - 1)
        return {
            name: _compile(name, *phase, mesh, chip, *of(name)) for name, phase in phases.items()
        }


def extrapolate(
    config: TransformerConfig, depths: tuple[int, int], *args: Any, **more: Any
) -> dict[str, Program | TooLarge]:
    """`compile_iteration` for a model too deep to compile here: compiled with fewer layers twice, and every figure taken further
    along a straight line. Where memory is short the compiler would schedule otherwise, so a peak is an estimate, mostly from above.

    Args:
      config: of the whole model.
      depths: two numbers of layers, at which it is compiled; multiples of the pattern of its windows.
      args, more: as for `compile_iteration`, without its config.
    """
    few, many = (compile_iteration(_cut(config, depth), *args, **more) for depth in depths)
    share = (config.layers - depths[0]) / (depths[1] - depths[0])
    return {name: _further(few[name], many[name], share) for name in few}


def _cut(config: TransformerConfig, layers: int) -> TransformerConfig:
    return dataclasses.replace(
        config, layers=layers, windows=config.windows and config.windows[:layers]
    )


def _further(few: Program | TooLarge, many: Program | TooLarge, share: float) -> Program | TooLarge:
    if isinstance(few, TooLarge) or isinstance(many, TooLarge):
        return few if isinstance(few, TooLarge) else many
    line = lambda a, b: type(a)(a + share * (b - a))
    none = hlo.Collective(0, 0)
    collectives = {
        kind: hlo.Collective(
            *map(line, few.collectives.get(kind, none), many.collectives.get(kind, none))
        )
        for kind in {**few.collectives, **many.collectives}
    }
    numbers = {
        name: line(a, b)
        for name, a, b in zip(Program._fields, few, many, strict=True)
        if isinstance(a, int | float)
    }
    return few._replace(**numbers, collectives=collectives)._replace(
        compile_s=few.compile_s + many.compile_s
    )


def _frozen_first(function, agent, frozen, *args):
    return function(agent, *args, frozen=frozen)


def _shapes(agent, config, critic, adapters, mesh):
    """State, frozen parameters and reference, as shapes that say where each lies."""

    def params():
        trunk = init_params(config, jax.random.key(0))
        return {
            "policy": trunk,
            "critic": {"head": heads.zero_head(config.width)}
            if critic == "shared"
            else heads.init_scorer(config, jax.random.key(0)),
        }

    own, frozen = jax.eval_shape(params), None
    reference = own["policy"]
    if adapters is not None:
        own, frozen = jax.eval_shape(lambda p: lora.adapt(p, jax.random.key(0), adapters), own)
        reference = frozen["policy"]
    state = jax.eval_shape(
        lambda p: iteration.init_state(agent, p, jax.random.key(0), updates=1), own
    )
    return tuple(
        None if tree is None else placed(tree, mesh) for tree in (state, frozen, reference)
    )


def _compile(
    name: str,
    function,
    args,
    options,
    mesh: Mesh,
    chip: Chip,
    resident: int,
    twice: int,
    trips: int,
) -> Program | TooLarge:
    start = time.perf_counter()
    try:
        compiled = (
            jax.jit(function, compiler_options=compilation.COMPILER_OPTIONS, **options)
            .lower(*args)
            .compile()
        )
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return TooLarge(str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: "), resident)
    seconds = time.perf_counter() - start
    memory, done = compiled.memory_analysis(), hlo.account(compiled.as_text())
    inputs = memory.argument_size_in_bytes - twice
    peak = max(
        memory.peak_memory_in_bytes - twice,
        inputs
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
    )
    return Program(
        name,
        inputs,
        memory.temp_size_in_bytes,
        peak,
        needed=max(peak, resident + peak - inputs),
        flops=matmul_flops(function, *args, while_trips=trips) / mesh.size,
        moved=done.bytes,
        seconds=done.cycles / (chip.clock * 1e9),
        collectives=done.collectives,
        compile_s=seconds,
    )


def _size(tree: Any) -> int:
    """Bytes of arrays on each chip."""
    here = lambda x: x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    return sum(math.prod(here(x)) * getattr(x.dtype, "itemsize", 4) for x in jax.tree.leaves(tree))


def undivided(config: TransformerConfig, mesh: Mesh) -> list[str]:
    """What `tensor` does not divide, and all its chips compute alike: the FLOPs of a chip are then more than its share."""
    tensor = mesh.shape["tensor"]
    sizes = {
        "heads": config.heads,
        "key/value heads": config.key_heads,
        "MLP width": config.mlp_width,
        "vocabulary": config.vocab_size,
    }
    return [f"{name} {size}" for name, size in sizes.items() if size % tensor]


def advice(programs: dict[str, Program | TooLarge], chip: Chip) -> list[str]:
    """What to change where a program does not fit; nothing if all do."""
    lines, room = [], chip.memory * 2**30
    for name, program in programs.items():
        if isinstance(program, Program) and program.needed <= room:
            continue
        resident = (
            program.needed - (program.peak - program.arguments)
            if isinstance(program, Program)
            else program.resident
        )
        if resident > 0.8 * room:
            lines.append(
                f"{name}: parameters and optimizer fill the chip; larger fsdp or tensor, more chips, --critic shared or "
                "--lora.rank."
            )
        elif name == "rollout":
            lines.append(f"{name}: the cache; fewer --ppo.rollout-rows, or more chips.")
        else:
            lines.append(
                f"{name}: activations or logits; a smaller --ppo.micro-batch, --remat, --ppo.logit-chunk, or larger fsdp "
                "or tensor."
            )
    return lines
