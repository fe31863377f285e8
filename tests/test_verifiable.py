"""Test the arithmetic experiment: held-out questions are not trained on; answers are checked."""

import re

import reasoning_gym

from experiments import verifiable


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
