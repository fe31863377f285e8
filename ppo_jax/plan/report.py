"""Report the cost of compiled programs as text or JSON, and say what to change if they do not fit.

Advice is given for each program that needs more memory than a chip has.
"""

from typing import Any

from jax.sharding import Mesh

from ppo_jax.models.config import TransformerConfig
from ppo_jax.plan.compile import Program, Programs, TooLarge
from ppo_jax.plan.topology import Chip


def summary(programs: Programs, config: TransformerConfig, mesh: Mesh, chip: Chip) -> str:
    """Return a text with the cost of each program, whether all fit, and what to change if not."""
    lines = [line for name, program in programs.items() for line in _lines(name, program, chip)]
    if sizes := indivisible_sizes(config, mesh):
        lines.append(
            f"tensor={mesh.shape['tensor']} does not divide {', '.join(sizes)}; "
            "every chip computes these in full, beyond its share."
        )
    problems = advice(programs, chip)
    lines += ["It does not fit:", *(f"  {x}" for x in problems)] if problems else ["It fits."]
    return "\n".join(lines)


def _lines(name: str, program: Program | TooLarge, chip: Chip) -> list[str]:
    if isinstance(program, TooLarge):
        return [f"{name}: does not compile: {program.reason}"]
    gib = lambda size: f"{size / 2**30:.3f} GiB"
    inside = program.loop_collective_s
    lines = [
        f"{name} (compiled in {program.compile_s:.0f} s)",
        f"  arguments {gib(program.arguments)}, temporary {gib(program.temporary)}, "
        f"peak {gib(program.peak)}; with all else on the chip {gib(program.needed)}",
        f"  {program.flops / 1e12:.3f} TFLOP, {gib(program.moved)} moved; {program.seconds:.3f} s "
        f"({program.share_of_peak(chip):.0%} of the chip's bfloat16 peak), of which "
        f"{program.collective_s:.3f} s of collectives ({inside:.3f} s inside loops and "
        f"{program.collective_s - inside:.3f} s outside) at {chip.link:g} GB/s",
    ]
    if step := program.decode_step:
        lines.append(
            f"  a decode step {step.seconds * 1e3:.3f} ms, with {step.collective_s * 1e3:.3f} ms "
            f"of collectives of {step.collective_bytes / 1e6:.3f} MB; its reads alone take "
            f"{step.bound_s * 1e3:.3f} ms at {chip.bandwidth:g} GB/s, "
            f"{step.bound_s / step.seconds:.0%} of that"
        )
    lines += [
        f"  {kind}: {c.count} of {gib(c.bytes)} together"
        for kind, c in sorted(program.collectives.items())
    ]
    return lines + [f"  Note: {note}" for note in program.notes]


def plan_figures(programs: Programs, chip: Chip) -> dict[str, Any]:
    """Return the cost of each program in the types of JSON.

    Args:
      programs: the programs, as `compile_iteration` or `extrapolate` returns them.
      chip: what each device offers.

    Returns:
      For each program a dictionary of its figures, or `{"too_large": reason}`.

    Example:
      >>> from ppo_jax import CHIPS, TooLarge
      >>> plan_figures({"update": TooLarge("It needs 20 GiB.")}, CHIPS["v5e"])
      {'update': {'too_large': 'It needs 20 GiB.'}}
    """
    return {name: _figures(program, chip) for name, program in programs.items()}


def _figures(program: Program | TooLarge, chip: Chip) -> dict[str, Any]:
    if isinstance(program, TooLarge):
        return {"too_large": program.reason}
    found = program._asdict()
    step = found.pop("decode_step")
    found["collectives"] = {kind: vars(c) for kind, c in program.collectives.items()}
    found["share_of_peak"] = program.share_of_peak(chip)
    if step is not None:
        found["decode_step_s"] = step.seconds
        found["decode_collective_s"] = step.collective_s
        found["decode_bound_s"] = step.bound_s
        found["loop_collective_bytes"] = step.collective_bytes
    return found


def indivisible_sizes(config: TransformerConfig, mesh: Mesh) -> list[str]:
    """Return the names of the sizes of a model that are not multiples of the mesh axis `tensor`.

    All chips of that axis compute the parts with these sizes in full, so each chip computes more
    than `Program.flops` says.
    """
    sizes = {
        "heads": config.heads,
        "key/value heads": config.key_heads,
        "MLP width": config.mlp_width,
        "vocabulary": config.vocab_size,
    }
    return [f"{name} {size}" for name, size in sizes.items() if size % mesh.shape["tensor"]]


def advice(programs: Programs, chip: Chip) -> list[str]:
    """Return what to change for each program that does not fit.

    Args:
      programs: what `compile_iteration` or `extrapolate` returned.
      chip: the chip that the programs were compiled for.

    Returns:
      A sentence for each program that does not fit; the list is empty if all fit.

    Example:
      >>> from ppo_jax.plan.topology import CHIPS
      >>> [line] = advice({"update": TooLarge("Out of memory.", 15 * 2**30)}, CHIPS["v5e"])
      >>> line.partition(";")[0]
      'update: parameters and optimizer state fill the chip'
    """
    lines, memory = [], chip.memory * 2**30
    for name, program in programs.items():
        if isinstance(program, TooLarge):
            resident = program.resident
        elif program.needed > memory:
            resident = program.needed - (program.peak - program.arguments)
        else:
            continue
        if resident > 0.8 * memory:
            change = (
                "parameters and optimizer state fill the chip; use a larger fsdp or tensor, more "
                "chips, --critic shared or --lora.rank."
            )
        elif name == "rollout":
            change = (
                "the key/value cache is too large; use fewer --ppo.rollout-rows or "
                "--ppo.rollout-slots, or more chips."
            )
        else:
            change = (
                "activations or logits are too large; use a smaller --ppo.micro-batch, --remat, "
                "--ppo.logit-chunk, or a larger fsdp or tensor."
            )
        lines.append(f"{name}: {change}")
    return lines
