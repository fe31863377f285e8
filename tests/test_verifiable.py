"""Test the arithmetic experiment: held-out questions are not trained on; answers are checked."""

import re

import pytest
import reasoning_gym
from helpers import tiny_policy, word_tokenizer

from experiments import verifiable
from ppo_jax.models.io import pretrained
from ppo_jax.run.files import read_lines


def test_held_out_questions_are_not_in_the_training_set():
    train, test = verifiable.questions(seed=0)
    assert len(test) == verifiable.N_HELD_OUT and len(train) > 100
    seen, held_out = ({row["prompt"] for row in rows} for rows in (train, test))
    assert len(held_out) == len(test) and not seen & held_out
    swapped = {re.sub(r"(\d+) \+ (\d+)", r"\2 + \1", question) for question in held_out}
    assert swapped - held_out and not seen & swapped
    assert verifiable.questions(seed=0) == (train, test) != verifiable.questions(seed=1)


def test_the_reward_agrees_with_the_task():
    task = reasoning_gym.create_dataset("chain_sum", size=20, seed=5, **verifiable.TASK)
    for entry in task:
        row = [{"answer": entry["answer"]}]
        assert (
            verifiable.correct([""], [f" {entry['answer']}."], row)
            == [1.0]
            == [task.score_answer(entry["answer"], entry)]
        )
        assert (
            verifiable.correct([""], [f" {entry['answer']}9"], row)
            == verifiable.correct([""], [" none"], row)
            == [0.0]
        )


@pytest.mark.slow
@pytest.mark.parametrize("method", verifiable.Method)
def test_each_method_trains(tmp_path, method):
    """Only the critic of SAO has an optimizer of its own, and only GRPO samples groups."""
    pretrained.save_policy(tmp_path / "model", tiny_policy(positions=64), word_tokenizer())
    summary = verifiable.main(
        verifiable.Settings(
            out=tmp_path / "run", model=str(tmp_path / "model"), method=method, updates=1
        )
    )
    assert 0 <= summary["accuracy/after"] <= 1
    (row,) = read_lines(tmp_path / "run/ppo/metrics.jsonl")
    assert ("critic/steps" in row) == (method is verifiable.Method.SAO)
    assert ("groups/uninformative" in row) == (method is verifiable.Method.GRPO)
