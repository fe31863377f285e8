"""Test the ablations: the task, the age of answers, the exact gradients, and each command."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from experiments.ablations import __main__ as command
from experiments.ablations import age, report
from experiments.ablations.gradients import gradient_errors
from experiments.ablations.task import Task, end_answers, prompts, share_of_rule
from ppo_jax import Rollout, SettingError

TASK = Task((2, 4, 6))


def rollout(tokens: np.ndarray) -> Rollout:
    """Return answers of full length to prompts of one token."""
    real = np.ones(tokens.shape, bool)
    x = np.ones((len(tokens), tokens.shape[1] - 1))
    return jax.tree.map(jnp.asarray, Rollout(tokens, real, real[:, 1:], -x, real[:, 0]))


def test_scores_count_the_tokens_that_follow_the_rule():
    tokens = np.random.default_rng(0).integers(0, 8, (64, 7))
    tokens[:, :1] = prompts(64)
    ended = jax.device_get(end_answers(jax.random.key(0), rollout(tokens), TASK))
    lengths = ended.response_mask.sum(axis=1)
    assert set(lengths) == {2, 4, 6}
    for row, length, found in zip(tokens, lengths, share_of_rule(ended), strict=True):
        follows = [(a < 4) != (b < 4) for a, b in itertools.pairwise(row[: 1 + length])]
        assert found == pytest.approx(np.mean(follows))
    np.testing.assert_array_equal(ended.mask[:, 1:], ended.response_mask)
    np.testing.assert_array_equal(ended.logprobs, -1.0 * ended.response_mask)


def test_interval_is_that_of_student():
    values = np.random.default_rng(0).normal(size=(8, 30))
    mean, low, high = report.final(values)
    last = values[:, -3:].mean(axis=1)
    expected = stats.t.interval(0.95, 7, loc=last.mean(), scale=stats.sem(last))
    np.testing.assert_allclose((mean, low, high), (last.mean(), *expected))


def test_gradients_of_the_penalties():
    """On-policy, k2 in the loss is k1 in the reward; k3 and k1 in the loss are something else."""
    errors = gradient_errors(seed=0)
    assert errors.pop("k3 in the loss") > 0.1
    assert errors.pop("k1 in the loss") == pytest.approx(1)  # Its own gradient is 0.
    assert len(errors) == 4 and max(errors.values()) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("study", "variants"),
    [
        ("critic", ("no_token_mean",)),
        ("kl", ("k3_loss",)),
        ("age", ("tis",)),
        ("groups", ("grpo",)),
    ],
)
def test_command(study, variants, tmp_path):
    settings = command.Settings(
        study=command.Study(study),
        out=tmp_path / "run",
        variants=variants,
        seeds=2,
        updates=6,
        rows=16,
        longest=6,
    )
    summary = command.main(settings)
    assert json.loads((settings.out / "summary.json").read_text()) == summary
    curves = np.load(settings.out / "curves.npz")
    labels = [f"tis_{i}" for i in age.AGES] if study == "age" else variants
    for name in labels:
        low, mean, high = (summary[f"score/{name}/{end}"] for end in ("low", "mean", "high"))
        assert low <= mean <= high and 0 <= mean <= 1
        score, learned = (curves[f"{name}/{x}"] for x in ("score", "learned_score"))
        old = int(name.split("_")[1]) if study == "age" else 0
        # An update learns from the answers that were sampled so many updates ago.
        np.testing.assert_allclose(learned[:, old:], score[:, : max(0, 6 - old)], rtol=1e-5)
    assert {"curves.png", "table.md"} <= {x.name for x in settings.out.iterdir()}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seeds": 1}, "seeds must be at least 2"),
        ({"rows": 12}, "multiple of 8"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"variants": ("k9",)}, "k1_reward, k2_loss"),
        ({"seed": -1}, "seed must lie in"),
    ],
)
def test_invalid_settings_are_refused(wrong, message, tmp_path):
    with pytest.raises(SettingError, match=message):
        command.Settings(study=command.Study.KL, out=tmp_path, **wrong)
