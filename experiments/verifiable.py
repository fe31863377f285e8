"""PPO with LoRA on tasks whose answers a program checks: SmolLM2-135M-Instruct learns to add and subtract, on a CPU.

Questions and their check come from `reasoning_gym` ("chain_sum": two numbers of one digit). A response is right if its
first number is the answer; right is worth 1, anything else 0. Accuracy is measured before and after on questions that PPO never
sees.

    python -m experiments.verifiable --out runs/verifiable
"""

import dataclasses
import re
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import reasoning_gym
import tyro

from experiments import assets
from ppo_jax import data
from ppo_jax.data.chat import end_of_turn
from ppo_jax.models import heads, lora
from ppo_jax.models.io import adapter_files, pretrained
from ppo_jax.models.transformer import language_model
from ppo_jax.ppo import iteration
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.reward_functions import TextReward
from ppo_jax.run.files import claim, lock, write_json
from ppo_jax.run.settings import LoopConfig
from ppo_jax.run.trainer import Trainer

N_HELD_OUT, DRAWS = 64, 3  # questions that PPO never sees, and responses to each in an evaluation
TASK = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
ADAPTERS = lora.LoRA(rank=16, alpha=32.0, targets=r"(attn/(q|k|v|o)|mlp/(gate|up|down))$")
PPO = PPOConfig(
    batch_size=64,
    epochs=2,
    minibatches=2,
    max_new_tokens=3,
    kl_coef=0.01,
    learning_rate=7e-4,
    decay_learning_rate=True,
    vf_coef=0.1,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """PPO on generated arithmetic."""

    out: Path
    """Folder for all results; must not hold another run."""
    seed: int = 0
    """Of everything random, the questions too."""
    model: str | None = None
    """Another language model (folder, Hugging Face id or .gguf file) in place of SmolLM2."""
    updates: int = 60
    """PPO updates."""
    ppo: PPOConfig = PPO
    """The PPO iteration."""


def questions(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows to train on, and held-out rows, each question once, of the 200 that there are; 4 + 3 is the same question as 3 + 4."""
    made = reasoning_gym.create_dataset("chain_sum", size=2000, seed=seed, **TASK)
    rows = list(
        {
            entry["question"]: {"prompt": entry["question"], "answer": entry["answer"]}
            for entry in made
        }.values()
    )
    held_out = rows[:N_HELD_OUT]
    known = {_any_order(row["prompt"]) for row in held_out}
    return [row for row in rows[N_HELD_OUT:] if _any_order(row["prompt"]) not in known], held_out


def _any_order(question: str) -> str:
    """The question with the smaller number first, if it is a sum."""
    return re.sub(
        r"(\d+) \+ (\d+)", lambda found: " + ".join(sorted(found.groups(), key=int)), question
    )


def correct(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """1 for each response whose first number is the row's answer, else 0.

    Example:
      >>> correct(["", ""], [" 12.", "so -1"], [{"answer": "12"}, {"answer": "1"}])
      [1.0, 0.0]
    """
    found = (re.search(r"-?\d+", response) for response in responses)
    return [
        float(number is not None and number.group() == row["answer"])
        for number, row in zip(found, rows, strict=True)
    ]


def main(settings: Settings) -> dict[str, float]:
    start, out = time.perf_counter(), claim(settings.out)
    _held = lock(out)  # until the end
    file = settings.model or assets.smollm2_gguf()
    tokenizer, policy = pretrained.load_tokenizer(file), pretrained.load_policy(file)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    train, held_out = questions(settings.seed)
    prompts, test = (
        data.encode_prompts(
            rows, tokenizer, positions=64, new_tokens=settings.ppo.max_new_tokens, pad_id=pad
        )
        for rows in (train, held_out * DRAWS)
    )
    config = dataclasses.replace(policy.config, lora_scale=ADAPTERS.scale)
    stops = tuple(dict.fromkeys((tokenizer.eos_token_id, *policy.end_ids, *end_of_turn(tokenizer))))
    agent = iteration.Agent(language_model(config), heads.shared_critic(), settings.ppo, stops, pad)
    adapters = lora.init_lora(policy.params, jax.random.key(settings.seed), ADAPTERS)
    trainer = Trainer(
        agent,
        {"policy": adapters, "critic": {"head": heads.zero_head(config.width)}},
        tokenizer,
        prompts,
        TextReward(correct),
        out=out / "ppo",
        loop=LoopConfig(updates=settings.updates, seed=settings.seed, save_every=0),
        frozen={"policy": policy.params},
        settings=settings,
    )
    before, first = trainer.evaluate(test)
    print(f"accuracy on held-out questions before: {before['eval/scores']:.3f}", flush=True)
    state = trainer.run(
        on_update=lambda m: print(
            f"  accuracy {m['objective/scores']:.3f}, KL {m['objective/kl']:.2f}", flush=True
        )
    )
    after, last = trainer.evaluate(test)
    adapter_files.save_adapter(
        out / "adapter", state.policy, ADAPTERS, config, policy.hf_config["model_type"], str(file)
    )
    summary = {
        "accuracy/before": before["eval/scores"],
        "accuracy/after": after["eval/scores"],
        "kl": after["eval/kl"],
        "seed": settings.seed,
        "time/total_s": time.perf_counter() - start,
    }
    write_json(out / "summary.json", summary)
    print(
        f"accuracy on held-out questions after: {after['eval/scores']:.3f}; KL {after['eval/kl']:.2f} nats a response; "
        f"{summary['time/total_s']:.0f} s\n"
    )
    for i in np.arange(5):
        print(
            f"{test.texts[i]} {test.rows[i]['answer']}\n  before: {first[i]!r}\n  after:  {last[i]!r}"
        )
    return summary


if __name__ == "__main__":
    main(tyro.cli(Settings))
