"""A tiny run with everything on that a checkpoint must hold: adapters, a critic of its own, adaptive KL, score scaling, target KL.

As a program it is one process of such a run: `python everything.py OUT UPDATES`; it prints the digest of the final parameters.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ppo_jax import data
from ppo_jax.distributed import compilation
from ppo_jax.hashing import digest
from ppo_jax.models import heads, lora
from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.transformer import init_params, language_model
from ppo_jax.ppo import iteration
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.reward_functions import TextReward
from ppo_jax.run.settings import LoopConfig
from ppo_jax.run.trainer import Trainer

# Runs in tests are short: their programs are to be compiled quickly, not to run fast.
compilation.COMPILER_OPTIONS |= {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
WORDS = ["<end>", *(chr(ord("a") + i) for i in range(20))]
PPO = PPOConfig(
    batch_size=16,
    epochs=2,
    minibatches=2,
    micro_batch=4,
    max_new_tokens=5,
    learning_rate=0.1,
    vf_coef=0.5,
    kl_coef=0.1,
    kl_target=0.5,
    kl_horizon=200,
    scale_scores=True,
    target_kl=0.001,
    whiten_rewards=True,
)


def tokenizer():
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


def likes_b(prompts, responses):
    return [response.split().count("b") / 2 for response in responses]


def trainer(
    out, *, ppo=PPO, reward=likes_b, resume="no", adapters=True, mesh=None, held_out=None, **loop
):
    config = TransformerConfig(
        vocab_size=len(WORDS),
        positions=16,
        width=16,
        layers=1,
        heads=2,
        mlp_width=32,
        lora_scale=2.0 if adapters else 1.0,
    )
    words = tokenizer()
    rows = data.read_rows(["a b", "c", "d e f", "g", "h i", "j k l"])
    encode = lambda rows: data.encode_prompts(
        rows, words, positions=16, new_tokens=ppo.max_new_tokens, pad_id=0
    )
    prompts = encode(rows)
    params = {
        "policy": init_params(config, iteration.init_key(0, 0)),
        "critic": heads.init_scorer(config, iteration.init_key(0, 1)),
    }
    frozen = None
    if adapters:
        params, frozen = lora.adapt(
            params, iteration.init_key(0, 2), lora.LoRA(rank=2, alpha=4.0, targets="attn/(q|o)$")
        )
    agent = iteration.Agent(language_model(config), heads.separate_critic(config), ppo, (0,), 0)
    loop = LoopConfig(
        **{
            "updates": 4,
            "progress": False,
            "tensorboard": False,
            "save_every": 1,
            "eval_every": 3,
            **loop,
        }
    )
    return Trainer(
        agent,
        params,
        words,
        prompts,
        TextReward(reward),
        out=Path(out),
        loop=loop,
        frozen=frozen,
        resume=resume,
        mesh=mesh,
        eval_prompts=prompts if held_out is None else encode(data.read_rows(held_out)),
    )


if __name__ == "__main__":
    state = trainer(sys.argv[1], updates=int(sys.argv[2]), resume="auto").run()
    print(digest(state.train.params), flush=True)
