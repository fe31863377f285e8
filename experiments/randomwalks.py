"""PPO finds shortest paths: a language model of random walks learns to walk straight to the goal.

The task is that of trlX's examples. A random directed graph has 21 nodes; the model is fine-tuned on random walks of at most ten
nodes, most of which never meet the goal, node 0. PPO then rewards each sampled walk by its *optimality*: 1 for the shortest path
from its start, falling linearly to 0 at ten nodes; 0 for a walk along a missing edge or one that does not arrive.

    python -m experiments.randomwalks --out runs/walks --seed 0
    python -m experiments.randomwalks --out runs/five --seeds 5     # five seeds side by side, by `vmap`

The graph is drawn on the host. All the rest (walks, fine-tuning, evaluation, PPO, evaluation) is one compiled program, so that
`jax.vmap` trains many seeds, each on its own graph, at once. Optimality is the mean over 64 samples at temperature 1 from each of
the 20 other nodes.
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro
from flax.training.train_state import TrainState

from ppo_jax import iteration, sft
from ppo_jax.config import PPOConfig, SettingError
from ppo_jax.logging import check_free, claim, plain, write_json
from ppo_jax.models import heads
from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.transformer import init_params, language_model

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NODES, EDGE_PROBABILITY, GOAL = 21, 0.1, 0
LONGEST = 10  # nodes of a walk, the start and the goal included
CONFIG = TransformerConfig(vocab_size=NODES, positions=LONGEST, width=64, layers=2, heads=4, mlp_width=256)
MODEL, CRITIC = language_model(CONFIG), heads.separate_critic(CONFIG)
PPO = PPOConfig(
    batch_size=160, epochs=4, minibatches=4, max_new_tokens=LONGEST - 1, kl_coef=0.0, entropy_coef=0.02, learning_rate=5e-4,
    vf_coef=0.5, decay_learning_rate=True,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Shortest paths by PPO; writes summary.json and learning.png."""

    out: Path
    """Folder for the results; must not hold another run."""
    seed: int = 0
    """Of the graph, the walks and the training."""
    seeds: int = 1
    """Train this many seeds at once, from `seed` on."""
    walks: int = 1000
    """Random walks to fine-tune on."""
    sft_steps: int = 300
    """Steps of fine-tuning, of 100 walks each."""
    updates: int = 200
    """PPO updates."""
    samples: int = 64
    """Walks from each node in an evaluation."""
    ppo: PPOConfig = PPO
    """The PPO iteration."""

    def __post_init__(self):
        for name in ("seeds", "walks", "sft_steps", "updates", "samples"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} must be at least 1, not {getattr(self, name)}.")


class Graph(NamedTuple):
    """A task. `edges [NODES, NODES]` bool, from row to column; `shortest [NODES]` int32, nodes of the shortest walk to the goal."""

    edges: np.ndarray
    shortest: np.ndarray


def draw_graph(seed: int) -> Graph:
    """A random graph on which every node leads to the goal by a walk shorter than the longest; the goal is a dead end."""
    rng = np.random.default_rng(seed)
    while True:
        edges = rng.random((NODES, NODES)) < EDGE_PROBABILITY
        np.fill_diagonal(edges, False)
        edges[GOAL] = False
        shortest = shortest_walks(edges)
        if shortest.max() < LONGEST:
            return Graph(edges, shortest)


def shortest_walks(edges: np.ndarray) -> np.ndarray:
    """Nodes of the shortest walk from each node to the goal, both included, by breadth-first search; `NODES + 1` where none is."""
    length = np.full(len(edges), len(edges) + 1, np.int32)
    length[GOAL] = 1
    front = [GOAL]
    while front:
        node = front.pop(0)
        for before in np.flatnonzero(edges[:, node] & (length > len(edges))):
            length[before] = length[node] + 1
            front.append(before)
    return length


def optimality(graph: Graph, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """`(10 - n) / (10 - n*)` of walks `[B, LONGEST]` with their mask; `n` nodes where `n*` would do. 0 unless at the goal."""
    lengths = mask.sum(axis=1)
    there = jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)[:, 0] == GOAL
    along_edges = jnp.asarray(graph.edges)[tokens[:, :-1], tokens[:, 1:]] | ~mask[:, 1:]
    shortest = jnp.asarray(graph.shortest)[tokens[:, 0]]
    return jnp.where(there & along_edges.all(axis=1), (LONGEST - lengths) / (LONGEST - shortest), 0.0)


