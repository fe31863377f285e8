"""What the TPU's compiler says of decoding and of the update, without a TPU.

    python -m experiments.benchmarks.tpu --out DIR

Each case is compiled with all its layers, one program at a time: a model of few layers keeps its
parameters in the memory of the core while it decodes, so its figures say little about a deep one.
They are estimates (see `ppo_jax.plan.compile.Program`): an operation takes the compiler's cycles or
the time to move its bytes, whichever is longer, and nothing overlaps. Figures in DIR are not made
again, and the text of each program is kept there as well.

It takes 2 to 5 minutes of one core per case.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tyro

from ppo_jax import PPOConfig, TransformerConfig, make_mesh, parse_mesh
from ppo_jax.models.config import Rotary
from ppo_jax.models.sizes import SIZES
from ppo_jax.plan import hlo, traffic
from ppo_jax.plan.account import operation_seconds
from ppo_jax.plan.compile import compile_iteration
from ppo_jax.plan.report import plan_figures
from ppo_jax.plan.topology import CHIPS, Chip, make_topology


class Case(NamedTuple):
    """A program to compile.

    Attributes:
      model: a name of `MODELS`.
      topology: kind of chip and shape of the slice.
      mesh: sizes of the mesh axes.
      rows: number of prompts of an iteration.
      tokens: lengths of prompt and response.
      phase: the phase to compile.
    """

    model: str
    topology: str
    mesh: str
    rows: int
    tokens: tuple[int, int]
    phase: str = "rollout"


MODELS: dict[str, Callable[[], TransformerConfig]] = {
    "gpt2": lambda: SIZES["gpt2"]("gpt2"),
    "smollm2-135m": lambda: dataclasses.replace(
        SIZES["llama3-8b"]("llama3-8b"),
        vocab_size=49152,
        width=576,
        layers=30,
        heads=9,
        kv_heads=3,
        mlp_width=1536,
        tied=True,
        rotary=Rotary(base=100000.0, width=64),
    ),
    "llama3-8b": lambda: SIZES["llama3-8b"]("llama3-8b"),
}
CASES = {
    "gpt2": Case("gpt2", "v5e:2x2", "data=1", 64, (64, 512)),
    "smollm2-135m": Case("smollm2-135m", "v5e:2x2", "data=1", 64, (64, 512)),
    "llama3-8b": Case("llama3-8b", "v5e:4x4", "fsdp=16", 64, (1024, 1024)),
    "gpt2-update": Case("gpt2", "v5e:2x2", "data=4", 512, (64, 24), "update"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Compile the cases for TPU slices, and report what the compiler estimates."""

    out: Path
    """Folder for summary.json and the programs' texts."""
    only: str = ""
    """Only cases whose names contain this."""


def main(options: Options) -> dict[str, Any]:
    """Compile the cases that are missing, write a summary to `options.out`, print and return it."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "summary.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    for name, case in CASES.items():
        if name not in found and options.only in name:
            found[name] = run(name, case, options)
            file.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps({name: shown(case) for name, case in found.items()}, indent=2))
    return found


def run(name: str, case: Case, options: Options) -> dict[str, Any]:
    """Compile a case and return its figures."""
    chip = CHIPS[case.topology.partition(":")[0]]
    mesh = make_mesh(parse_mesh(case.mesh), make_topology(case.topology))
    logits: list[float] = []

    def inspect(_: str, text: str) -> None:
        (options.out / f"{name}.hlo.txt").write_text(text)
        logits.append(logits_seconds(text, chip))

    programs = compile_iteration(
        dataclasses.replace(MODELS[case.model](), dtype=jnp.bfloat16),
        PPOConfig(batch_size=case.rows, max_new_tokens=case.tokens[1]),
        mesh,
        chip,
        prompt_tokens=case.tokens[0],
        phases=(case.phase,),
        inspect=inspect,
    )
    found = plan_figures(programs, chip)[case.phase]
    return {**case._asdict(), **found, **({"logits_s": logits[0]} if logits else {})}


def logits_seconds(text: str, chip: Chip) -> float:
    """Return the time of all that follows the product that makes the logits, with its gradient.

    It is that of the operations in the scopes of the logits, without the forward product.
    """
    module = hlo.parse(text)
    runs, fused, _ = hlo.count_runs(module)
    seconds = 0.0
    for name in module.computations.keys() - fused:
        for x in module.computations[name]:
            forward = re.search(r"jvp\(Decoder\.logits\)+/nd,vd->nv", x.scope)
            if re.search(r"Decoder\.logits|logprobs", x.scope) and not forward:
                moved = traffic.traffic(module, x)
                seconds += runs[name].total * operation_seconds(x, moved, chip)
    return seconds


def shown(case: dict[str, Any]) -> dict[str, Any]:
    """Return the figures to print."""
    if "too_large" in case:
        return {"too_large": case["too_large"]}
    if case["phase"] == "update":
        return {name: case[name] for name in ("seconds", "share_of_peak", "logits_s", "compile_s")}
    step, bound = case["decode_step_s"], case["decode_bound_s"]
    return {
        "decode_step_ms": step * 1e3,
        "decode_bound_ms": bound * 1e3,
        "share_of_bound": bound / step,
        "collective_mb_per_step": case["loop_collective_bytes"] / 1e6,
        "compile_s": case["compile_s"],
    }


if __name__ == "__main__":
    main(tyro.cli(Options))
