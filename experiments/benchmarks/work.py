"""The timed work: one PPO iteration of given shapes, with random parameters and tokens."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax import (
    Agent,
    PPOConfig,
    PPOState,
    TransformerConfig,
    init_params,
    init_scorer,
    init_state,
    jit_steps,
    language_model,
    learn,
    reward_model,
    sample,
    score,
    separate_critic,
    shared_critic,
    zero_head,
)


@dataclasses.dataclass(frozen=True)
class Work:
    """Shapes. Policy, critic and reward model have one size; no response ends early by itself."""

    layers: int
    width: int
    heads: int
    vocab_size: int
    positions: int
    prompts: int
    prompt_tokens: int
    new_tokens: int
    epochs: int = 4
    minibatches: int = 4
    dtype: str = "float32"
    critic: str = "separate"
    micro_batch: int | None = None
    logit_chunk: int | None = None
    pack: int | None = None
    median: int | None = None  # of lognormal lengths of responses, with sigma 1
    slots: int | None = None

    @property
    def config(self) -> TransformerConfig:
        """The config of the models."""
        return TransformerConfig(
            vocab_size=self.vocab_size,
            positions=self.positions,
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            mlp_width=4 * self.width,
            dtype=jnp.dtype(self.dtype),
        )

    @property
    def ppo(self) -> PPOConfig:
        """The settings of the PPO iteration."""
        return PPOConfig(
            batch_size=self.prompts,
            epochs=self.epochs,
            minibatches=self.minibatches,
            micro_batch=self.micro_batch,
            max_new_tokens=self.new_tokens,
            logit_chunk=self.logit_chunk,
            pack=self.pack,
            rollout_slots=self.slots,
        )


WORKS = {
    "tiny": Work(
        layers=1,
        width=16,
        heads=2,
        vocab_size=32,
        positions=16,
        prompts=8,
        prompt_tokens=4,
        new_tokens=6,
        minibatches=2,
    ),
    "small": Work(
        layers=4,
        width=256,
        heads=8,
        vocab_size=8192,
        positions=64,
        prompts=64,
        prompt_tokens=16,
        new_tokens=48,
    ),
    "gpt2": Work(
        layers=12,
        width=768,
        heads=12,
        vocab_size=50257,
        positions=1024,
        prompts=8,
        prompt_tokens=32,
        new_tokens=32,
    ),
    # Responses of different lengths, at most 512 tokens; see ragged.py.
    "ragged": Work(
        layers=2,
        width=256,
        heads=4,
        vocab_size=8192,
        positions=576,
        prompts=64,
        prompt_tokens=64,
        new_tokens=512,
        epochs=1,
        micro_batch=4,
        median=64,
    ),
    # Long sequences; see forms.py.
    "long": Work(
        layers=2,
        width=256,
        heads=4,
        vocab_size=8192,
        positions=4096,
        prompts=2,
        prompt_tokens=1024,
        new_tokens=3072,
        epochs=1,
        minibatches=1,
        micro_batch=1,
        logit_chunk=512,
    ),
    # OpenAI 2019: 64 + 24 tokens, batches of 512, 4 epochs of one minibatch, a shared trunk.
    "oai2019": Work(
        layers=12,
        width=768,
        heads=12,
        vocab_size=50257,
        positions=1024,
        prompts=512,
        prompt_tokens=64,
        new_tokens=24,
        minibatches=1,
        dtype="bfloat16",
        critic="shared",
    ),
}


class Programs(NamedTuple):
    """The phases of an iteration, as functions of state, parameters and arrays."""

    sample: Callable
    score: Callable
    reward: Callable
    learn: Callable


@functools.cache
def agent(work: Work) -> Agent:
    """Return the agent: model, critic and settings."""
    critic = shared_critic() if work.critic == "shared" else separate_critic(work.config)
    return Agent(language_model(work.config), critic, work.ppo, (), 0)


@functools.cache
def programs(work: Work) -> Programs:
    """Return the phases as compiled functions."""
    steps = jit_steps(agent(work))
    return Programs(steps.sample, steps.score, jax.jit(functions(work).reward), steps.learn)


def functions(work: Work) -> Programs:
    """Return the phases as plain functions, which can be traced."""
    steps = (functools.partial(f, agent(work)) for f in (sample, score, learn))
    sample_, score_, learn_ = steps
    return Programs(sample_, score_, reward_model(work.config), learn_)


def start(work: Work) -> tuple[PPOState, Any, Any]:
    """Return the state and the parameters of reference and reward model."""
    config, (policy, critic, reward) = work.config, jax.random.split(jax.random.key(0), 3)
    policy_params = init_params(config, policy)
    head = (
        {"head": zero_head(config.width)}
        if work.critic == "shared"
        else init_scorer(config, critic)
    )
    params = {"policy": jax.tree.map(jnp.copy, policy_params), "critic": head}
    state = init_state(agent(work), params, jax.random.key(1), updates=10**6)
    return state, policy_params, init_scorer(config, reward)


def prompts(work: Work) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and mask of random prompts without padding."""
    tokens = np.random.default_rng(0).integers(
        1, work.vocab_size, (work.prompts, work.prompt_tokens), np.int32
    )
    return tokens, np.ones(tokens.shape, bool)


def shapes(work: Work) -> dict[str, tuple]:
    """Return the shapes of the arguments of each phase."""
    phases = functions(work)
    state, reference, reward = jax.eval_shape(lambda: start(work))
    batch = jax.eval_shape(lambda: tuple(map(jnp.asarray, prompts(work))))
    rollout = jax.eval_shape(phases.sample, state, *batch)
    scores = jax.eval_shape(phases.score, state, reference, rollout)
    return {
        "sample": (state, *batch),
        "score": (state, reference, rollout),
        "reward": (reward, rollout.tokens, rollout.mask),
        "learn": (state, rollout, scores, jax.ShapeDtypeStruct((work.prompts,), jnp.float32)),
    }
