"""Methods as functions: those that settings name, and a user's own in their place."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import full_trainer, small_problem, tiny_config

from ppo_jax.errors import SettingError
from ppo_jax.models.config import NormKind
from ppo_jax.ops import kl
from ppo_jax.ops.masked import masked_mean
from ppo_jax.ops.policy_losses import dis_loss
from ppo_jax.ops.score_rules import ScoreAt
from ppo_jax.ppo.choices import Advantage, KLEstimator, KLLoss, Loss, Weighting
from ppo_jax.ppo.estimators import gae
from ppo_jax.ppo.loss import ppo_loss_fn
from ppo_jax.ppo.loss_terms import loss_terms
from ppo_jax.ppo.methods import clipped_ppo
from ppo_jax.ppo.presets import PRESETS
from ppo_jax.ppo.scoring import make_experience, score_rollout
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.ppo.unread import check_loss_fn, check_replaced
from ppo_jax.run.files import read_json, write_json
from ppo_jax.run.resume import read_config
from ppo_jax.run.serialize import from_json, to_json
from ppo_jax.run.settings import Faults
from ppo_jax.types import Rollout, Scores


@pytest.mark.parametrize("kind", [Advantage, KLEstimator, Loss, Weighting])
def test_a_name_stands_in_json_and_finds_its_method(kind):
    for member in kind:
        assert kind(member.value) is member and isinstance(member.value, str)
        assert json.dumps(to_json(member)) == f'"{member.value}"'
        assert repr(member) == f"<{kind.__name__}.{member.name}: {member.value!r}>"
        assert member.function is not None


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: PPOConfig(advantage="grp"),
            "advantage must be gae, .* or batch_mean, not 'grp'",
        ),
        (lambda: PPOConfig(loss=Advantage.GRPO), "loss must be ppo, .* not 'grpo'"),
        (lambda: PPOConfig(weighting=["token"]), "weighting must be token, "),
        (lambda: Faults(reward="skp"), "faults.reward must be stop or skip, not 'skp'"),
        (lambda: tiny_config(norm="batch"), "norm must be layer, .* not 'batch'"),
    ],
)
def test_a_choice_that_does_not_exist_is_refused_with_those_that_do(make, message):
    with pytest.raises(SettingError, match=message):
        make()


def test_the_name_of_a_choice_stands_for_it():
    config = PPOConfig(
        loss="cispo", weighting="sequence", advantage="grpo", group_size=2, score_at="last_index"
    )
    same = PPOConfig(
        loss=Loss.CISPO,
        weighting=Weighting.SEQUENCE,
        advantage=Advantage.GRPO,
        group_size=2,
        score_at=ScoreAt.LAST_INDEX,
    )
    assert config == same and hash(config) == hash(same)
    assert tiny_config(norm="rms").norm is NormKind.RMS


@functools.cache
def rollout_and_scores():
    keys = jax.random.split(jax.random.key(0), 6)
    mask = jnp.arange(5)[None, :] < jnp.array([[5], [3], [1], [4]])
    tokens = jax.random.randint(keys[0], (4, 7), 1, 97)
    seen = jnp.concatenate([jnp.ones((4, 2), bool), mask], axis=1)
    groups = jnp.array([0, 0, 1, 1])
    rollout = Rollout(tokens, seen, mask, jnp.zeros((4, 5)), mask[:, 0], groups)
    return rollout, Scores(*(jax.random.normal(k, (4, 5)) for k in keys[1:]))


def experience(advantage_fn, **options):
    rollout, scores = rollout_and_scores()
    options = {"kl_coef": 0.1, "whiten_advantages": False} | options
    return make_experience(rollout, scores, jnp.arange(4.0), advantage_fn=advantage_fn, **options)[
        0
    ]


def test_an_estimator_gets_the_rollout_and_the_scores():
    def estimate(rewards, values, mask, *, rollout, scores):
        assert rollout is rollout_and_scores()[0] and scores is rollout_and_scores()[1]
        total = jnp.where(mask, rewards, 0).sum(axis=1, keepdims=True)
        return jnp.broadcast_to(total, mask.shape), values + total

    made = experience(estimate)
    expected = (
        jnp.arange(4.0)
        - 0.1 * jnp.where(made.response_mask, rollout_and_scores()[1].kl, 0).sum(axis=1)
    )[:, None]
    np.testing.assert_allclose(
        made.advantages, jnp.where(made.response_mask, expected, 0), rtol=1e-5
    )
    np.testing.assert_allclose(
        made.returns, jnp.where(made.value_mask, made.values + expected, 0), rtol=1e-5
    )


def test_the_settings_estimator_is_gae_with_their_discounts():
    config = PPOConfig(gamma=0.9, lam=0.8)
    named, plainly = (
        experience(f) for f in (config.advantage.function(config), gae(gamma=0.9, lam=0.8))
    )
    np.testing.assert_array_equal(named.advantages, plainly.advantages)
    assert (named.advantages != experience(gae(gamma=1.0, lam=0.8)).advantages).any()


def test_an_estimator_of_a_wrong_shape_is_refused():
    def estimate(rewards, values, mask, *, rollout, scores):
        return rewards[:, :1], values[:, :1]

    with pytest.raises(AssertionError):
        experience(estimate)


def scored(kl_estimator):
    model, critic, params, batch = small_problem()
    reference = jax.tree.map(lambda x: x * 1.1, params["policy"])
    rollout = Rollout(
        batch.tokens, batch.mask, batch.response_mask, batch.logprobs, batch.response_mask[:, 0]
    )
    score = functools.partial(score_rollout, model, critic, temperature=0.7)
    score = functools.partial(score, kl_estimator=kl_estimator)
    return jax.jit(score)(params, reference, rollout).kl


@pytest.mark.slow
def test_an_estimator_that_reads_logits_may_be_a_partial_function():
    exact = scored(kl.kl_full)
    np.testing.assert_array_equal(scored(functools.partial(kl.kl_full, temperature=1.0)), exact)
    assert (exact >= 0).all() and (exact > 0).any()
    np.testing.assert_allclose(exact.sum(), scored(kl.kl_k1).sum(), rtol=0.5)


@pytest.mark.slow
def test_a_kl_estimator_of_a_wrong_shape_is_refused():
    with pytest.raises(AssertionError):
        scored(lambda logprobs, ref_logprobs: (logprobs - ref_logprobs).sum(axis=1))


@pytest.mark.slow
def test_a_run_from_before_a_setting_goes_on(tmp_path):
    whole = full_trainer(tmp_path / "whole", updates=2, eval_every=0).run()
    full_trainer(tmp_path / "half", updates=1, eval_every=0).run()
    config = read_json(tmp_path / "half/config.json")
    for name in ("advantage", "loss", "pack"):
        del config["settings"]["ppo"][name]
    write_json(tmp_path / "half/config.json", config)
    half = full_trainer(tmp_path / "half", updates=2, eval_every=0, resume="yes").run()
    jax.tree.map(np.testing.assert_array_equal, half.train.params, whole.train.params)


def test_every_loss_of_the_settings_has_the_gradient_of_its_policy_loss():
    x, values, advantages, returns, entropies, old = jax.random.normal(jax.random.key(3), (6, 4, 5))
    mask = rollout_and_scores()[0].response_mask
    config = PPOConfig(vf_coef=0.5, value_clip=None, clip_high=0.3)

    def total(x, values, loss):
        terms = loss(
            x,
            values,
            entropies,
            old_logprobs=old,
            old_values=values,
            advantages=advantages,
            returns=returns,
            mask=mask,
            value_mask=mask,
            aggregate=masked_mean,
            value_aggregate=masked_mean,
        )
        return terms[0]

    slopes = {}
    for member in Loss:
        loss, metrics = member.function(config)
        if "clip_low" in member.reads:
            bounds = metrics.keywords["clip"].keywords
            assert bounds["clip_low"] == 0.2 and bounds["clip_high"] == 0.3
        else:
            assert metrics.keywords == {"clip": None}
        slopes[member], of_values = jax.grad(total, (0, 1))(x, values, loss)
        expected = np.where(mask, 0.5 * (values - returns), 0) / mask.sum()
        np.testing.assert_allclose(of_values, expected, rtol=1e-5, atol=1e-7)
        assert np.isfinite(slopes[member]).all() and np.any(slopes[member])
    clipped = functools.partial(dis_loss, clip_low=0.2, clip_high=0.3)
    np.testing.assert_array_equal(slopes[Loss.DIS], jax.grad(clipped)(x, old, advantages, mask))
    assert len({np.asarray(slope).tobytes() for slope in slopes.values()}) == len(Loss)


def test_every_advantage_of_the_settings():
    made = {
        kind: experience(kind.function(PPOConfig(gamma=0.9)), whiten_advantages=False)
        for kind in Advantage
    }
    mask = made[Advantage.VAPO].response_mask
    sums = made[Advantage.MONTE_CARLO].returns
    np.testing.assert_array_equal(made[Advantage.MONTE_CARLO].advantages, sums)
    np.testing.assert_allclose(made[Advantage.VAPO].returns, sums, rtol=1e-4, atol=1e-5)
    short = np.where(mask, made[Advantage.VAPO].advantages, 0)
    one_step = experience(gae(gamma=0.9, lam=0.0)).advantages  # 0.05 · 5 < 1, so λ is 0
    np.testing.assert_allclose(short, one_step, rtol=1e-5)


def test_the_range_of_clip_low_is_that_of_the_loss():
    """It bounds a log-ratio, a KL or a weight in some losses, and a ratio in the others."""
    for member in [loss for loss in Loss if "clip_low" in loss.reads]:
        if member in (Loss.GMPO, Loss.DPPO_KL, Loss.CISPO):
            member.function(PPOConfig(loss=member, clip_low=1.5))
        else:
            with pytest.raises(SettingError, match=f"0 .. 1 with loss={member.value}, but is 1.5"):
                PPOConfig(loss=member, clip_low=1.5)
        with pytest.raises(SettingError, match="clip_low must not be negative"):
            PPOConfig(loss=member, clip_low=-0.1)


class Recorder:
    """Settings that note which of them are read."""

    def __init__(self, config):
        self.config, self.names = config, set()

    def __getattr__(self, name):
        self.names.add(name)
        return getattr(self.config, name)


@pytest.mark.parametrize("kind", Advantage)
def test_an_advantage_declares_the_settings_that_it_reads(kind):
    config = Recorder(PPOConfig())
    experience(kind.function(config))
    assert config.names == set(kind.reads) - {"values", "groups"}


@pytest.mark.parametrize("kind", Loss)
def test_a_loss_declares_the_settings_that_it_reads(kind):
    loss, _ = kind.function(PPOConfig())
    inner = loss.keywords.get("policy_loss")
    bound = {**loss.keywords, **getattr(inner, "keywords", {})}
    assert {x for x in Loss.settings() if x in bound} == set(kind.reads) - {"any clip_low"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"loss": Loss.CISPO, "dual_clip": 3.0}, "dual_clip=3.0 has no effect with loss=cispo; "),
        ({"loss": Loss.SAPO, "clip_high": 3.0}, "clip_high=3.0 has no effect with loss=sapo; "),
        ({"advantage": Advantage.VAPO, "lam": 0.5}, "with advantage=vapo; leave it at 0.95."),
        ({"advantage": Advantage.GRPO, "group_size": 2, "gamma": 0.9}, "gamma=0.9 has no effect"),
        ({"kl_loss": KLLoss.K3}, "kl_loss=k3 has no effect with kl_loss_coef=0.0; leave it at k2"),
        ({"overlong_penalty": 3.0}, "overlong_penalty=3.0 has no effect with overlong_buffer=non"),
        ({"kl_horizon": 9.0}, "kl_horizon=9.0 has no effect with kl_target=none"),
        ({"missing_eos_penalty": 2.0}, "missing_eos_penalty=2.0 has no effect with missing_eos=k"),
        ({"importance_range": (0.0, 2.0)}, "importance_range=.* has no effect with importance=no"),
    ],
)
def test_a_setting_that_nothing_reads_is_refused(changes, message):
    with pytest.raises(SettingError, match=message):
        PPOConfig(**changes)


def test_a_stored_run_may_have_settings_that_nothing_reads(tmp_path):
    """Older versions accepted them; the run goes on without them."""
    ppo = to_json(PPOConfig(advantage=Advantage.GRPO, group_size=2)) | {"gamma": 0.9}
    stored = {"settings": {"ppo": ppo, "command": {"ppo": ppo}}, "hashes": {}, "processes": []}
    write_json(tmp_path / "config.json", stored)
    settings = read_config(tmp_path)["settings"]
    for found in (settings["ppo"], settings["command"]["ppo"]):
        assert from_json(PPOConfig, found).gamma == 1.0


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": Loss.CISPO},
        {"dual_clip": 3.0},
        {"entropy_coef": 0.001},
        {"entropy_target": 0.2},
        {"kl_loss_coef": 10.0},
        {"positive_nll_coef": 0.1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_loss_of_your_own_must_hold_what_the_settings_ask_for(changes):
    model, critic, *_ = small_problem()
    make = functools.partial(ppo_loss_fn, model, critic, temperature=1.0)
    config = PPOConfig(**changes)
    check_loss_fn(PPOConfig(), make(*clipped_ppo(PPOConfig())))
    for loss_fn in (make(*clipped_ppo(PPOConfig())), lambda params, batch, counts: None):
        with pytest.raises(SettingError, match=f"{next(iter(changes))}=.* has no effect with this"):
            check_loss_fn(config, loss_fn)
    if config.entropy_target is None:
        check_loss_fn(config, make(*config.loss.function(config), terms=loss_terms(config)))


def test_functions_in_files_replace_what_a_setting_was_changed_for():
    check = functools.partial(check_replaced, usual=PRESETS["sao"])
    check(PRESETS["sao"], advantage="m.py:f", loss="m.py:g")
    for changes, given, message in (
        ({"loss": "cispo"}, {"loss": "m.py:g"}, "ppo.loss=cispo has no effect with loss=m.py:g"),
        ({"clip_high": 3.0}, {"loss": "m.py:g"}, "ppo.clip_high=3.0 has no effect with loss=m.py"),
        ({"gamma": 0.9}, {"advantage": "m.py:f"}, "ppo.gamma=0.9 has no effect with advantage=m"),
    ):
        with pytest.raises(SettingError, match=message):
            check(dataclasses.replace(PRESETS["sao"], **changes), **given)
