"""Time PPO iterations of google-tunix with its own Qwen2, since its Llama 3 raises under PPO.

The work is given as JSON. `peers` runs this file in a separate environment that it builds:

    python peer_tunix.py '{"layers": 4, ...}'
"""

import itertools
import json
import os
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import optax
from flax import nnx
from tunix.models.qwen2 import model as qwen2
from tunix.rl import rl_cluster
from tunix.rl import utils as rl_utils
from tunix.rl.ppo import ppo_learner
from tunix.rl.rollout import base_rollout


class Words:
    """A tokenizer of texts such as "w3 w17" with the interface that tunix expects.

    Its end token is not in the model's vocabulary, so no response ends early.
    """

    def __init__(self, vocab_size: int):
        self._end = vocab_size

    def encode(self, text: str, **_) -> list[int]:
        """Return the tokens of a text."""
        return [int(word[1:]) for word in text.split()]

    def decode(self, ids, **_) -> str:
        """Return the text of tokens."""
        return " ".join(f"w{i}" for i in ids)

    def bos_id(self) -> int:
        """Return the start token."""
        return 1

    def eos_id(self) -> int:
        """Return the end token."""
        return self._end

    def pad_id(self) -> int:
        """Return the padding token."""
        return 0

    def dedup_bos_ids(self, ids):
        """Return the tokens, which never have two start tokens."""
        return ids


def model_config(work: dict) -> qwen2.ModelConfig:
    """Return the config of a Qwen2 with about the arithmetic of a GPT-2 of this size."""
    return qwen2.ModelConfig(
        num_layers=work["layers"],
        vocab_size=work["vocab_size"],
        embed_dim=work["width"],
        hidden_dim=8 * work["width"] // 3,  # three such matrices equal GPT-2's two of 4 x width
        num_heads=work["heads"],
        head_dim=work["width"] // work["heads"],
        num_kv_heads=work["heads"],
        rope_theta=10000,
        norm_eps=1e-6,
        use_tied_embedding=False,  # `create_critic_model` replaces the output matrix
    )


def cluster_config(work: dict, mesh: jax.sharding.Mesh) -> rl_cluster.ClusterConfig:
    """Return the settings of training and sampling on one device."""
    rows = work["prompts"] // work["minibatches"]
    return rl_cluster.ClusterConfig(
        role_to_mesh=dict.fromkeys(rl_cluster.Role, mesh),
        training_config=rl_cluster.RLTrainingConfig(
            actor_optimizer=optax.adamw(1e-5),
            critic_optimizer=optax.adamw(1e-5),
            max_steps=10**6,
            eval_every_n_steps=10**6,
            # With a minibatch of `rows`, tunix would sample and learn each minibatch separately.
            # This samples all rows at once, and takes one optimizer step per four passes.
            mini_batch_size=work["prompts"],
            train_micro_batch_size=rows,
            rollout_micro_batch_size=work["prompts"],
            compute_logps_micro_batch_size=rows,
        ),
        rollout_config=base_rollout.RolloutConfig(
            max_tokens_to_generate=work["new_tokens"],
            max_prompt_length=work["prompt_tokens"],
            temperature=1.0,
            top_p=1.0,
            kv_cache_size=work["prompt_tokens"] + work["new_tokens"] + 1,
            eos_tokens=[work["vocab_size"]],
        ),
    )


def main(work: dict) -> dict:
    """Return the seconds of each iteration."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    config = model_config(work)
    make = lambda seed: qwen2.Qwen2(config, rngs=nnx.Rngs(seed))
    with jax.set_mesh(mesh):
        actor, reference = make(0), make(0)
        critic, reward = (rl_utils.create_critic_model(make(seed)) for seed in (1, 2))
    cluster = rl_cluster.RLCluster(
        actor=actor,
        critic=critic,
        reference=reference,
        reward=reward,
        tokenizer=Words(work["vocab_size"]),
        cluster_config=cluster_config(work, mesh),
    )
    learner = ppo_learner.PPOLearner(cluster, ppo_learner.PPOConfig(num_iterations=work["epochs"]))
    marks = []

    def batches():
        # The sampler adds a start token to each prompt.
        ids = np.random.default_rng(0).integers(
            1, work["vocab_size"], (work["prompts"], work["prompt_tokens"] - 1)
        )
        texts = np.array([" ".join(f"w{i}" for i in row) for row in ids])
        for _ in range(work["runs"] + 2):  # the first two are not timed
            marks.append(time.perf_counter())
            yield {"prompts": texts}
        marks.append(time.perf_counter())

    learner.train(batches())
    return {"iteration_s": [b - a for a, b in itertools.pairwise(marks[2:])]}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
