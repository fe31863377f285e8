"""Compile a PPO iteration for the chips of a mesh, and predict what it costs on each chip.

The programs do not run and no parameter is allocated, because the compiler needs shapes only.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.stages import Compiled, Traced

from ppo_jax.distributed import compilation, meshes
from ppo_jax.errors import SettingError
from ppo_jax.models import heads, lora
from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.transformer import language_model
from ppo_jax.plan.account import Collective, account
from ppo_jax.plan.decoding import DecodeStep, bound_seconds, decode_step
from ppo_jax.plan.flops import jaxpr_flops
from ppo_jax.plan.memory import size_of, start_params
from ppo_jax.plan.topology import Chip
from ppo_jax.ppo import iteration
from ppo_jax.ppo.critic import no_critic
from ppo_jax.ppo.critic_settings import choose_critic
from ppo_jax.ppo.packing import check_packing
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.ppo.state import overlay
from ppo_jax.sharding import placed, rows_sharding


class Program(NamedTuple):
    """The cost of one compiled phase of an iteration on each chip, with memory in bytes.

    Attributes:
      name: `rollout`, `scoring` or `update`.
      arguments: memory of the program's arguments.
      temporary: memory of intermediate results.
      peak: largest memory of arguments, results and intermediate results at any moment.
      needed: the peak plus parameters and optimizer state that stay on the chip meanwhile, although
        this program does not use them.
      flops: floating-point operations of matrix products, if every response has its greatest
        length and the chips share the work evenly (but see `report.indivisible_sizes`).
      moved: bytes read from and written to main memory.
      seconds: estimate of the time with collectives, if nothing happens at the same time. An
        operation takes the compiler's estimate of its cycles or the time to move its bytes,
        whichever is longer, and a collective takes its time at the published rate of the links.
      collective_s: the part of it that is spent in collectives.
      loop_collective_s: the part of that in loops.
      collectives: number and bytes of the collective operations, by kind.
      compile_s: seconds that the compilation took.
      decode_step: for the rollout, the mean decode step.
      notes: sentences that say what the figures leave out.

    Example::

      gib = compile_iteration(config, ppo, mesh, chip, prompt_tokens=512)["update"].needed / 2**30
    """

    name: str
    arguments: int
    temporary: int
    peak: int
    needed: int
    flops: float
    moved: int
    seconds: float
    collective_s: float
    loop_collective_s: float
    collectives: dict[str, Collective]
    compile_s: float
    decode_step: DecodeStep | None = None
    notes: tuple[str, ...] = ()

    def share_of_peak(self, chip: Chip) -> float:
        """Return the chip's share of its peak rate of arithmetic; 0 if the time is unknown."""
        return self.flops / (self.seconds * chip.peak * 1e12) if self.seconds else 0.0


class TooLarge(NamedTuple):
    """A phase that the compiler cannot fit into a chip's memory.

    Attributes:
      reason: the compiler's message.
      resident: bytes of parameters and optimizer state on each chip, before any program runs.

    Example:
      >>> TooLarge("Ran out of memory in memory space hbm.", resident=14 * 2**30).resident
      15032385536
    """

    reason: str
    resident: int = 0


Programs = dict[str, Program | TooLarge]


def compile_iteration(
    config: TransformerConfig,
    ppo: PPOConfig,
    mesh: Mesh,
    chip: Chip,
    *,
    prompt_tokens: int,
    critic: str = "auto",
    adapters: lora.LoRA | None = None,
    stop_ids: tuple[int, ...] = (0,),
    phases: Sequence[str] = ("rollout", "scoring", "update"),
    inspect: Callable[[str, str], None] | None = None,
) -> Programs:
    """Compile rollout, scoring and update for the chips of a mesh.

    Args:
      config: the model of policy, reference and critic.
      ppo: settings of the iteration.
      mesh: a mesh of the devices of `make_topology`.
      chip: what each device offers.
      prompt_tokens: `P`, the length of every prompt.
      critic: `auto`, `none`, `shared` or `separate`, as in `assemble`.
      adapters: low-rank adapters to train instead of all parameters.
      stop_ids: tokens that end a response. The figures assume that every response has its greatest
        length.
      phases: which of `rollout`, `scoring` and `update` to compile.
      inspect: called with the name and the HLO text of each program, if given.

    Returns:
      For each of the phases, the program or the reason why there is none.

    Raises:
      SettingError: if the batch does not divide over the mesh, if there are no phases, if a bin
        of `ppo.pack` is too short, or if the settings do not go with the critic.

    Example::

      mesh = make_mesh({"fsdp": 16}, make_topology("v5e:4x4"))
      config = SIZES["gpt3-1.3b"]("gpt3-1.3b")
      programs = compile_iteration(config, PPOConfig(), mesh, CHIPS["v5e"], prompt_tokens=512)
      problems = advice(programs, CHIPS["v5e"])  # empty if all programs fit
    """
    if not phases:
        raise SettingError("phases must name at least one of rollout, scoring and update.")
    meshes.check_rows(ppo, meshes.batch_shards(mesh))
    if adapters is not None:
        config = replace(config, lora_scale=adapters.scale)
    critic = str(choose_critic(critic, ppo))
    critics = {"none": no_critic, "shared": heads.shared_critic()}
    critic_fn = critics.get(critic) or heads.separate_critic(config)
    agent = iteration.Agent(language_model(config), critic_fn, ppo, stop_ids, 0)
    check_packing(agent.model, critic_fn, ppo.bins, prompt_tokens + ppo.max_new_tokens)
    shapes = _state_shapes(agent, config, critic, adapters, mesh)
    state, frozen, reference = shapes
    # With adapters, policy and critic share a frozen trunk, which a program takes as two arguments.
    own_trunk = frozen is not None and critic == "separate"
    shared = size_of(frozen["critic"]["trunk"]) if own_trunk else 0
    resident = size_of((state, frozen, reference if frozen is None else None)) - shared
    measure = partial(_measure, ppo=ppo, mesh=mesh, chip=chip, resident=resident, inspect=inspect)
    with jax.set_mesh(mesh):
        traced = _trace(agent, mesh, shapes, prompt_tokens, phases)
        found = {
            name: measure(name, traced[name], shared=0 if name == "rollout" else shared)
            for name in phases
        }
    if isinstance(rollout := found.get("rollout"), Program) and rollout.decode_step:
        policy = overlay(frozen, state.train.params)["policy"]
        bound_s = bound_seconds(config, policy, ppo, mesh, chip, prompt_tokens=prompt_tokens)
        step = rollout.decode_step._replace(bound_s=bound_s)
        found["rollout"] = rollout._replace(decode_step=step)
    return found


