"""The random-walks experiment: its task against plain code, and its training, alone and side by side."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import randomwalks as rw
from ppo_jax.config import SettingError

SMALL = rw.Settings(out=Path("unused"), walks=200, sft_steps=20, updates=8, samples=8)


@pytest.fixture(scope="module")
def graph():
    return rw.draw_graph(0)


def test_shortest_walks_are_those_of_matrix_powers(graph):
    """A walk of `n` nodes leads to the goal where a power of the adjacency matrix says so; no shorter one does."""
    reach = np.eye(rw.NODES, dtype=int)
    found = np.where(reach[:, rw.GOAL] > 0, 1, 0)
    for nodes in range(2, rw.LONGEST + 1):
        reach = graph.edges.astype(int) @ reach
        found = np.where((found == 0) & (reach[:, rw.GOAL] > 0), nodes, found)
    np.testing.assert_array_equal(graph.shortest, found)
    assert graph.shortest.min() == 1 and graph.shortest.max() < rw.LONGEST
    assert not graph.edges[rw.GOAL].any()
    assert rw.shortest_walks(np.zeros((3, 3), bool)).tolist() == [1, 4, 4]


def test_optimality_of_walks_made_by_hand():
    edges = np.zeros((rw.NODES, rw.NODES), bool)
    edges[[1, 1, 2, 3], [0, 2, 3, 0]] = True
    graph = rw.Graph(edges, rw.shortest_walks(edges))
    walks = {(1, 0): 1.0, (1, 2, 3, 0): 6 / 8, (2, 3, 0): 1.0, (2, 0): 0.0, (1, 2, 3): 0.0, (3, 2, 3, 0): 0.0}
    tokens = np.array([walk + (9,) * (rw.LONGEST - len(walk)) for walk in walks])
    mask = np.arange(rw.LONGEST)[None, :] < np.array([[len(walk)] for walk in walks])
    np.testing.assert_allclose(rw.optimality(graph, jnp.array(tokens), jnp.array(mask)), list(walks.values()), atol=1e-6)


def test_training_walks_are_walks(graph):
    tokens, mask = map(np.asarray, rw.random_walks(jax.random.key(0), graph, 500))
    for walk, real in zip(tokens, mask, strict=True):
        walk = walk[real]
        assert graph.edges[walk[:-1], walk[1:]].all()
        assert walk[0] != rw.GOAL and (walk[-1] == rw.GOAL or len(walk) == rw.LONGEST)
    assert set(tokens[:, 0]) == set(range(1, rw.NODES))


def test_seeds_side_by_side_are_those_alone(graph):
    """`vmap` over seeds is one program and gives each seed's own figures, up to the rounding of batched sums."""
    graphs = [graph, rw.draw_graph(1)]
    train = functools.partial(rw.train, settings=dataclasses.replace(SMALL, updates=2))
    together = jax.vmap(train)(rw.Graph(*map(np.stack, zip(*graphs, strict=True))), jax.vmap(jax.random.key)(jnp.arange(2)))
    for seed, one in enumerate(graphs):
        alone = train(rw.Graph(*map(jnp.asarray, one)), jax.random.key(seed))
        np.testing.assert_allclose(together["training_walks"][seed], alone["training_walks"], atol=1e-6)
        np.testing.assert_allclose(together["before"][seed], alone["before"], atol=0.05)
        np.testing.assert_allclose(together["optimality"][seed][0], alone["optimality"][0], atol=0.05)
    assert abs(float(together["training_walks"][0] - together["training_walks"][1])) > 0.01


def test_learns(tmp_path):
    settings = dataclasses.replace(SMALL, out=tmp_path / "run", sft_steps=100, updates=40)
    summary = rw.main(settings)
    assert summary["optimality/before"] < 0.5
    assert summary["optimality/after"] > summary["optimality/before"] + 0.3
    assert {path.name for path in settings.out.iterdir()} == {"summary.json", "learning.png"}
    with pytest.raises(ValueError, match="holds another run"):
        rw.main(settings)


def test_settings_that_cannot_run_are_refused():
    with pytest.raises(SettingError, match="updates must be at least 1"):
        rw.Settings(out=Path("unused"), updates=0)
