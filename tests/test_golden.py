"""Compare one PPO update with that of TRL 1.10, whose conventions tests/golden/README.md lists."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict

from ppo_jax.models import heads
from ppo_jax.models.io import pretrained, scorers
from ppo_jax.models.transformer import language_model
from ppo_jax.ops import losses
from ppo_jax.ops.clips import ratio_clip
from ppo_jax.ops.metrics import policy_metrics
from ppo_jax.ops.rewards import MissingEOS, ScoreAt, apply_missing_eos
from ppo_jax.ppo.estimators import gae
from ppo_jax.ppo.forward import forward_responses
from ppo_jax.ppo.loss import ppo_loss_fn
from ppo_jax.ppo.scoring import make_experience
from ppo_jax.ppo.update import ppo_update
from ppo_jax.types import Rollout, Scores

GOLDEN = Path(__file__).parent / "golden" / "trl_one_update"
META = json.loads((GOLDEN / "meta.json").read_text())["config"]
TEMPERATURE = META["temperature"] + 1e-7


@pytest.fixture(scope="module")
def step():
    return dict(np.load(GOLDEN / "step.npz"))


@pytest.fixture(scope="module")
def rollout(step):
    response_mask = jnp.asarray(~step["padding_mask"].astype(bool))
    tokens = jnp.asarray(np.concatenate([step["queries"], step["responses"]], axis=1), jnp.int32)
    ended = jnp.asarray((step["postprocessed_responses"] == META["eos_id"]).any(axis=1))
    # TRL masks every token of id 0, including sampled ones.
    return Rollout(
        tokens, tokens != META["pad_id"], response_mask, jnp.asarray(step["logprobs"]), ended
    )


@pytest.fixture(scope="module")
def models():
    policy, value = pretrained.load_policy(GOLDEN / "policy"), scorers.load_scorer(GOLDEN / "value")
    critic = heads.separate_critic(value.config)
    return language_model(policy.config), critic, {"policy": policy.params, "critic": value.params}


def test_logprobs_values_and_scores(step, rollout, models):
    model, critic, params = models
    real = np.asarray(rollout.response_mask)
    prompt_length = rollout.prompt_length
    reference = pretrained.load_policy(GOLDEN / "reference").params
    for policy, name in ((params["policy"], "logprobs"), (reference, "ref_logprobs")):
        both = {**params, "policy": policy}
        out = forward_responses(
            model,
            critic,
            both,
            rollout.tokens,
            rollout.mask,
            prompt_length,
            temperature=TEMPERATURE,
        )
        np.testing.assert_allclose(np.asarray(out.logprobs)[real], step[name][real], atol=1e-4)
    steps = ~step["padding_mask_p1"].astype(bool)
    np.testing.assert_allclose(np.asarray(out.values)[steps], step["values"][steps], atol=1e-5)

    scorer = scorers.load_scorer(GOLDEN / "reward")
    cut = jnp.asarray(np.concatenate([step["queries"], step["postprocessed_responses"]], axis=1))
    last = jnp.concatenate(
        [rollout.mask[:, :prompt_length], rollout.response_mask & (cut[:, prompt_length:] != 0)],
        axis=1,
    )
    scores = heads.reward_model(scorer.config)(scorer.params, cut, last)
    scores = apply_missing_eos(
        scores, rollout.ended, rule=MissingEOS.PENALIZE, penalty=META["missing_eos_penalty"]
    )
    np.testing.assert_allclose(scores, step["scores"], atol=1e-5)


@pytest.fixture(scope="module")
def experience(step, rollout):
    kl = jnp.asarray(step["logprobs"] - step["ref_logprobs"])
    scores = Scores(
        rollout.logprobs, jnp.asarray(step["ref_logprobs"]), kl, 0 * kl, jnp.asarray(step["values"])
    )
    return make_experience(
        rollout,
        scores,
        jnp.asarray(step["scores"]),
        kl_coef=META["kl_coef"],
        advantage_fn=gae(gamma=META["gamma"], lam=META["gae_lambda"]),
        score_at=ScoreAt.AFTER_LAST_TOKEN,
        unbiased=True,
    )


def test_rewards_advantages_and_returns(step, rollout, experience):
    experience, rewards = experience
    np.testing.assert_array_equal(experience.value_mask, ~step["padding_mask_p1"].astype(bool))
    np.testing.assert_allclose(rewards, step["rewards"], atol=1e-5)
    np.testing.assert_allclose(experience.advantages, step["advantages"], atol=1e-5)
    steps = np.asarray(experience.value_mask)
    np.testing.assert_allclose(
        np.asarray(experience.returns)[steps], step["returns"][steps], atol=1e-5
    )


@pytest.mark.slow
def test_parameters_after_the_step(step, experience, models):
    model, critic, params = models
    tx = optax.adamw(
        META["lr"],
        b1=META["adam_betas"][0],
        b2=META["adam_betas"][1],
        eps=META["adam_eps"],
        weight_decay=0.0,
    )
    clip = {"clip_low": META["clip"], "clip_high": META["clip"]}
    loss_fn = ppo_loss_fn(
        model,
        critic,
        functools.partial(
            losses.ppo_loss, **clip, value_clip=META["value_clip"], vf_coef=META["vf_coef"]
        ),
        functools.partial(policy_metrics, clip=functools.partial(ratio_clip, **clip)),
        temperature=TEMPERATURE,
    )
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    update = jax.jit(lambda s, e, k: ppo_update(s, e, k, loss_fn=loss_fn, epochs=1, minibatches=1))
    recorded = {
        name: jnp.asarray(step[name]) for name in ("advantages", "returns", "values", "logprobs")
    }
    state, metrics = update(state, experience[0].replace(**recorded), jax.random.key(0))
    after = {
        "policy": pretrained.load_policy(GOLDEN / "policy_after").params,
        "critic": scorers.load_scorer(GOLDEN / "value_after").params,
    }
    before, got, want = (flatten_dict(tree, sep="/") for tree in (params, state.params, after))
    for name in want:
        if not name.endswith(
            "attn/k/bias"
        ):  # its gradient is 0, and Adam turns the rounding noise into steps
            # Where a gradient is close to Adam's epsilon, the step is shorter than the learning
            # rate and depends on rounding.
            moved = np.abs(want[name] - before[name]) / META["lr"]
            whole = (moved < 1e-3) | (moved > 0.99)
            assert whole.mean() > 0.9, (name, whole.mean())
            np.testing.assert_allclose(got[name][whole], want[name][whole], atol=1e-6, err_msg=name)
            np.testing.assert_allclose(got[name], want[name], atol=5e-6, err_msg=name)
    assert (
        metrics["loss/value"] == pytest.approx(0.5153428316116333, abs=1e-5)
        and metrics["optimizer/steps"] == 1
    )
