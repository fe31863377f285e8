"""Evaluate a policy on held-out prompts: scores, KL, length, diversity and the texts."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax import data
from ppo_jax.distributed import placement
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.ppo.state import PPOState
from ppo_jax.ppo.task_scores import clip_scores, scores_by_rules
from ppo_jax.reward_functions import TaskScores
from ppo_jax.run.collection import Collector
from ppo_jax.types import Rollout


class Evaluation(NamedTuple):
    """The responses of a policy to `n` held-out prompts.

    Attributes:
      metrics: means over the responses, by the names `eval/*`.
      responses: the `n` responses as texts.
      scores: `[n]` float32, their scores; NaN for a response that the reward could not score.
      prompts: the `n` prompts as texts.

    Example:
      >>> Evaluation({"eval/scores": 0.5}, [" b"], np.array([0.5]), ["a"]).rows()
      [{'prompt': 'a', 'response': ' b', 'score': 0.5}]
    """

    metrics: dict[str, float]
    responses: list[str]
    scores: np.ndarray
    prompts: list[str]

    def rows(self, count: int | None = None) -> list[dict[str, Any]]:
        """Prompt, response and score of the first `count` responses, as in the files."""
        columns = (self.prompts, self.responses, self.scores)
        return [
            {"prompt": prompt, "response": text, "score": None if np.isnan(x) else float(x)}
            for prompt, text, x in zip(*(column[:count] for column in columns), strict=True)
        ]


def optimized_scores(config: PPOConfig, scores: np.ndarray, rollout: Rollout) -> np.ndarray:
    """Apply the rules of the settings for endings, length and clipping, as training does.

    Scores are not scaled, so that those of several evaluations can be compared. Where training
    scales them, it clips the scaled ones, and they are not clipped here.

    Args:
      config: the settings.
      scores: `[n]` float32, the scores of the task.
      rollout: the `n` responses.

    Returns:
      `[n]` float32.
    """
    final = scores_by_rules(config, rollout, jnp.asarray(scores))
    return np.asarray(final if config.scale_scores else clip_scores(config, final))


def distinct_2(texts: Sequence[str]) -> float:
    """Return the share of pairs of neighbouring words that are distinct, over all texts.

    Repetition within and between texts lowers it. It is NaN if no text has two words.

    Source:
      Li et al. 2016 (https://arxiv.org/abs/1510.03055).

    Example:
      >>> distinct_2(["a b a b", "b a"])
      0.5
    """
    pairs = [pair for text in texts for pair in pairwise(text.split())]
    return len(set(pairs)) / len(pairs) if pairs else float("nan")


def evaluation_metrics(
    scores: np.ndarray,
    lengths: np.ndarray,
    responses: Sequence[str],
    kl: np.ndarray | None,
    parts: Sequence[Mapping[str, np.ndarray]] = (),
) -> dict[str, float]:
    """Compute the metrics `eval/*` of responses.

    Args:
      scores: `[n]` float32; responses whose score is NaN are left out of the mean.
      lengths: `[n]` int, in tokens.
      responses: the `n` texts.
      kl: `[n]` float32, log-ratios to the reference in nats, or None without a reference.
      parts: for each batch, the named parts of its scores; NaN is left out of the means.

    Returns:
      `eval/scores` and its standard error `eval/scores_error`, `eval/kl` if there is a reference,
      `eval/length_mean`, `eval/distinct_2`, and `eval/reward/NAME` for each part.
    """
    known = scores[~np.isnan(scores)].astype(np.float64)
    mean = lambda x: float(np.mean(x, dtype=np.float64)) if len(x) else float("nan")
    spread = float(known.std(ddof=1)) if len(known) > 1 else float("nan")
    return {
        "eval/scores": mean(known),
        "eval/scores_error": spread / max(len(known), 1) ** 0.5,
        "eval/length_mean": mean(lengths),
        **({} if kl is None else {"eval/kl": mean(kl)}),
        "eval/distinct_2": distinct_2(responses),
        **{f"eval/{name}": x for name, x in _joined(parts).part_means().items()},
    }


def _joined(parts: Sequence[Mapping[str, np.ndarray]]) -> TaskScores:
    """Return scores with the parts of several batches; a batch may lack some of them."""
    names = dict.fromkeys(name for batch in parts for name in batch)
    values = {name: [x[name] for x in parts if name in x] for name in names}
    return TaskScores(np.empty(0), parts={n: np.concatenate(x) for n, x in values.items()})


def evaluate(
    collector: Collector, state: PPOState, prompts: data.Prompts, *, seed: int
) -> Evaluation:
    """Sample one response to each held-out prompt, with the same keys at every evaluation.

    The last batch is filled up with the first prompts, so that only one shape is compiled; their
    second responses are dropped. The keys are not those of training, which an evaluation therefore
    does not change.

    Args:
      collector: samples and scores a batch.
      state: its policy is evaluated.
      prompts: `n` held-out prompts.
      seed: seed of the run.

    Returns:
      The responses with the metrics of `evaluation_metrics`; see `optimized_scores`.

    Raises:
      Fault: if the reward fails or a number is not finite.
    """
    state = state.replace(key=jax.random.key(seed + 1), pending=())
    config = collector.learner.agent.config
    size = config.batch_size
    scores, lengths, kl = (np.empty(len(prompts), np.float32) for _ in range(3))
    responses: list[str] = []
    parts: list[dict[str, np.ndarray]] = []
    for first in range(0, len(prompts), size):
        state = state.replace(update=jnp.int32(first // size))
        state = placement.place(state, collector.learner.mesh)
        rows = np.arange(first, first + size) % len(prompts)
        batch = collector.collect(state, prompts.take(rows))
        # Neighbouring rows answer different prompts here.
        groups = rows.astype(np.int32)
        batch = batch._replace(host_rollout=batch.host_rollout.replace(groups=groups))
        keep = min(size, len(prompts) - first)
        at = slice(first, first + keep)
        mask, computed = batch.host_rollout.response_mask, placement.to_host(batch.scores)
        task = collector.task_scores(batch)
        scores[at] = optimized_scores(config, task.total(mask), batch.host_rollout)[:keep]
        parts.append({name: x[:keep] for name, x in (task.parts or {}).items()})
        lengths[at] = mask.sum(axis=1)[:keep]
        kl[at] = (computed.logprobs - computed.ref_logprobs).sum(axis=1)[:keep]
        responses.extend(batch.texts[:keep])
    metrics = evaluation_metrics(scores, lengths, responses, kl, parts)
    return Evaluation(metrics, responses, scores, prompts.texts)