def random_walks(key: jax.Array, graph: Graph, n: int) -> tuple[jax.Array, jax.Array]:
    """`n` uniform walks from random nodes, to the goal or to their tenth node: tokens and mask, `[n, LONGEST]`."""
    start_key, walk_key = jax.random.split(key)
    starts = jax.random.randint(start_key, (n,), GOAL + 1, NODES)
    ways = jnp.where(jnp.asarray(graph.edges), 0.0, -jnp.inf).at[GOAL, GOAL].set(0)

    def step(node, key):
        following = jax.random.categorical(key, ways[node])
        return following, (following, node != GOAL)

    _, (tokens, mask) = jax.lax.scan(step, starts, jax.random.split(walk_key, LONGEST - 1))
    first = jnp.ones((n, 1), bool)
    return jnp.concatenate([starts[:, None], tokens.T], axis=1), jnp.concatenate([first, mask.T], axis=1)


def fine_tune(key: jax.Array, params, walks: tuple[jax.Array, jax.Array], steps: int):
    """The model after `steps` steps of Adam on batches of the walks."""
    state = TrainState.create(apply_fn=None, params=params, tx=optax.adam(optax.cosine_decay_schedule(2e-3, steps)))

    def step(state, key):
        tokens, mask = (x[jax.random.randint(key, (100,), 0, len(x))] for x in walks)
        grads = jax.grad(lambda p: sft.sft_loss(MODEL, p, tokens, mask, mask)[0])(state.params)
        return state.apply_gradients(grads=grads), None

    return jax.lax.scan(step, state, jax.random.split(key, steps))[0].params


@functools.partial(jax.jit, static_argnames="settings")
def train(graph: Graph, key: jax.Array, *, settings: Settings) -> dict[str, jax.Array]:
    """The whole method, one compiled program: optimality before and after, and of each update's samples."""
    walk_key, init_key, sft_key, head_key, test_key, ppo_key = jax.random.split(key, 6)
    walks = random_walks(walk_key, graph, settings.walks)
    reference = fine_tune(sft_key, init_params(CONFIG, init_key), walks, settings.sft_steps)
    agent = iteration.Agent(MODEL, CRITIC, settings.ppo, stop_ids=(GOAL,), pad_id=GOAL)
    params = {"policy": reference, "critic": heads.init_scorer(CONFIG, head_key, trunk=reference)}
    state = iteration.init_state(agent, params, ppo_key, updates=settings.updates)
    starts = jnp.arange(NODES - 1) + 1

    def walk(state: iteration.PPOState, nodes: jax.Array):
        rollout = iteration.sample(agent, state, nodes[:, None], jnp.ones((len(nodes), 1), bool))
        return rollout, optimality(graph, rollout.tokens, rollout.mask)

    def evaluate(state: iteration.PPOState) -> jax.Array:
        return walk(state.replace(key=test_key), jnp.repeat(starts, settings.samples))[1].mean()

    def update(state: iteration.PPOState, _):
        rollout, found = walk(state, jnp.resize(starts, settings.ppo.batch_size))
        scores = iteration.score(agent, state, reference, rollout)
        state, metrics = iteration.learn(agent, state, rollout, scores, found)
        return state, {"optimality": found.mean(), "kl": metrics["objective/kl"], "entropy": metrics["objective/entropy"]}

    trained, history = jax.lax.scan(update, state, length=settings.updates)
    return {"before": evaluate(state), "after": evaluate(trained), "training_walks": optimality(graph, *walks).mean(), **history}


def plot(results: dict[str, np.ndarray], path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    for axis, name in zip(axes, ("optimality", "kl", "entropy"), strict=True):
        axis.plot(results[name].T)
        axis.set(xlabel="update", title=name)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(settings: Settings) -> dict[str, float]:
    start = time.perf_counter()
    check_free(settings.out)
    seeds = range(settings.seed, settings.seed + settings.seeds)
    graphs = Graph(*map(np.stack, zip(*map(draw_graph, seeds), strict=True)))
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    results = jax.device_get(jax.vmap(functools.partial(train, settings=settings))(graphs, keys))
    print(f"{'seed':>4}{'walks':>8}{'before':>8}{'after':>8}")
    for seed, *row in zip(seeds, *(results[name] for name in ("training_walks", "before", "after")), strict=True):
        print(f"{seed:4}" + "".join(f"{x:8.3f}" for x in row))
    summary = {
        "optimality/before": float(results["before"].mean()),
        "optimality/after": float(results["after"].mean()),
        "optimality/after_least": float(results["after"].min()),
        "time/total_s": time.perf_counter() - start,
        "settings": plain(settings),
    }
    out = claim(settings.out)
    plot(results, out / "learning.png")
    write_json(out / "summary.json", summary)
    print(f"{summary['time/total_s']:.0f} s")
    return summary


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings))
    except (ValueError, SettingError) as error:
        raise SystemExit(f"randomwalks: {error}") from error