def _trace(
    agent: iteration.Agent,
    mesh: Mesh,
    shapes: tuple[Any, Any, Any],
    prompt_tokens: int,
    phases: Sequence[str],
) -> dict[str, Traced]:
    """Trace the phases, and those before them; `shapes` are those of `_state_shapes`."""
    state, frozen, reference = shapes
    sample, score, learn = compilation.lowerable_steps(agent, mesh, state)

    def rows(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        sharding = rows_sharding(mesh)
        return jax.ShapeDtypeStruct((agent.config.batch_size, *shape), dtype, sharding=sharding)

    by_rows = partial(jax.tree.map, lambda x: rows(x.dtype, *x.shape[1:]))
    prompts = rows(jnp.int32, prompt_tokens), rows(bool, prompt_tokens)
    traced = {"rollout": sample.trace(state, *prompts, frozen=frozen)}
    if {"scoring", "update"} & set(phases):
        rollout = by_rows(traced["rollout"].out_info)
        traced["scoring"] = score.trace(state, reference, rollout, frozen=frozen)
    if "update" in phases:
        scores, task_scores = by_rows(traced["scoring"].out_info), rows(jnp.float32)
        traced["update"] = learn.trace(state, rollout, scores, task_scores, frozen=frozen)
    return traced


def _state_shapes(
    agent: iteration.Agent,
    config: TransformerConfig,
    critic: str,
    adapters: lora.LoRA | None,
    mesh: Mesh,
) -> tuple[Any, Any, Any]:
    """Return the state, the frozen parameters and the reference as shapes with shardings.

    The reference is None if it moves, because it is then a part of the state.
    """

    def init() -> tuple[Any, Any, Any]:
        params, frozen, reference = start_params(config, critic=critic, adapters=adapters)
        state = iteration.init_state(agent, params, jax.random.key(0), updates=1)
        return state, frozen, reference if state.reference is None else None

    return placed(jax.eval_shape(init), mesh)


def _measure(
    name: str,
    traced: Traced,
    *,
    ppo: PPOConfig,
    mesh: Mesh,
    chip: Chip,
    resident: int,
    shared: int = 0,
    inspect: Callable[[str, str], None] | None = None,
) -> Program | TooLarge:
    """Compile one phase and measure its cost.

    The compiler counts arguments that are the same array twice; `shared` is the number of bytes to
    subtract for that.
    """
    start = time.perf_counter()
    compiled = _compile(traced, resident)
    if isinstance(compiled, TooLarge):
        return compiled
    compile_s = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()  # Only other backends may return None.
    text = compiled.as_text() or ""
    if inspect is not None:
        inspect(name, text)
    costs = account(text, chip)
    arguments = memory.argument_size_in_bytes - shared
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = max(
        memory.peak_memory_in_bytes - shared, arguments + memory.temp_size_in_bytes + results
    )
    flops = jaxpr_flops(traced.jaxpr.jaxpr)
    return Program(
        name,
        arguments,
        memory.temp_size_in_bytes,
        peak,
        needed=max(peak, resident + peak - arguments),
        flops=flops / mesh.size,
        moved=costs.total.bytes,
        seconds=costs.total.seconds,
        collective_s=costs.total.collective_s,
        loop_collective_s=costs.loops.collective_s,
        collectives=costs.total.collectives,
        compile_s=compile_s,
        decode_step=decode_step(costs) if name == "rollout" else None,
        notes=tuple(_notes(name, text, ppo)),
    )


def _compile(traced: Traced, resident: int) -> Compiled | TooLarge:
    """Compile one phase, or return why the compiler cannot fit it into the memory."""
    try:
        return traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return TooLarge(str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: "), resident)


def _notes(name: str, text: str, ppo: PPOConfig) -> Iterator[str]:
    """Yield what the figures of a program leave out, given its HLO text."""
    if ppo.bins is not None and name != "rollout":
        yield (
            "Arithmetic, bytes and seconds are of one step of each loop over bins, which computes "
            f"{ppo.bins.number} x {ppo.pack} tokens on each shard of the rows. How many steps it "
            "takes in a run depends on the lengths of the responses."
        )
    if "tpu_custom_call" in text:
        yield (
            "The seconds are too short, because the compiler gives no cycles for the splash kernel "
            "of long sequences, so only the time of its bytes is counted."
        )
