"""Times PPO iterations of google-tunix on the work given as JSON, with its own Qwen2: its Llama 3 raises under PPO.

Runs in an environment of its own, which `peers` builds: python peer_tunix.py '{"layers": 4, ...}'
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
    """A tokenizer of texts such as "w3 w17"; its end is no word of the model, so no response ends early."""

    def __init__(self, vocab_size: int):
        self._end = vocab_size

    def encode(self, text: str, **_) -> list[int]:
        return [int(word[1:]) for word in text.split()]

    def decode(self, ids, **_) -> str:
        return " ".join(f"w{i}" for i in ids)

    def bos_id(self) -> int:
        return 1

    def eos_id(self) -> int:
        return self._end

    def pad_id(self) -> int:
        return 0

    def dedup_bos_ids(self, ids):
        return ids


def main(work: dict) -> dict:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    config = qwen2.ModelConfig(
        num_layers=work["layers"],
        vocab_size=work["vocab_size"],
        embed_dim=work["width"],
        hidden_dim=8
        * work["width"]
        // 3,  # three matrices of this do the arithmetic of GPT-2's two of 4 x width
        num_heads=work["heads"],
        head_dim=work["width"] // work["heads"],
        num_kv_heads=work["heads"],
        rope_theta=10000,
        norm_eps=1e-6,
        use_tied_embedding=False,  # its maker of critics wants an output matrix to replace
    )
    make = lambda seed: qwen2.Qwen2(config, rngs=nnx.Rngs(seed))
    with jax.set_mesh(mesh):
        actor, reference = make(0), make(0)
        critic, reward = (rl_utils.create_critic_model(make(seed)) for seed in (1, 2))
    rows = work["prompts"] // work["minibatches"]
    cluster = rl_cluster.RLCluster(
        actor=actor,
        critic=critic,
        reference=reference,
        reward=reward,
        tokenizer=Words(work["vocab_size"]),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(rl_cluster.Role, mesh),
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.adamw(1e-5),
                critic_optimizer=optax.adamw(1e-5),
                max_steps=10**6,
                eval_every_n_steps=10**6,
                # A minibatch of 16 would be sampled and learned apart from the others; this samples all rows at once, and steps
                # the optimizer once in four passes.
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
        ),
    )
    learner = ppo_learner.PPOLearner(cluster, ppo_learner.PPOConfig(num_iterations=work["epochs"]))
    marks = []

    def batches():
        # The sampler puts a first word of its own before each prompt.
        ids = np.random.default_rng(0).integers(
            1, work["vocab_size"], (work["prompts"], work["prompt_tokens"] - 1)
        )
        texts = np.array([" ".join(f"w{i}" for i in row) for row in ids])
        for _ in range(work["runs"] + 2):  # two that are not timed
            marks.append(time.perf_counter())
            yield {"prompts": texts}
        marks.append(time.perf_counter())

    learner.train(batches())
    return {"iteration_s": [b - a for a, b in itertools.pairwise(marks[2:])]}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
