"""Test the data split of the SmolLM2 experiment: test openings are in no training data."""

import pytest

from experiments import smollm2


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_test_openings_are_not_in_training_data(seed):
    scored, prompts, test = smollm2.split(seed, 5)
    assert len(test) == smollm2.N_TEST and len(prompts) > 0.8 * smollm2.N_PPO
    assert 0.99 * smollm2.N_REWARD < len(scored) <= smollm2.N_REWARD
    assert not set(test) & set(prompts)
    assert not [row for row in scored for opening in test if row.sentence.startswith(opening)]
