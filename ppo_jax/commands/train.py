"""The command `ppo-jax train`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import tyro

from ppo_jax.commands.prompts import PromptOptions
from ppo_jax.commands.rewards import Several, check_rewards
from ppo_jax.distributed.joining import Processes
from ppo_jax.errors import SettingError, check_numbers
from ppo_jax.models.lora_settings import NO_LORA, LoRA
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.run.settings import LoopConfig, Resume, Which

if TYPE_CHECKING:
    from ppo_jax.run.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Train:
    """Fine-tune a language model by PPO on your prompts and reward."""

    example: ClassVar[str] = """
    ppo-jax train --model gpt2 --prompts prompts.txt \\
        --reward my_reward.py:score --out runs/a --updates 50"""

    model: str
    """The policy: a folder or a Hugging Face id with safetensors, or a .gguf file. The folder of a
    run stands for its final model; ppo-jax convert writes its best one."""
    prompts: str
    """The prompts: a .txt file with one prompt per line; a .jsonl, .json, .csv, .tsv or .parquet
    file; a folder that the library datasets saved; or a data set of the Hugging Face hub, such as
    openai/gsm8k:main:train."""
    adapter: Path | None = None
    """Folder of an adapter in peft's format over the model. It is trained further, with its own
    rank, scale and layers, and the reference is the model with the adapter as it is."""
    reference: str | None = None
    """Reference policy of the KL penalty, instead of the policy as it starts: a folder or a Hugging
    Face id with safetensors, or a .gguf file, with the policy's tokenizer."""
    reward: Several
    """The reward: my_file.py:function, or the folder or Hugging Face id of a reward model. A reward
    model reads the end of a text that is longer than its positions. Several rewards are added up;
    each may have a weight: --reward a.py:f --reward b.py:g=0.5."""
    reward_given: Literal["text", "tokens"] = "text"
    """What the reward function receives. text: the lists of texts (prompts, responses), and the
    rows of the prompts if it takes a third argument. tokens: the JAX arrays (tokens, mask,
    response_mask), under jit."""
    reward_label: str | None = None
    """Name or number of the label whose logit is the score, for a reward model that has several
    labels, such as a sentiment classifier."""
    reward_timeout: float | None = None
    """Time limit in seconds of a reward function for one response, with which it is called for each
    response alone. A response that takes longer has no score."""
    out: Path
    """Folder for the metrics, samples, checkpoints and final model. It may be in an object store,
    as gs://BUCKET/PATH or s3://BUCKET/PATH, for a run of one process."""
    eval_prompts: str | None = None
    """Held-out prompts for evaluation, in the same formats."""
    eval_fraction: float = 0.0
    """Share of the prompts that is held out for evaluation, chosen at random by eval_seed."""
    eval_seed: int | None = None
    """Seed of that choice, so that runs with other seeds hold out the same prompts. By default 0,
    or that of the run that is resumed or forked."""
    critic: str = "auto"
    """The critic. auto: none if the advantage estimator reads no values, otherwise separate, and as
    it was in a run that is resumed or forked. none: no critic. shared: a value head on the policy's
    trunk. separate: a critic with its own trunk that starts from the policy. Otherwise the folder
    or Hugging Face id of a reward model with one label that a separate critic starts from."""
    advantage: str | None = None
    """An advantage estimator of your own, my_file.py:function, instead of the one that
    ppo.advantage names; it is called as advantage(rewards, values, mask, rollout=..., scores=...)
    with arrays of shape [responses, tokens], and returns advantages and returns. If it reads no
    values, critic=none saves the critic."""
    loss: str | None = None
    """A loss of the policy of your own, my_file.py:function, instead of the one that ppo.loss
    names; it is called as loss(logprobs, old_logprobs, advantages, mask, aggregate=...) with arrays
    of shape [responses, tokens], and returns aggregate(terms, mask). With a keyword-only parameter
    experience it gets the minibatch too."""
    chat: bool = False
    """Treat each prompt as a user's message and apply the tokenizer's chat template. Prompts that
    are lists of messages always go through it."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end a response besides the tokenizer's own end token; each must be a single
    token."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type. Parameters are always float32."""
    matmul_precision: Literal["default", "high", "highest"] = "default"
    """Precision of float32 matrix products. On a TPU, default is one bfloat16 pass, high is three,
    and highest is six, which is float32. On a GPU, default may be TF32. A CPU always computes in
    float32."""
    remat: bool = False
    """Recompute activations in the backward pass to save memory."""
    preset: Literal[
        "default",
        "oai2019",
        "nplus",
        "trl",
        "grpo",
        "dr_grpo",
        "dapo",
        "rloo",
        "reinforce_pp",
        "vapo",
        "sao",
    ] = "default"
    """Published settings to start from. Options that are given as well take precedence."""
    resume: Resume | Literal["fork"] = "no"
    """yes: resume from the newest good checkpoint in out, with the same settings. auto: the same if
    there is one, otherwise start a new run. no: start a new run. fork: start a new run in out from
    a checkpoint of the run in fork_from, with any settings that its arrays fit."""
    fork_from: Path | None = None
    """Folder of the run whose checkpoint a forked run starts from. Nothing in it changes."""
    fork_update: Which = "last"
    """Checkpoint to fork: best (by the evaluation on held-out prompts), last, or its number of
    updates. The updates of the checkpoint count as updates of the new run."""
    deterministic: bool = False
    """Make XLA use GPU kernels that give the same bits every time. An iteration then takes about
    1.5 times as long."""
    mesh: str = ""
    """How devices share the work, such as data=2,fsdp=4. The axes data and fsdp shard the rows of a
    batch; fsdp and tensor shard the parameters. An axis that is left out is 1, except that data
    takes the remaining devices. With rollout=2, two other devices sample, with loop.staleness at
    the same time as the others learn. pmap runs a replica on each device of one process."""
    processes: Processes = field(default_factory=Processes)
    data_options: tyro.conf.OmitArgPrefixes[PromptOptions] = field(default_factory=PromptOptions)
    lora: LoRA = NO_LORA
    loop: LoopConfig = field(default_factory=LoopConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)

    def __post_init__(self) -> None:
        check_rewards(self.reward, self.reward_timeout)
        check_numbers(self)
        if not 0 <= self.eval_fraction < 1:
            raise SettingError(
                f"eval_fraction must be at least 0 and less than 1, not {self.eval_fraction}."
            )
        if self.eval_fraction and self.eval_prompts is not None:
            raise SettingError(
                f"eval_fraction={self.eval_fraction} holds out a part of the prompts, but "
                f"eval_prompts={self.eval_prompts} names others; give only one of them."
            )
        if self.adapter is not None and self.lora.rank:
            raise SettingError(
                f"adapter={self.adapter} has its own rank; leave out lora.rank={self.lora.rank}."
            )

    def run(self) -> None:
        """Train, and write the fine-tuned model and the summary."""
        from ppo_jax.commands.training import train

        train(self)

    def build(self, out: Path) -> "Trainer":
        """Read model, prompts and reward, and make a trainer that writes to `out`."""
        from ppo_jax.commands.training import build, with_critic

        return build(with_critic(self, out), out)
