"""Time PPO iterations of TRL (`trl.experimental.ppo`), and Hugging Face `generate` alone.

The work is given as JSON. `peers` runs this file in a separate environment that it builds:

    python peer_trl.py '{"layers": 4, ...}'
"""

import json
import logging
import os
import sys
import tempfile
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LogitsProcessor,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer


class Clock(TrainerCallback):
    """Record when each iteration ended."""

    def __init__(self):
        self.marks = []

    def on_step_end(self, *args, **kwargs):
        """Record the time."""
        self.marks.append(time.perf_counter())


class EndAt(LogitsProcessor):
    """Let each response end with the token 0 at a given length, and not before."""

    def __init__(self, lengths: list[int], prompt_tokens: int):
        self.lengths, self.prompt_tokens = torch.tensor(lengths), prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores of the next tokens with those of the token 0 replaced."""
        last = input_ids.shape[1] - self.prompt_tokens + 1 == self.lengths
        scores = torch.where(last[:, None], -torch.inf, scores)
        scores[:, 0] = torch.where(last, 0.0, -torch.inf)
        return scores


class Policy(GPT2LMHeadModel):
    """A policy whose responses have given lengths, those of each batch the same, in turn."""

    lengths: list[int] | None = None

    def generate(self, input_ids: torch.Tensor, **options):
        """Generate responses to some of the prompts of a batch."""
        if self.lengths is None:
            return super().generate(input_ids, **options)
        done = getattr(self, "done", 0)
        self.done = (done + len(input_ids)) % len(self.lengths)
        rows = self.lengths[done : done + len(input_ids)]
        ends = EndAt(rows, input_ids.shape[1])
        return super().generate(input_ids, logits_processor=[ends], **options)


def main(work: dict) -> dict:
    """Return the seconds of each rollout and of each whole iteration."""
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count())
    sizes = {
        "vocab_size": work["vocab_size"],
        "n_positions": work["positions"],
        "n_embd": work["width"],
        "n_layer": work["layers"],
        "n_head": work["heads"],
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    config = GPT2Config(**sizes)
    prompts = torch.randint(1, work["vocab_size"], (work["prompts"], work["prompt_tokens"]))
    return {
        "rollout_s": generate(config, prompts, work),
        "iteration_s": iterations(config, prompts, work),
    }


def generate(config: GPT2Config, prompts: torch.Tensor, work: dict) -> list[float]:
    """Return the seconds of each call of `generate`."""
    model, times = Policy(config).eval(), []
    model.lengths = work.get("lengths")
    ends = {"eos_token_id": 0} if model.lengths else {"min_new_tokens": work["new_tokens"]}
    for _ in range(work["runs"] + 1):
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                top_k=0,
                max_new_tokens=work["new_tokens"],
                pad_token_id=0,
                **({"eos_token_id": None} | ends),
            )
        times.append(time.perf_counter() - start)
    return times[1:]


def make_tokenizer(work: dict) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the words `w0`, `w1`, ..."""
    words = {f"w{i}": i for i in range(work["vocab_size"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="w0", eos_token="w0", padding_side="left"
    )


def ppo_config(work: dict, updates: int, out: str) -> PPOConfig:
    """Return settings for one device.

    A minibatch is one forward pass, and no samples, logs or checkpoints are written on the way.
    """
    minibatch = work["prompts"] // work["minibatches"]
    return PPOConfig(
        output_dir=out,
        per_device_train_batch_size=minibatch,
        gradient_accumulation_steps=work["minibatches"],
        num_mini_batches=work["minibatches"],
        num_ppo_epochs=work["epochs"],
        total_episodes=work["prompts"] * updates,
        response_length=work["new_tokens"],
        temperature=1.0,
        learning_rate=1e-5,
        local_rollout_forward_batch_size=minibatch,
        num_sample_generations=0,
        stop_token="eos" if work.get("lengths") else None,
        gradient_checkpointing=False,
        bf16=False,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_drop_last=True,
    )


def iterations(config: GPT2Config, prompts: torch.Tensor, work: dict) -> list[float]:
    """Return the seconds of each PPO iteration."""
    scorer = GPT2Config(**{**config.to_dict(), "num_labels": 1})
    updates = work["runs"] + 1
    clock, policy = Clock(), Policy(config)
    policy.lengths = work.get("lengths")
    with tempfile.TemporaryDirectory() as out:
        trainer = PPOTrainer(
            args=ppo_config(work, updates, out),
            processing_class=make_tokenizer(work),
            model=policy,
            ref_model=GPT2LMHeadModel(config),
            reward_model=GPT2ForSequenceClassification(scorer),
            value_model=GPT2ForSequenceClassification(scorer),
            train_dataset=Dataset.from_dict({"input_ids": prompts.repeat(updates, 1).tolist()}),
            callbacks=[clock],
        )
        trainer.train()
    return [b - a for a, b in zip(clock.marks, clock.marks[1:], strict=False)]


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    print(json.dumps(main(json.loads(sys.argv[1]))))
