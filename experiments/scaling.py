"""Predicted cost of PPO for sizes of GPT-3 and Llama 3 on TPU slices.

    python -m experiments.scaling --out DIR

No TPU is needed: the TPU compiler compiles the whole model of each study for a slice, which takes
from ten minutes to more than half an hour. Each study uses the first number of rows per device
that fits into memory. Studies in DIR are not compiled again.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro

from ppo_jax import (
    CHIPS,
    SIZES,
    PPOConfig,
    advice,
    compile_iteration,
    make_mesh,
    make_topology,
    parse_mesh,
    plan_figures,
)

PROMPT, RESPONSE = 512, 128
ROWS = (4, 1)  # rows of a micro-batch on each device, tried in this order
STUDIES = (  # model, slice, mesh
    ("gpt3-125m", "v5e:2x2", "data=4"),
    ("gpt3-6.7b", "v5e:8x16", "fsdp=32,tensor=4"),
    ("gpt3-175b", "v5p:4x8x8", "fsdp=32,tensor=8"),
    ("llama3-8b", "v5p:2x2x4", "fsdp=16"),
    ("llama3-8b", "v6e:8x8", "fsdp=32,tensor=2"),
    ("llama3-70b", "v5p:4x4x8", "fsdp=32,tensor=4"),
)
COLUMNS = (
    "model",
    "slice",
    "mesh",
    "rows a device",
    "fits",
    "GiB a chip",
    "decode step ms, of collectives, bound",
    "rollout s, of collectives",
    "scoring s, of collectives",
    "update s, of collectives, share of peak",
    "GiB sent in an update",
)
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling:
    """Settings of the experiment."""

    out: Path
    """Folder for summary.json and table.md."""
    only: str = ""
    """Only study models whose names contain this."""


def main(options: Scaling) -> None:
    """Compile the studies that are missing, and write and print the table."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    options.out.mkdir(parents=True, exist_ok=True)
    summary = options.out / "summary.json"
    done = {
        tuple(row[name] for name in ("model", "topology", "mesh")): row for row in _read(summary)
    }
    for study in STUDIES:
        if study not in done and options.only in study[0]:
            done[study] = run(*study)
            rows = [done[study] for study in STUDIES if study in done]
            summary.write_text(json.dumps(rows, indent=2) + "\n")
            (options.out / "table.md").write_text("\n".join([HEAD, *map(_line, rows)]) + "\n")
        if study in done:
            print(_line(done[study]), flush=True)


def _read(file: Path) -> list[dict]:
    return json.loads(file.read_text()) if file.is_file() else []


def run(model: str, topology: str, mesh: str) -> dict:
    """Compile a study with the first of `ROWS` that fits, or else the last; return its row."""
    chip = CHIPS[topology.partition(":")[0]]
    on = make_mesh(parse_mesh(mesh), make_topology(topology))
    size = SIZES[model](model)
    config = dataclasses.replace(size, dtype=jnp.bfloat16, remat=size.width >= 2048)
    if model.startswith("gpt3"):
        # The vocabulary of 50,257 is padded to the tiles of a TPU, because libtpu 0.0.42.1 fails on
        # some meshes otherwise.
        config = dataclasses.replace(config, vocab_size=-(-size.vocab_size // 128) * 128)
    for rows in ROWS if size.width < 4096 else ROWS[-1:]:  # wide models take minutes to compile
        micro = rows * on.shape["data"] * on.shape["fsdp"]
        ppo = PPOConfig(
            batch_size=4 * micro, minibatches=4, micro_batch=micro, max_new_tokens=RESPONSE
        )
        programs = compile_iteration(config, ppo=ppo, mesh=on, chip=chip, prompt_tokens=PROMPT)
        fits = not advice(programs, chip)
        if fits:
            break
    return {
        "model": model,
        "topology": topology,
        "mesh": mesh,
        "rows_a_device": rows,
        "batch_size": ppo.batch_size,
        "fits": fits,
        "memory": chip.memory,
        "advice": advice(programs, chip),
        **plan_figures(programs, chip),
    }


def _line(row: dict) -> str:
    """Return the row of a study in the Markdown table."""
    phases = [row[name] for name in ("rollout", "scoring", "update")]
    peak = max((p["needed"] / 2**30 for p in phases if "needed" in p), default=float("nan"))
    seconds = [
        f"{p['seconds']:.2f}, {p['collective_s']:.2f}" if "seconds" in p else "-" for p in phases
    ]
    if "share_of_peak" in phases[2]:
        seconds[2] += f", {phases[2]['share_of_peak']:.0%}"
    sent = ", ".join(
        f"{kind} {c['bytes'] / 2**30:.0f}"
        for kind, c in sorted(phases[2].get("collectives", {}).items())
        if c["bytes"] >= 2**29
    )
    cells = [row[name] for name in ("model", "topology", "mesh", "rows_a_device")]
    cells += ["yes" if row["fits"] else "no", f"{peak:.1f} of {row['memory']}"]
    cells += [_step(phases[0]), *seconds, sent]
    return f"| {' | '.join(map(str, cells))} |"


def _step(rollout: dict) -> str:
    """Return the figures of a decode step in milliseconds."""
    if "decode_step_s" not in rollout:
        return "-"
    names = ("decode_step_s", "decode_collective_s", "decode_bound_s")
    return ", ".join(f"{rollout[name] * 1e3:.2f}" for name in names)


if __name__ == "__main__":
    main(tyro.cli(Scaling))
