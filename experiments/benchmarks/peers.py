"""Compare PPO iterations of this package, TRL and google-tunix, and rollouts of `generate`.

    python -m experiments.benchmarks.peers --out DIR

Each peer has a separate environment with exact versions, which is built at the first run. The peers
take turns in each round, so that all run on a machine in the same condition. The README in this
folder lists the differences between the peers.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import tyro

from experiments import assets
from experiments.benchmarks.work import WORKS

REQUIREMENTS = {
    "trl": ("torch==2.13.0", "trl==1.10.0", "transformers==5.24.0", "accelerate"),
    "tunix": ("google-tunix==0.1.7", "jax==0.10.2"),
}
_HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peers:
    """Time iterations and rollouts of peers, and their ratios to this package."""

    out: Path
    """Folder for summary.json."""
    work: str = "small"
    """Name of a shape in work.py with a separate critic in float32."""
    rounds: int = 2
    """Number of turns of each peer."""
    runs: int = 3
    """Timed iterations in a turn, after one that is not timed."""
    peers: tuple[str, ...] = ()
    """Names of the peers. By default trl and tunix, or trl alone where responses have different
    lengths."""


def main(options: Peers) -> dict:
    """Time all peers, write a summary to `options.out`, print medians and return the summary."""
    work = dataclasses.asdict(WORKS[options.work]) | {"runs": options.runs}
    peers = options.peers or (("trl",) if work["median"] else ("trl", "tunix"))
    pythons = {name: environment(name) for name in peers}
    commands = {"ppo_jax": [sys.executable, "-m", "experiments.benchmarks.peer_ours"]}
    commands |= {
        name: [str(python), str(_HERE / f"peer_{name}.py")] for name, python in pythons.items()
    }
    times: dict[str, list[float]] = {}
    lengths: dict[str, list[int]] = {}  # of the responses of this package, which the peers copy
    for _ in range(options.rounds):
        for name, command in commands.items():
            result = run([*command, json.dumps(work | (lengths if name != "ppo_jax" else {}))])
            if name == "ppo_jax" and work["median"]:
                lengths["lengths"] = result["lengths"]
            times.setdefault(f"iteration_s/{name}", []).extend(result["iteration_s"])
            if "rollout_s" in result:
                sampler = "hf_generate" if name == "trl" else name
                times.setdefault(f"rollout_s/{sampler}", []).extend(result["rollout_s"])
    median = {name: statistics.median(x) for name, x in times.items()}
    ratios = {
        f"{name.replace('_s/', '_ratio/')}": x / median[f"{name.partition('/')[0]}/ppo_jax"]
        for name, x in median.items()
        if not name.endswith("/ppo_jax")
    }
    summary = {**median, **ratios, "work": work, "all": times}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    for name, value in {**median, **ratios}.items():
        print(f"{name:28}{value:8.3f}")
    return summary


def environment(name: str) -> Path:
    """Return the Python of a peer's environment, which is built if versions differ."""
    folder = assets.cache_folder() / "peers" / name
    python, installed = folder / "bin" / "python", folder / "built.json"
    if not installed.is_file() or json.loads(installed.read_text()) != list(REQUIREMENTS[name]):
        print(f"Building {name}'s environment in {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *REQUIREMENTS[name]], check=True)
        installed.write_text(json.dumps(REQUIREMENTS[name]))
    return python


def run(command: list[str]) -> dict:
    """Run a command and return the JSON in the last line that it prints."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:2])} ended with status {done.returncode}.")
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main(tyro.cli(Peers))
