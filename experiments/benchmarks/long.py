"""Iteration time and memory over 500 small updates of the train loop; both should stay constant.

python -m experiments.benchmarks.long --out DIR
"""

import dataclasses
import itertools
import json
import statistics
import time
from pathlib import Path

import jax
import tyro
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from experiments.benchmarks.phases import resident
from ppo_jax import (
    LoopConfig,
    PPOConfig,
    Pretrained,
    TextReward,
    Trainer,
    TransformerConfig,
    assemble,
    init_params,
    read_rows,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Long:
    """Measure iteration time and resident memory over a long run."""

    out: Path
    """Folder for summary.json and the run."""
    updates: int = 500
    """Number of PPO updates."""


def make_trainer(options: Long) -> Trainer:
    """Return a run of a tiny model that is rewarded for one of its words."""
    words = {f"w{i}": i for i in range(64)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", eos_token="w0")
    config = TransformerConfig(
        vocab_size=64, positions=32, width=32, layers=2, heads=4, mlp_width=128
    )
    ppo = PPOConfig(batch_size=32, max_new_tokens=12, learning_rate=1e-4)
    policy = Pretrained(config, init_params(config, jax.random.key(0)), hf_config={})
    learner = assemble(policy, tokenizer, ppo, critic="shared")
    rows = read_rows(
        [" ".join(f"w{1 + (7 * i + j) % 60}" for j in range(1 + i % 8)) for i in range(200)]
    )
    reward = TextReward(lambda prompts, responses: [float(r.count("w7")) for r in responses])
    loop = LoopConfig(updates=options.updates, save_every=50, progress=False)
    return Trainer(learner, learner.encode(rows), reward, out=options.out / "run", loop=loop)


def main(options: Long) -> dict:
    """Run, write a summary to `options.out`, print and return it."""
    trainer = make_trainer(options)
    marks, memory = [time.perf_counter()], []

    def record(_: dict) -> None:
        marks.append(time.perf_counter())
        memory.append(resident())

    trainer.run(on_update=record)
    seconds, part = [b - a for a, b in itertools.pairwise(marks)], options.updates // 5
    summary = {
        "updates": options.updates,
        "iteration_s/first_fifth": statistics.median(seconds[1:part]),
        "iteration_s/last_fifth": statistics.median(seconds[-part:]),
        "resident_bytes/after_first_fifth": memory[part],
        "resident_bytes/at_end": memory[-1],
        "resident_bytes/by_fifth": [memory[i * part - 1] for i in range(1, 6)],
    }
    (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))
    return summary


if __name__ == "__main__":
    main(tyro.cli(Long))
