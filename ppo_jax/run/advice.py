"""Warnings about the curves of a run, each with advice."""

from collections.abc import Callable
from typing import Any, NamedTuple

from ppo_jax.run.history import History


class Problem(NamedTuple):
    """What looks wrong in a run.

    Attributes:
      title: the problem in a few words.
      seen: a sentence with the figures of the run.
      advice: what to do about it.
    """

    title: str
    seen: str
    advice: str


class Check(NamedTuple):
    """A check of a run.

    Attributes:
      title: the problem in a few words.
      check: returns a sentence with the figures of a run that has the problem, otherwise None.
      advice: what to do about it.
    """

    title: str
    check: Callable[[History], str | None]
    advice: str


def find_problems(run: History) -> list[Problem]:
    """Check the curves of a run.

    Args:
      run: what the run has written.

    Returns:
      The problems.
    """
    found = [(check, check.check(run)) for check in CHECKS]
    return [Problem(check.title, seen, check.advice) for check, seen in found if seen is not None]


def _ends(run: History, name: str) -> tuple[float, float]:
    """Return the means of a metric over the first and the last tenth of the updates, or NaN."""
    _, values = run.series(name)
    if not len(values):
        return float("nan"), float("nan")
    count = max(len(values) // 10, 1)
    return float(values[:count].mean()), float(values[-count:].mean())


def _setting(run: History, name: str) -> Any:
    return (run.config["settings"].get("ppo") or {}).get(name)


def _kl_runs_away(run: History) -> str | None:
    kl, per_token = (_ends(run, f"objective/{name}")[1] for name in ("kl", "kl_per_token"))
    target = _setting(run, "kl_target")
    if per_token > 0.5 if target is None else kl > 2 * target:
        wanted = "" if target is None else f", with a target of {target:g}"
        return (
            f"At the end the KL is {kl:z.1f} nats per response, {per_token:z.2f} per token{wanted}."
        )
    return None


def _entropy_collapses(run: History) -> str | None:
    first, last = _ends(run, "objective/entropy")
    if last < 0.3 * first:
        return f"The entropy fell from {first:z.2f} to {last:z.2f} nats per token."
    return None


def _hits_the_limit(run: History) -> str | None:
    limit, (_, ended) = _setting(run, "max_new_tokens"), _ends(run, "response/ended")
    if ended < 0.5 and not _never_ends(run):
        return (
            f"At the end {1 - ended:.0%} of the responses have no end token within "
            f"max_new_tokens={limit}."
        )
    return None


def _never_ends(run: History) -> str | None:
    _, ended = run.series("response/ended")
    if len(ended) and ended.max() < 0.01:
        return f"In no update did more than {ended.max():.1%} of the responses end by themselves."
    return None


def _critic_explains_nothing(run: History) -> str | None:
    _, explained = _ends(run, "value/explained_variance")
    # Without a critic, all values are 0.
    if explained < 0.05 and run.series("value/mean")[1].any():
        return f"At the end the critic explains {explained:.0%} of the variance of the returns."
    return None


def _texts_repeat(run: History) -> str | None:
    updates, values = run.series("eval/distinct_2")
    if len(updates) > 1 and updates[0] < 0 and values[-1] < 0.6 * values[0]:
        return f"distinct-2 on held-out prompts fell from {values[0]:.2f} to {values[-1]:.2f}."
    return None


def _score_does_not_rise(run: History) -> str | None:
    name = "eval/scores" if len(run.series("eval/scores")[0]) > 1 else "objective/scores"
    _, values = run.series(name)
    first, last = (values[0], values[-1]) if name == "eval/scores" else _ends(run, name)
    if len(values) > 1 and last <= first:
        where = "on held-out prompts" if name == "eval/scores" else "in training"
        return f"The score {where} was {first:z.3f} at the beginning and is {last:z.3f} at the end."
    return None


def _held_out_loss_rises(run: History) -> str | None:
    _, losses = run.series("eval/loss")
    if len(losses) > 2 and losses[-1] > 1.02 * losses.min():
        return (
            f"The loss on held-out rows fell to {losses.min():.3f} and is {losses[-1]:.3f} at the "
            "end."
        )
    return None


def _updates_are_skipped(run: History) -> str | None:
    _, skipped = run.series("faults/skipped")
    if len(skipped):
        return f"{len(skipped)} updates were skipped because of faults."
    return None


CHECKS = (
    Check(
        "KL runs away",
        _kl_runs_away,
        "Read the samples: a high score far from the reference often means that the policy has "
        "found a weakness of the reward. Raise ppo.kl_coef, set ppo.kl_target, lower "
        "ppo.learning_rate, or take an earlier checkpoint.",
    ),
    Check(
        "Entropy collapses",
        _entropy_collapses,
        "The policy repeats a few responses and explores no more. Lower ppo.learning_rate or "
        "ppo.epochs, raise ppo.kl_coef or ppo.entropy_coef, or raise ppo.clip_high.",
    ),
    Check(
        "Responses hit the limit",
        _hits_the_limit,
        "They are cut in mid-sentence. Raise ppo.max_new_tokens, or let ppo.missing_eos lower "
        "their score.",
    ),
    Check(
        "Nothing ever ends",
        _never_ends,
        "The model may not know its end token. Use a model that was fine-tuned on texts with an "
        "end, name the token by stop_tokens, use chat for a chat model, or raise "
        "ppo.max_new_tokens.",
    ),
    Check(
        "The critic explains nothing",
        _critic_explains_nothing,
        "The advantages are then little better than without a critic. Start the critic from the "
        "reward model (critic), raise ppo.critic.learning_rate or ppo.vf_coef, or make more "
        "updates. If all scores of a batch are equal, there is nothing to explain: check the "
        "reward.",
    ),
    Check(
        "The texts repeat",
        _texts_repeat,
        "The responses share more and more phrases. Read the samples, raise ppo.kl_coef, or let "
        "the reward lower the score of repetition.",
    ),
    Check(
        "The score does not rise",
        _score_does_not_rise,
        "Check that the responses to a prompt differ in their scores, make more updates, raise "
        "ppo.learning_rate, or lower ppo.kl_coef.",
    ),
    Check(
        "The held-out loss rises",
        _held_out_loss_rises,
        "The model learns its training rows by heart. The model that was written is the best one, "
        "unless select_by=last; fewer epochs, a lower learning_rate or more data may give a better "
        "one.",
    ),
    Check(
        "Updates were skipped",
        _updates_are_skipped,
        "See the faults below; the reward or the numbers of the model failed there.",
    ),
)
