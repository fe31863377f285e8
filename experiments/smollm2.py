"""PPO with LoRA: SmolLM2-135M-Instruct learns to continue movie reviews positively, on a CPU.

The openings are the first words of real review sentences. The reward is how much a response raises
the human score that is predicted for its opening, by a ridge regression from MiniLM sentence
embeddings to human scores (Hutto & Gilbert 2014), fitted on other sentences. With
`--like SENTENCE` the reward is instead the similarity of the text to that sentence, by the same
encoder. A response ends with its sentence. Two judges that are trained on nothing here compare the
continuations of test openings: the VADER lexicon, and their perplexity under the initial model.

    python -m experiments.smollm2 --out runs/smollm2
"""

import dataclasses
import functools
import re
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import tyro
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from experiments import assets
from experiments.folders import open_folder
from experiments.movie_sentiment import distinct2, plot
from ppo_jax import (
    Encoder,
    Evaluation,
    Learner,
    LikenessReward,
    LoopConfig,
    LoRA,
    MissingEOS,
    PPOConfig,
    Pretrained,
    TextReward,
    Trainer,
    assemble,
    data,
    init_lora,
    language_model,
    load_encoder,
    load_model,
    read_rows,
    save_adapter,
    sft_loss,
    write_json,
)

N_REWARD = 3000  # sentences for the reward
N_PPO, N_TEST = 1200, 128  # openings for PPO and for the test
# Words only, and first one that begins a clause: few sentences go on well after a fragment.
OPENING = re.compile(
    r"(The|This|That|It|It's|There|There's|He|She|They|We|You|I|His|Her|Their|Its|My)"
    r"( [A-Za-z][A-Za-z'-]*)*"
)
ADAPTERS = LoRA(rank=16, alpha=32.0, targets=r"attn/(q|k|v|o)$")
ENDS = (".", "!", "?")  # tokens that end a response
PPO = PPOConfig(
    batch_size=32,
    epochs=2,
    minibatches=2,
    max_new_tokens=20,
    min_new_tokens=6,
    temperature=0.8,
    missing_eos=MissingEOS.PENALIZE,
    kl_coef=0.055,
    learning_rate=1.2e-3,
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
    updates: int = 20
    """Number of PPO updates."""
    opening: int = 4
    """Number of words of an opening."""
    ppo: PPOConfig = PPO
    """Settings of the PPO iteration."""


class HumanScore:
    """How much responses raise the human scores that are predicted for their openings.

    The prediction is a ridge regression on embeddings of the texts. Without the score of the
    opening, most of the variance between rewards would come from the openings.
    """

    def __init__(self, embed: Encoder, texts: list[str], scores: list[float], penalty: float = 3.0):
        self.embed, self.texts, self.scores, self.penalty = embed, texts, scores, penalty

    @functools.cached_property
    def weights(self) -> np.ndarray:
        """The weights `[D]` of the regression, which is fitted when it is first needed."""
        print("Learning the human scores", flush=True)
        x, y = _batched(self.embed, self.texts), np.asarray(self.scores, np.float32)
        gram = x.T @ x + self.penalty * np.eye(x.shape[1], dtype=np.float32)
        return np.linalg.solve(gram, x.T @ (y - y.mean()))

    def __call__(self, prompts: list[str], responses: list[str]) -> np.ndarray:
        """Return the predicted score of each text, less that of its opening."""
        texts = [p + r for p, r in zip(prompts, responses, strict=True)]
        return (self.embed(texts) - self.embed(list(prompts))) @ self.weights


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
    starts = [" ".join(w) for w in words if len(w) == opening]
    texts = [text for text in starts if OPENING.fullmatch(text)]
    prompts, test = texts[:N_PPO], texts[N_PPO:]
    known = set(prompts)
    test = [text for text in test if text not in known][:N_TEST]
    is_new = lambda row: not " ".join(row.sentence.split()).startswith(tuple(test))
    return [row for row in rows[:N_REWARD] if is_new(row)], prompts, test


def make_reward(settings: Settings, scored: list[assets.ScoredSentence]) -> TextReward:
    """Return the reward: predicted human scores, or similarity to a sentence."""
    embed = load_encoder(assets.minilm(), length=48)
    if settings.like is not None:
        return TextReward(LikenessReward(embed, settings.like))
    texts, scores = [row.sentence for row in scored], [row.score for row in scored]
    return TextReward(HumanScore(embed, texts, scores))


def assemble_adapters(
    policy: Pretrained,
    tokenizer,
    ppo: PPOConfig,
    adapters: LoRA,
    *,
    seed: int,
    critic: str = "shared",
    stop_tokens: Sequence[str] = (),
) -> Learner:
    """Return a learner of low-rank adapters, by default with a value head on the policy's trunk."""
    learner = assemble(
        policy, tokenizer, ppo, critic=critic, lora=adapters, stop_tokens=stop_tokens
    )
    # The published figures were made with this key for the adapters.
    fresh = init_lora(policy.params, jax.random.key(seed), adapters)
    return learner._replace(params={**learner.params, "policy": fresh})


def perplexity(
    model: Pretrained, tokenizer, openings: Sequence[str], responses: Sequence[str]
) -> float:
    """Return the perplexity of responses under a model, given their openings.

    It is `exp(-Σ log π(token) / n)` over all `n` tokens of the responses.
    """
    lm, size = language_model(model.config), 32
    nats = jax.jit(lambda p, *batch: (sft_loss(lm, p, *batch)[0], batch[-1].sum()))
    ids = [[tokenizer(text).input_ids for text in texts] for texts in (openings, responses)]
    rows = [first + rest for first, rest in zip(*ids, strict=True)]
    tokens, mask = data.pad(rows, length=max(map(len, rows)), pad_id=0, left=False)
    learned = mask & (np.arange(tokens.shape[1]) >= np.array([len(x) for x in ids[0]])[:, None])
    found = [
        nats(model.params, tokens[i : i + size], mask[i : i + size], learned[i : i + size])
        for i in range(0, len(rows), size)
    ]
    loss, count = np.array(found).T
    return float(np.exp((loss * count).sum() / count.sum()))


def judge(model: Pretrained, tokenizer, evaluation: Evaluation) -> dict[str, float]:
    """Return the figures of an evaluation and of the judges."""
    vader, responses = SentimentIntensityAnalyzer(), evaluation.responses
    return {
        "score": evaluation.metrics["eval/scores"],
        "judge": float(np.mean([vader.polarity_scores(text)["compound"] for text in responses])),
        "perplexity": perplexity(model, tokenizer, evaluation.prompts, responses),
        "distinct2": distinct2(responses),
        "length": evaluation.metrics["eval/length_mean"],
        "kl": evaluation.metrics["eval/kl"],
    }


def show_samples(trainer: Trainer, prompts: data.Prompts, count: int = 3) -> None:
    """Print some responses of the policy, before anything that takes longer."""
    batch = prompts.take(np.arange(trainer.learner.agent.config.batch_size) % len(prompts))
    texts = trainer.collector.collect(trainer.state, batch).texts
    for prompt, text in zip(batch.texts[:count], texts, strict=False):
        print(f"  {prompt} ...{text}", flush=True)


def main(settings: Settings) -> dict[str, float]:
    """Train, write the results to `settings.out`, print and return them."""
    start, out = time.perf_counter(), settings.out
    _folder_lock = open_folder(out)  # locked until the end
    scored, openings, test_openings = split(settings.seed, settings.opening)
    reward = make_reward(settings, scored)
    file = settings.model or assets.smollm2_gguf()
    policy, tokenizer = load_model(file)
    learner = assemble_adapters(
        policy, tokenizer, settings.ppo, ADAPTERS, seed=settings.seed, stop_tokens=ENDS
    )
    prompts, test = (learner.encode(read_rows(texts)) for texts in (openings, test_openings))
    loop = LoopConfig(updates=settings.updates, seed=settings.seed, save_every=0)
    trainer = Trainer(learner, prompts, reward, out=out / "ppo", loop=loop, settings=settings)
    show_samples(trainer, test)
    before = trainer.evaluate(test)
    history: list[dict[str, float]] = []
    state = trainer.run(on_update=history.append)
    after = trainer.evaluate(test)
    kind = policy.hf_config["model_type"]
    save_adapter(out / "adapter", state.policy, ADAPTERS, policy.config, kind, str(file))
    summary = {
        f"{name}/{when}": figure
        for when, evaluation in (("before", before), ("after", after))
        for name, figure in judge(policy, tokenizer, evaluation).items()
    } | {"seed": settings.seed, "time/total_s": time.perf_counter() - start}
    plot(history, out / "learning.png")
    write_json(out / "samples.json", {"before": before.rows(), "after": after.rows()})
    write_json(out / "summary.json", summary)
    report(summary, before, after)
    return summary


def report(summary: dict[str, float], before: Evaluation, after: Evaluation) -> None:
    """Print a table of the figures and some samples."""
    print(f"\n{'':32}{'before':>10}{'after':>10}")
    for name, label in {
        "score": "reward",
        "judge": "VADER compound (judge)",
        "perplexity": "perplexity (judge)",
        "distinct2": "distinct-2",
        "length": "tokens per response",
        "kl": "KL (nats per response)",
    }.items():
        print(f"{label:32}{summary[name + '/before']:10.3f}{summary[name + '/after']:10.3f}")
    print(f"{summary['time/total_s']:.0f} s\n")
    for first, last in zip(before.rows(5), after.rows(5), strict=True):
        print(f"{first['prompt']} ...")
        print(f"  before: {first['response'].strip()}\n  after:  {last['response'].strip()}")


if __name__ == "__main__":
    main(tyro.cli(Settings))
