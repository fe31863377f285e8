"""Test the SmolLM2 experiment: its data split and its rewards."""

import pytest

from experiments import smollm2


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_test_openings_are_not_in_training_data(seed):
    scored, prompts, test = smollm2.split(seed, 5)
    assert len(test) == smollm2.N_TEST and len(prompts) > 0.8 * smollm2.N_PPO
    assert 0.99 * smollm2.N_REWARD < len(scored) <= smollm2.N_REWARD
    assert not set(test) & set(prompts)
    assert not [row for row in scored for opening in test if row.sentence.startswith(opening)]


def test_rewards_prefer_positive_texts(tmp_path):
    scored, _, _ = smollm2.split(0, 5)
    for like in (None, "a wonderful film"):
        reward = smollm2.make_reward(smollm2.Settings(out=tmp_path, like=like), scored[:300])
        good, bad = reward.function(["The film is", "The film is"], [" wonderful", " awful"])
        assert good > bad
