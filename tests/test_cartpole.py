"""Test the CartPole experiment: it learns, and it treats a time limit differently from a fall."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

from experiments import cartpole


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """Train for 41,000 steps, which is enough to learn a lot but not to solve the task."""
    settings = cartpole.Settings(out=tmp_path_factory.mktemp("cartpole") / "run", updates=20)
    return settings, cartpole.main(settings)


@pytest.mark.slow
def test_learns(short_run):
    _, summary = short_run
    assert summary["return/mean_last_100"] > 100  # a random policy gets about 22


def test_writes_its_results(short_run):
    settings, summary = short_run
    assert json.loads((settings.out / "summary.json").read_text()) == summary
    assert summary.keys() == {
        "return/mean_last_100",
        "time/total_s",
        "seed",
        "episodes",
        "env_steps",
    }
    assert summary["env_steps"] == settings.envs * settings.steps * settings.updates
    assert (settings.out / "returns.png").read_bytes().startswith(b"\x89PNG")


def test_never_overwrites_a_result(tmp_path, monkeypatch):
    (tmp_path / "summary.json").write_text("{}")
    monkeypatch.setattr(
        cartpole, "train", lambda *_: pytest.fail("trained before checking the folder")
    )
    with pytest.raises(SystemExit, match="already holds"):
        cartpole.main(cartpole.Settings(out=tmp_path))


@pytest.mark.parametrize("wrong", [{"minibatches": 3}, {"updates": 3}])
def test_invalid_settings_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="=3"):
        cartpole.Settings(out=tmp_path, **wrong)


def test_only_a_time_limit_bootstraps_from_the_value_of_the_final_state():
    """In three environments, the first of two steps falls, reaches a time limit, or goes on.

    The value of a state is its first number.
    """
    state = TrainState.create(
        apply_fn=lambda _, obs: (None, obs[..., 0]), params={}, tx=optax.identity()
    )
    obs = jnp.broadcast_to(jnp.array([[2.0], [3.0]]), (3, 2, 1))
    steps = cartpole.Steps(
        obs=obs,
        actions=jnp.zeros((3, 2), int),
        logprobs=jnp.zeros((3, 2)),
        values=obs[..., 0],
        rewards=jnp.ones((3, 2)),
        terminated=jnp.array([[True, False], [False, False], [False, False]]),
        truncated=jnp.array([[False, False], [True, False], [False, False]]),
        final_obs=jnp.full((3, 2, 1), 8.0),
        scores=jnp.ones((3, 2)),
    )
    world = cartpole.World(env_state=None, obs=jnp.full((3, 1), 4.0), score=jnp.zeros(3))

    returns = cartpole.estimate(state, steps, world, gamma=0.5, lam=1.0).returns

    second = 1 + 0.5 * 4  # bootstrapped from the current state of the world
    np.testing.assert_allclose(
        returns, [[1, second], [1 + 0.5 * 8, second], [1 + 0.5 * second, second]]
    )


def test_episodes_are_ordered_by_the_time_they_ended():
    done = np.array(
        [[[False, True], [True, False]]]
    )  # `[updates, B, R]`; an episode of the second environment ends first
    scores = np.array([[[1.0, 2.0], [7.0, 1.0]]])
    ends, returns = cartpole.finished_episodes({"done": done, "scores": scores})
    np.testing.assert_array_equal(ends, [2, 3])
    np.testing.assert_array_equal(returns, [7, 2])


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run(tmp_path):
    settings = cartpole.Settings(
        out=tmp_path, envs=2, steps=250, updates=2, epochs=1, minibatches=1, width=4
    )
    first, again, other = (
        cartpole.train(jax.random.key(seed), settings)[1]["scores"] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
