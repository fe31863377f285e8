"""Test the random-walks experiment: its task against plain Python, and training."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import randomwalks as rw
from ppo_jax.errors import SettingError

SMALL = rw.Settings(
    out=Path("unused"),
    walks=200,
    sft_steps=60,
    updates=20,
    samples=8,
    ppo=dataclasses.replace(rw.PPO, batch_size=160, learning_rate=1e-3),
)
SHORT = dataclasses.replace(SMALL, sft_steps=8, updates=2, seeds=2)


@pytest.fixture(scope="module")
def graphs():
    """Return eight tasks, stacked: `[8, ...]`."""
    return jax.device_get(jax.jit(jax.vmap(rw.draw_graph))(jax.random.split(jax.random.key(0), 8)))


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """Train two seeds side by side for a few updates, as the command does."""
    settings = dataclasses.replace(SHORT, out=tmp_path_factory.mktemp("walks") / "run")
    return settings, rw.main(settings)


def breadth_first(edges: np.ndarray) -> list[int]:
    """Return the nodes of the shortest walk from each node to the goal; 0 if there is none."""
    length, front, n = [0] * len(edges), [rw.GOAL], 1
    while front:
        for node in front:
            length[node] = n
        front = sorted(
            {int(i) for node in front for i in np.flatnonzero(edges[:, node]) if not length[i]}
        )
        n += 1
    return length


def score_by_hand(edges: np.ndarray, walk: list[int]) -> float:
    """Return the optimality of one walk, computed step by step."""
    if walk[-1] != rw.GOAL or any(not edges[a, b] for a, b in itertools.pairwise(walk)):
        return 0.0
    return (rw.LONGEST - len(walk)) / (rw.LONGEST - breadth_first(edges)[walk[0]])


def padded(walks: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.array([walk + [rw.END] * (rw.LONGEST - len(walk)) for walk in walks])
    return tokens, np.arange(rw.LONGEST)[None, :] < np.array([[len(walk)] for walk in walks])


def test_graphs_are_valid_tasks(graphs):
    for edges, shortest in zip(*graphs, strict=True):
        nodes = edges[: rw.NODES, : rw.NODES]
        assert shortest[: rw.NODES].tolist() == breadth_first(nodes)
        assert shortest[: rw.NODES].min() == 1 and shortest[: rw.NODES].max() < rw.LONGEST
        assert nodes[1:].any(axis=1).all()
        assert not nodes[rw.GOAL].any() and not nodes.diagonal().any()
        assert not edges[rw.END].any() and not edges[:, rw.END].any()
    assert (
        0.07 < graphs.edges.sum() / (8 * 20 * 20) < 0.16
    )  # the share of possible edges; connected graphs have more
    assert len({edges.tobytes() for edges in graphs.edges}) == 8


def test_shortest_walks_are_limited_in_length():
    """In the chain 12 → ... → 0, node `i` needs `i + 1` nodes; the last are out of reach."""
    edges = jnp.eye(13, k=-1, dtype=bool)
    assert rw.shortest_walks(edges).tolist() == [*range(1, rw.LONGEST + 1), *[rw.LONGEST + 1] * 3]


def test_optimality_of_hand_made_walks():
    edges = np.zeros((rw.WORDS, rw.WORDS), bool)
    edges[[1, 1, 2, 3, 3], [0, 2, 3, 0, 1]] = True
    graph = rw.Graph(jnp.array(edges), rw.shortest_walks(jnp.array(edges)))
    walks = {
        (1, 0): 1.0,
        (2, 3, 0): 1.0,  # as short as possible
        (1, 2, 3, 0): 6 / 8,
        (2, 3, 1, 0): 6 / 7,
        (1, 2, 3, 1, 2, 3, 1, 2, 3, 0): 0.0,  # the goal is reached after ten nodes
        (2, 0): 0.0,
        (3, 2, 3, 0): 0.0,
        (20, 0): 0.0,  # not along an edge
        (1, 2, 3): 0.0,
        (1, 2, 3, 1, 2, 3, 1, 2, 3, 1): 0.0,
        (1, rw.END): 0.0,
        (1, 2, rw.END): 0.0,  # ends at another node
    }
    found = jax.jit(rw.optimality)(graph, *map(jnp.array, padded([list(walk) for walk in walks])))
    np.testing.assert_allclose(found, list(walks.values()), atol=1e-6)


def test_optimality_of_many_walks(graphs):
    """Compare with plain Python on random walks, half of which have one changed step."""
    rng = np.random.default_rng(0)
    for i in range(8):
        graph = jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), graphs)
        tokens, mask = map(np.array, rw.random_walks(jax.random.key(i), graph, 100))
        tokens[::2, 1] = rng.integers(1, rw.NODES, 50)
        found = rw.optimality(graph, jnp.array(tokens), jnp.array(mask))
        by_hand = [
            score_by_hand(graphs.edges[i], walk[real].tolist())
            for walk, real in zip(tokens, mask, strict=True)
        ]
        np.testing.assert_allclose(found, by_hand, atol=1e-6)
        assert 0 < np.mean(by_hand) < 1


def test_training_walks_follow_edges(graphs):
    graph = jax.tree.map(lambda x: jnp.asarray(x[0]), graphs)
    tokens, mask = map(np.asarray, rw.random_walks(jax.random.key(0), graph, 500))
    for walk, real in zip(tokens, mask, strict=True):
        assert (walk[~real] == rw.END).all()
        walk = walk[real]
        assert graphs.edges[0][walk[:-1], walk[1:]].all()
        assert rw.GOAL not in walk[:-1] and (walk[-1] == rw.GOAL or len(walk) == rw.LONGEST)
    assert set(tokens[:, 0]) == set(range(1, rw.NODES))


@pytest.mark.slow
def test_learns(tmp_path):
    summary = rw.main(dataclasses.replace(SMALL, out=tmp_path / "run"))
    assert summary["optimality/before"] < 0.6
    assert summary["optimality/after_least"] > summary["optimality/before"] + 0.2


@pytest.mark.slow
def test_writes_its_results(short_run):
    settings, summary = short_run
    assert json.loads((settings.out / "summary.json").read_text()) == summary
    assert {path.name for path in settings.out.iterdir()} == {
        ".lock",
        "summary.json",
        "learning.png",
    }
    assert [row["seed"] for row in summary["by_seed"]] == [0, 1]
    assert np.mean([row["after"] for row in summary["by_seed"]]) == pytest.approx(
        summary["optimality/after"]
    )


@pytest.mark.slow
def test_nothing_compiles_twice(short_run, tmp_path):
    """Another folder or seed does not compile another program."""
    settings, summary = short_run
    programs = rw.train_all._cache_size()
    other = rw.main(dataclasses.replace(settings, out=tmp_path / "other", seed=1))
    assert rw.train_all._cache_size() == programs
    for name in (
        "training_walks",
        "before",
        "after",
    ):  # a seed gives the same result at another position
        assert other["by_seed"][0][name] == pytest.approx(summary["by_seed"][1][name], abs=0.02)


@pytest.mark.slow
def test_seeds_side_by_side_equal_single_runs(short_run):
    """`vmap` over seeds equals separate training, up to the rounding of batched sums."""
    settings, summary = short_run
    keys = [jax.random.key(seed) for seed in range(2)]
    together = jax.device_get(rw.train_all(jnp.stack(keys), settings=settings))
    for name in ("training_walks", "before", "after"):  # a second time, to the same bits
        assert together[name].tolist() == [row[name] for row in summary["by_seed"]]
    train = jax.jit(functools.partial(rw.train, settings=settings))
    for seed, key in enumerate(keys):
        one = jax.tree.map(lambda x, seed=seed: x[seed], together)
        # Rounding of a probability may change a draw, so one of 160 samples may differ.
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, atol=0.01),
            one,
            jax.device_get(train(key)),
        )
    weights = [
        next(x for x in jax.tree.leaves(together["policy"]) if x.ndim == 3)[seed]
        for seed in range(2)
    ]
    assert np.abs(weights[0] - weights[1]).max() > 0.1


def test_never_overwrites_a_result(tmp_path, monkeypatch):
    monkeypatch.setattr(
        rw, "train_all", lambda *_, **__: pytest.fail("trained before checking the folder")
    )
    (tmp_path / "summary.json").write_text("{}")
    for out, message in (
        (tmp_path, "holds another run"),
        (tmp_path / "summary.json", "is a file"),
        (tmp_path / "summary.json" / "run", "cannot be used"),
    ):
        with pytest.raises(SystemExit, match=message):
            rw.main(rw.Settings(out=out))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"updates": 0}, "updates must be at least 1"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"seed": -1}, "seed must lie in"),
        ({"ppo": dataclasses.replace(rw.PPO, max_new_tokens=10)}, "max_new_tokens=9"),
        ({"ppo": dataclasses.replace(rw.PPO, stop_at_end=False)}, "stop_at_end"),
        ({"ppo": dataclasses.replace(rw.PPO, batch_size=32)}, "multiple of the 20"),
    ],
)
def test_invalid_settings_are_refused(wrong, message):
    with pytest.raises(SettingError, match=message):
        rw.Settings(out=Path("unused"), **wrong)
