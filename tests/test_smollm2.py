"""Test the SmolLM2 experiment: its data split and its rewards."""

import jax
import numpy as np
import pytest
from helpers import tiny_policy, word_tokenizer

from experiments import smollm2
from ppo_jax.models.transformer import language_model


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_test_openings_are_not_in_training_data(seed):
    scored, prompts, test = smollm2.split(seed, 4)
    assert len(test) == smollm2.N_TEST and len(prompts) > 0.8 * smollm2.N_PPO
    assert 0.99 * smollm2.N_REWARD < len(scored) <= smollm2.N_REWARD
    assert not set(test) & set(prompts)
    assert not [row for row in scored for opening in test if row.sentence.startswith(opening)]


@pytest.mark.slow
def test_rewards_prefer_positive_texts(tmp_path):
    scored, _, _ = smollm2.split(0, 4)
    for like in (None, "a wonderful film"):
        reward = smollm2.make_reward(smollm2.Settings(out=tmp_path, like=like), scored[:300])
        good, bad = reward.function(["The film is", "The film is"], [" wonderful", " awful"])
        assert good > bad


def test_perplexity_is_that_of_the_tokens_of_the_responses():
    model, tokenizer = tiny_policy(layers=1, init_std=0.3), word_tokenizer()
    openings, responses = ["a b", "c"] * 20, [" d e f", " g"] * 20
    hidden_and_logits = language_model(model.config)
    nats = []
    for opening, response in zip(openings[:2], responses[:2], strict=True):
        ids = np.array([tokenizer(opening + response).input_ids])
        hidden, _ = hidden_and_logits.hidden(model.params, ids, np.ones(ids.shape, bool))
        logprobs = jax.nn.log_softmax(hidden_and_logits.logits(model.params, hidden)[0])
        start = len(tokenizer(opening).input_ids)
        nats += [-float(logprobs[t - 1, ids[0, t]]) for t in range(start, ids.shape[1])]
    found = smollm2.perplexity(model, tokenizer, openings, responses)
    assert found == pytest.approx(np.exp(np.mean(nats)), rel=1e-5)
