"""PPO with LoRA on verifiable tasks: SmolLM2-135M-Instruct learns to add and subtract on a CPU.

The questions come from `reasoning_gym` ("chain_sum" with two one-digit numbers). The reward is 1 if
the first number in a response is the answer, and 0 otherwise. Accuracy is measured before and after
PPO on held-out questions.

    python -m experiments.verifiable --out runs/verifiable
    python -m experiments.verifiable --out runs/sao --method sao
"""

import dataclasses
import enum
import re
import time
from pathlib import Path
from typing import Any

import reasoning_gym
import tyro

from experiments import assets
from experiments.folders import open_folder
from experiments.smollm2 import assemble_adapters
from ppo_jax import (
    PRESETS,
    LoopConfig,
    LoRA,
    PPOConfig,
    Prompts,
    TextReward,
    Trainer,
    load_model,
    save_adapter,
    write_json,
)

N_HELD_OUT, DRAWS = 64, 3  # held-out questions, and responses to each in an evaluation
TASK = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
ADAPTERS = LoRA(rank=16, alpha=32.0, targets=r"(attn/(q|k|v|o)|mlp/(gate|up|down))$")
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


class Method(enum.Enum):
    """Methods to compare: PPO with the settings above, and two presets at the same size."""

    PPO = "ppo"
    SAO = "sao"
    GRPO = "grpo"

    def settings(self, base: PPOConfig) -> PPOConfig:
        """Return the settings: of a preset, with the sizes and the learning rate of `base`."""
        if self is Method.PPO:
            return base
        sizes = ("batch_size", "max_new_tokens", "learning_rate", "decay_learning_rate")
        shared = {name: getattr(base, name) for name in sizes}
        if self is Method.GRPO:
            return dataclasses.replace(PRESETS["grpo"], group_size=8, weight_decay=0.0, **shared)
        sao = PRESETS["sao"]
        # The critic is a value head, which has no attention layers. Its learning rate is five
        # times that of the policy, as in the preset.
        critic = dataclasses.replace(
            sao.critic, learning_rate=5 * base.learning_rate, freeze_attention=False
        )
        return dataclasses.replace(sao, critic=critic, **shared)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Train SmolLM2 with low-rank adapters to answer arithmetic questions."""

    out: Path
    """Folder for all results; must not hold another run."""
    seed: int = 0
    """Seed of all random numbers and of the questions."""
    model: str | None = None
    """A language model (folder, Hugging Face id or .gguf file) to use instead of SmolLM2."""
    method: Method = Method.PPO
    """The method. A preset gets batch size, lengths and learning rate of the settings below."""
    updates: int = 60
    """Number of updates."""
    ppo: PPOConfig = PPO
    """Settings of the PPO iteration."""


def questions(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return rows to train on and held-out rows.

    There are 200 different questions, and each occurs once. If `4 + 3` is held out, `3 + 4`
    is not trained on.
    """
    dataset = reasoning_gym.create_dataset("chain_sum", size=2000, seed=seed, **TASK)
    answers = {entry["question"]: entry["answer"] for entry in dataset}
    rows = [{"prompt": question, "answer": answer} for question, answer in answers.items()]
    held_out = rows[:N_HELD_OUT]
    known = {_sorted_terms(row["prompt"]) for row in held_out}
    train = [row for row in rows[N_HELD_OUT:] if _sorted_terms(row["prompt"]) not in known]
    return train, held_out


def _sorted_terms(question: str) -> str:
    """Return the question with the smaller number first, if it is a sum."""
    in_order = lambda match: " + ".join(sorted(match.groups(), key=int))
    return re.sub(r"(\d+) \+ (\d+)", in_order, question)


def correct(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """Score each response 1 if its first number is the answer of its row, else 0.

    Example:
      >>> correct(["", ""], [" 12.", "so -1"], [{"answer": "12"}, {"answer": "1"}])
      [1.0, 0.0]
    """
    matches = (re.search(r"-?\d+", response) for response in responses)
    return [
        float(match is not None and match.group() == row["answer"])
        for match, row in zip(matches, rows, strict=True)
    ]


def main(settings: Settings) -> dict[str, float]:
    """Train, write the results to `settings.out`, print and return them."""
    start, out = time.perf_counter(), settings.out
    _folder_lock = open_folder(out)  # locked until the end
    file = settings.model or assets.smollm2_gguf()
    policy, tokenizer = load_model(file)
    ppo = settings.method.settings(settings.ppo)
    critic = "none" if settings.method is Method.GRPO else "shared"
    learner = assemble_adapters(policy, tokenizer, ppo, ADAPTERS, seed=settings.seed, critic=critic)
    train, held_out = questions(settings.seed)
    prompts, test = (learner.encode(rows) for rows in (train, held_out * DRAWS))
    loop = LoopConfig(updates=settings.updates, seed=settings.seed, save_every=0)
    reward = TextReward(correct)
    trainer = Trainer(learner, prompts, reward, out=out / "ppo", loop=loop, settings=settings)
    before, first = trainer.evaluate(test)[:2]
    print(f"accuracy on held-out questions before: {before['eval/scores']:.3f}", flush=True)
    state = trainer.run(
        on_update=lambda m: print(
            f"  accuracy {m['objective/scores']:.3f}, KL {m['objective/kl']:.2f}", flush=True
        )
    )
    after, last = trainer.evaluate(test)[:2]
    kind = policy.hf_config["model_type"]
    save_adapter(out / "adapter", state.policy, ADAPTERS, policy.config, kind, str(file))
    summary = {
        "accuracy/before": before["eval/scores"],
        "accuracy/after": after["eval/scores"],
        "kl": after["eval/kl"],
        "seed": settings.seed,
        "time/total_s": time.perf_counter() - start,
    }
    write_json(out / "summary.json", summary)
    report(summary, test, first, last)
    return summary


def report(summary: dict[str, float], test: Prompts, before: list[str], after: list[str]) -> None:
    """Print the final accuracy and some samples."""
    print(
        f"accuracy on held-out questions after: {summary['accuracy/after']:.3f}; "
        f"KL {summary['kl']:.2f} nats a response; {summary['time/total_s']:.0f} s\n"
    )
    for i in range(5):
        answer = test.rows[i]["answer"]
        print(f"{test.texts[i]} {answer}\n  before: {before[i]!r}\n  after:  {after[i]!r}")


if __name__ == "__main__":
    main(tyro.cli(Settings, config=(tyro.conf.EnumChoicesFromValues,)))
