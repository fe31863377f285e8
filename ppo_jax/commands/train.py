"""The command `ppo-jax train`."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import tyro
from flax.traverse_util import flatten_dict

from ppo_jax import data, hashing
from ppo_jax.commands.learner import read_learner
from ppo_jax.commands.prompts import PromptOptions, hold_out
from ppo_jax.commands.rewards import Rewards, check_rewards
from ppo_jax.data.chat import as_user_messages
from ppo_jax.distributed import processes
from ppo_jax.distributed.processes import Processes
from ppo_jax.errors import SettingError
from ppo_jax.models.lora_settings import NO_LORA, LoRA
from ppo_jax.ppo.loss import agent_loss_fn
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.reward_functions import load_function, load_rewards
from ppo_jax.run import provenance
from ppo_jax.run.assembly import Learner
from ppo_jax.run.export import export_result
from ppo_jax.run.files import check_free, lock_folder, store_url
from ppo_jax.run.forks import Fork
from ppo_jax.run.opening import Resume
from ppo_jax.run.remote import Mirror
from ppo_jax.run.resume import read_config
from ppo_jax.run.serialize import to_json
from ppo_jax.run.settings import LoopConfig
from ppo_jax.run.stored import Which
from ppo_jax.run.summary import print_before_and_after, write_summary
from ppo_jax.run.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Train:
    """Fine-tune a language model by PPO on your prompts and reward."""

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
    reward: Rewards
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
    """Share of the prompts that is held out for evaluation, chosen at random by the seed."""
    critic: str = "separate"
    """The critic. shared: a value head on the policy's trunk. separate: a critic with its own trunk
    that starts from the policy. none: no critic, for an advantage estimator that reads no values.
    Otherwise the folder or Hugging Face id of a reward model with one label that a separate critic
    starts from."""
    advantage: str | None = None
    """An advantage estimator of your own, my_file.py:function, instead of the one that
    ppo.advantage names; it is called as advantage(rewards, values, mask, rollout=..., scores=...)
    with arrays of shape [responses, tokens], and returns advantages and returns."""
    loss: str | None = None
    """A loss of the policy of your own, my_file.py:function, instead of the one that ppo.loss
    names; it is called as loss(logprobs, old_logprobs, advantages, mask, aggregate=...) with arrays
    of shape [responses, tokens], and returns aggregate(terms, mask)."""
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
        if not 0 <= self.eval_fraction < 1:
            raise SettingError(
                f"eval_fraction must be at least 0 and less than 1, not {self.eval_fraction}."
            )
        if self.eval_fraction and self.eval_prompts is not None:
            raise SettingError(
                f"eval_fraction={self.eval_fraction} holds out a part of the prompts, but "
                f"eval_prompts={self.eval_prompts} names others; give only one of them."
            )

    def run(self) -> None:
        """Train, and write the fine-tuned model and the summary."""
        if self.deterministic:
            provenance.make_deterministic()
        self.processes.start()
        if self.mesh == "pmap" and jax.process_count() > 1:
            raise SettingError(
                f"mesh=pmap runs in one process; for {jax.process_count()} processes use "
                f"mesh=data={jax.device_count()}."
            )
        settings = flatten_dict(to_json(self), sep=".")
        own = ("out", "processes.")  # These options may differ between processes.
        processes.check_same({name: x for name, x in settings.items() if not name.startswith(own)})
        mirror = None if (url := store_url(self.out)) is None else Mirror(url)
        out = self.out if mirror is None else mirror.folder
        check_free(out, resume=self.resume in ("yes", "auto"))
        fork = self._fork()
        trainer = self.build(out, fork=fork, mirror=mirror)
        with contextlib.ExitStack() as stack:
            if mirror is not None:
                stack.callback(mirror.close)
            if processes.is_first():
                # The trainer releases its own lock before the model is written.
                stack.callback(lock_folder(out).release)
            self._train(trainer)
            if mirror is not None:
                mirror.push()

    def _fork(self) -> Fork | None:
        """Return the checkpoint to fork, once it is checked that there is such a run."""
        if (self.resume == "fork") != (self.fork_from is not None):
            raise SettingError(
                f"resume=fork and fork_from go together, but resume={self.resume} and "
                f"fork_from={self.fork_from}."
            )
        if self.fork_from is None:
            return None
        if store_url(self.fork_from) is None:
            read_config(self.fork_from)
        return Fork(self.fork_from, self.fork_update)

    def build(
        self,
        out: Path,
        loop: LoopConfig | None = None,
        fork: Fork | None = None,
        mirror: Mirror | None = None,
    ) -> Trainer:
        """Read model, prompts and reward, and make a trainer.

        Args:
          out: the folder that the trainer writes to.
          loop: settings that replace `self.loop`, or None.
          fork: the checkpoint of another run that the run starts from, or None.
          mirror: what keeps `out` in an object store, or None.

        Returns:
          The trainer.

        Raises:
          SettingError: if the settings do not fit one another or the devices.
          ValueError: if the model, the prompts or the reward cannot be read.
        """
        rows, held_out_rows = self.read_prompts()
        learner = self.learner()
        reward = load_rewards(
            self.reward, self.reward_given, self.reward_label, self.reward_timeout
        )
        policy_loss = self._function("loss", self.loss)
        prompts = self.data_options.encode(learner, rows, self.prompts)
        held_out = self.data_options.encode(
            learner, held_out_rows, self.eval_prompts or f"the held-out part of {self.prompts}"
        )
        assert prompts is not None  # There are rows to learn from.
        return Trainer(
            learner,
            prompts,
            reward,
            out=out,
            loop=loop or self.loop,
            eval_prompts=held_out,
            settings=self,
            resume="no" if self.resume == "fork" else self.resume,
            fork=fork,
            advantage_fn=self._function("advantage", self.advantage),
            loss_fn=agent_loss_fn(learner.agent, policy_loss=policy_loss) if policy_loss else None,
            mirror=mirror,
        )

    def learner(self) -> Learner:
        """Read the model and the critic, and assemble what is trained; see `read_learner`."""
        return read_learner(self)

    def _function(self, purpose: str, spec: str | None) -> Callable[..., Any] | None:
        """Return the user's own function for a purpose, or None if no option names one."""
        if spec is not None and purpose == "loss" and self.ppo.entropy_target is not None:
            raise SettingError(
                f"loss={spec} does not read the weight that entropy_target adapts; leave out one "
                "of the two."
            )
        return None if spec is None else load_function(spec, purpose)

    def read_prompts(self) -> tuple[list[data.Row], list[data.Row]]:
        """Read the prompts to learn from and those that are held out."""

        def read(source: str) -> list[data.Row]:
            rows = data.read_rows(source, names=self.data_options.names())
            return as_user_messages(rows) if self.chat else rows

        rows = read(self.prompts)
        if self.eval_prompts is not None:
            return rows, read(self.eval_prompts)
        if not self.eval_fraction:
            return rows, []
        return hold_out(rows, self.prompts, fraction=self.eval_fraction, seed=self.loop.seed)

    @property
    def _place(self) -> str:
        return store_url(self.out) or str(self.out)

    def _train(self, trainer: Trainer) -> None:
        done = int(trainer.state.update)
        forked = self.resume == "fork"
        processes.print_once(
            f"A run starts in {self._place} from {self.fork_from} after {done} updates."
            if forked
            else f"The run in {self._place} continues after {done} updates."
            if done
            else f"A run starts in {self._place}; the first update takes longer, as it is compiled."
        )
        state = trainer.run()
        digest = hashing.digest(state.params)
        export_result(trainer.out, trainer, state, base_name=self.model)
        updates = int(state.update)
        processes.on_first_process(
            lambda: print_before_and_after(write_summary(trainer.out, updates, digest))
        )
        processes.print_once(
            f"The fine-tuned model is in {self._place}/model; every update's metrics are in "
            f"{self._place}/metrics.jsonl.\nDigest of the final parameters: {digest}"
        )
