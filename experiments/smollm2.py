"""PPO with LoRA: SmolLM2-135M-Instruct learns to continue movie reviews positively, on a CPU.

The openings are the first words of real review sentences. The reward is a ridge regression from
MiniLM sentence embeddings to human scores (Hutto & Gilbert 2014), fitted on other sentences. With
`--like SENTENCE` the reward is instead the similarity of the text to that sentence, by the same
encoder. The VADER lexicon, which is used in no training, judges continuations of test openings.

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
from ppo_jax import (
    Encoder,
    Learner,
    LikenessReward,
    LoopConfig,
    LoRA,
    PPOConfig,
    Pretrained,
    TextReward,
    Trainer,
    assemble,
    create_run_folder,
    init_lora,
    load_encoder,
    load_model,
    lock_folder,
    read_rows,
    save_adapter,
    write_json,
)

N_REWARD = 3000  # sentences for the reward
N_PPO, N_TEST = 2000, 128  # sentences whose openings are used for PPO and for the test
ADAPTERS = LoRA(rank=16, alpha=32.0, targets=r"attn/(q|k|v|o)$")
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
    """Train SmolLM2 with low-rank adapters to continue movie reviews positively."""

    out: Path
    """Folder for all results; must not hold another run."""
    seed: int = 0
    """Seed of all random numbers."""
    model: str | None = None
    """A language model (folder, Hugging Face id or .gguf file) to use instead of SmolLM2."""
    like: str | None = None
    """Reward similarity to this sentence instead of human scores."""
    updates: int = 24
    """Number of PPO updates."""
    opening: int = 5
    """Number of words of an opening."""
    ppo: PPOConfig = PPO
    """Settings of the PPO iteration."""


class HumanScore:
    """A reward that predicts human scores of texts by ridge regression on their embeddings."""

    def __init__(self, embed: Encoder, texts: list[str], scores: list[float], penalty: float = 1.0):
        x, self.embed, self.mean = _batched(embed, texts), embed, float(np.mean(scores))
        gram = x.T @ x + penalty * np.eye(x.shape[1], dtype=np.float32)
        self.weights = np.linalg.solve(gram, x.T @ (np.asarray(scores, np.float32) - self.mean))

    def __call__(self, prompts: list[str], responses: list[str]) -> np.ndarray:
        """Return the predicted score of each text."""
        texts = [p + r for p, r in zip(prompts, responses, strict=True)]
        return self.embed(texts) @ self.weights + self.mean


def _batched(embed: Encoder, texts: list[str], size: int = 250) -> np.ndarray:
    """Embed many texts, `size` at a time."""
    return np.concatenate([embed(texts[i : i + size]) for i in range(0, len(texts), size)])


def split(seed: int, opening: int) -> tuple[list[assets.ScoredSentence], list[str], list[str]]:
    """Split shuffled reviews into sentences for the reward and openings for PPO and for the test.

    No test opening occurs among the PPO openings, and no sentence for the reward starts with one.
    """
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


def make_reward(settings: Settings, scored: list[assets.ScoredSentence]) -> TextReward:
    """Return the reward: predicted human scores, or similarity to a sentence."""
    embed = load_encoder(assets.minilm(), length=48)
    if settings.like is not None:
        return TextReward(LikenessReward(embed, settings.like))
    print("Learning the human scores", flush=True)
    texts, scores = [row.sentence for row in scored], [row.score for row in scored]
    return TextReward(HumanScore(embed, texts, scores))


def assemble_adapters(
    policy: Pretrained, tokenizer, ppo: PPOConfig, adapters: LoRA, *, seed: int
) -> Learner:
    """Return a learner of low-rank adapters with a value head on the policy's trunk."""
    learner = assemble(policy, tokenizer, ppo, critic="shared", lora=adapters)
    # The published figures were made with this key for the adapters.
    fresh = init_lora(policy.params, jax.random.key(seed), adapters)
    return learner._replace(params={**learner.params, "policy": fresh})


def main(settings: Settings) -> dict[str, float]:
    """Train, write the results to `settings.out`, print and return them."""
    start, out = time.perf_counter(), create_run_folder(settings.out)
    _folder_lock = lock_folder(out)  # held until the end
    scored, openings, test_openings = split(settings.seed, settings.opening)
    reward = make_reward(settings, scored)
    file = settings.model or assets.smollm2_gguf()
    policy, tokenizer = load_model(file)
    learner = assemble_adapters(policy, tokenizer, settings.ppo, ADAPTERS, seed=settings.seed)
    prompts, test = (learner.encode(read_rows(texts)) for texts in (openings, test_openings))
    loop = LoopConfig(updates=settings.updates, seed=settings.seed, save_every=0)
    trainer = Trainer(learner, prompts, reward, out=out / "ppo", loop=loop, settings=settings)
    before = trainer.evaluate(test)[:2]
    state = trainer.run(
        on_update=lambda m: print(
            f"  score {m['objective/scores']:.3f}, KL {m['objective/kl']:.2f}", flush=True
        )
    )
    after = trainer.evaluate(test)[:2]
    kind = policy.hf_config["model_type"]
    save_adapter(out / "adapter", state.policy, ADAPTERS, policy.config, kind, str(file))
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
    """Print and return the figures of the evaluations and of the judge."""
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
