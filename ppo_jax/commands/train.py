"""`ppo-jax train`."""

import contextlib
import dataclasses
import re
from pathlib import Path
from typing import Any, Literal

import jax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from ppo_jax import hashing
from ppo_jax.commands.loading import check_top_k, load_model, load_prompts, pad_id, stop_ids
from ppo_jax.distributed import meshes, placement, processes
from ppo_jax.distributed.processes import Processes
from ppo_jax.errors import SettingError, check_numbers
from ppo_jax.models import heads
from ppo_jax.models import lora as low_rank
from ppo_jax.models.io import adapter_files, pretrained, scorers
from ppo_jax.models.transformer import language_model
from ppo_jax.ppo import iteration
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.reward_functions.loading import load_reward
from ppo_jax.run import provenance
from ppo_jax.run.files import check_free, lock, plain, read_lines, write_json
from ppo_jax.run.settings import LoopConfig
from ppo_jax.run.trainer import Resume, Trainer
from ppo_jax.types import Params, overlay


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapters:
    """Low-rank adapters over the frozen model, which is then the reference too."""

    rank: int = 0
    """Of each; 0: no adapters, everything trains."""
    alpha: float = 16.0
    """The low-rank part counts alpha / rank."""
    targets: str = r"attn/(q|v)$"
    """A pattern found in the paths of the layers that are adapted: layer_0/attn/q, layer_0/mlp/up, ..."""
    stabilised: bool = False
    """Count it alpha / sqrt(rank) instead."""

    def __post_init__(self):
        check_numbers(self, "lora.")
        if self.rank < 0:
            raise SettingError(f"lora.rank must not be negative, but is {self.rank}.")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise SettingError(
                f"lora.targets {self.targets!r} is no regular expression: {error}."
            ) from error

    def settings(self) -> low_rank.LoRA | None:
        return (
            low_rank.LoRA(self.rank, self.alpha, self.targets, self.stabilised)
            if self.rank
            else None
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """PPO: sample responses to prompts, score them with a reward, improve the policy, repeat."""

    model: str
    """The policy: a folder or a Hugging Face id in safetensors, or a .gguf file."""
    prompts: Path
    """A text file (one prompt a line) or .jsonl (one object a line, with a column "prompt")."""
    reward: str
    """my_file.py:function; or a reward model, as a folder or a Hugging Face id; of a text longer than its positions it reads the
    end."""
    reward_given: Literal["text", "tokens"] = "text"
    """What the function is called with: (prompts, responses), lists of texts, and the prompts' rows if it takes a third; or
    (tokens, mask, response_mask), jax arrays, under jit."""
    reward_label: str | None = None
    """Of a reward model with several labels, such as a classifier of sentiment, that whose logit is the score: name or number."""
    out: Path
    """Folder for metrics, samples, checkpoints and the final model."""
    eval_prompts: Path | None = None
    """Held-out prompts for evaluation, in the same formats."""
    critic: str = "separate"
    """shared: a value head on the policy's trunk; separate: a critic of its own that starts from the policy; or the reward model
    (a folder or a Hugging Face id, of one label) that a critic of its own starts from."""
    chat: bool = False
    """Put each prompt as a user's message through the tokenizer's chat template; prompts that are lists of messages always are."""
    stop_tokens: tuple[str, ...] = ()
    """Further tokens that end a response, each one token of the tokenizer; its own end token always does."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type; parameters are float32 always."""
    matmul_precision: Literal["default", "high", "highest"] = "default"
    """Of float32 matrix products: on a TPU default is one bfloat16 pass, high three, highest six, which is float32; on a GPU
    default may be TF32; a CPU always computes float32."""
    remat: bool = False
    """Recompute activations in the backward pass to save memory."""
    preset: Literal["default", "oai2019", "nplus", "trl"] = "default"
    """Settings to start from; options given beside it win."""
    resume: Resume = "no"
    """yes: go on from out's newest good checkpoint, with the same settings; auto: the same, or a fresh start if none is there."""
    deterministic: bool = False
    """Make XLA use GPU kernels that give the same bits every time (1.5 times as slow, see the README)."""
    mesh: str = ""
    """How devices share the work, such as data=2,fsdp=4: data and fsdp spread rows, fsdp and tensor cut parameters. Axes left out
    are 1, but data takes what is left. pmap: a replica on each device of one process."""
    processes: Processes = dataclasses.field(default_factory=Processes)
    lora: Adapters = dataclasses.field(default_factory=Adapters)
    loop: LoopConfig = dataclasses.field(default_factory=LoopConfig)
    ppo: PPOConfig = dataclasses.field(default_factory=PPOConfig)

    def run(self) -> None:
        if self.deterministic:
            provenance.make_deterministic()
        self.processes.start()
        if self.mesh == "pmap" and jax.process_count() > 1:
            raise SettingError(
                f"mesh=pmap runs in one process; for {jax.process_count()} take data={jax.device_count()}."
            )
        settings = flatten_dict(plain(self), sep=".")
        processes.check_same(
            {
                name: x
                for name, x in settings.items()
                if name != "out" and not name.startswith("processes.")
            }
        )
        check_free(self.out, resume=self.resume != "no")
        trainer, policy, adapters = self.build(self.out)
        with contextlib.ExitStack() as stack:
            if processes.is_first():
                stack.callback(
                    lock(self.out).release
                )  # the trainer's own ends before the model is written
            self._run(trainer, policy, adapters)

    def _run(
        self, trainer: Trainer, policy: pretrained.Pretrained, adapters: low_rank.LoRA | None
    ) -> None:
        done = int(trainer.state.update)
        processes.say(
            f"The run in {self.out} goes on after {done} updates."
            if done
            else f"A run starts in {self.out}; its first update takes longer, for it is compiled."
        )
        state = trainer.run()
        digest, base = hashing.digest(state.train.params), policy.params
        tuned = placement.to_host(state.policy, everywhere=False)
        if adapters is not None:
            base = placement.to_host(base, everywhere=False)
        processes.first_does(
            lambda: self._export(tuned, policy._replace(params=base), adapters, trainer.tokenizer)
        )
        processes.first_does(lambda: self._sum_up(int(state.update), digest))
        processes.say(
            f"The fine-tuned model is in {self.out / 'model'}; every update's metrics are in "
            f"{self.out / 'metrics.jsonl'}.\nDigest of the final parameters: {digest}"
        )

    def _export(
        self,
        tuned: Params,
        policy: pretrained.Pretrained,
        adapters: low_rank.LoRA | None,
        tokenizer: Any,
    ) -> None:
        try:
            self._write(tuned, policy, adapters, tokenizer)
        except ValueError as error:
            raise ValueError(
                f"{error} The last checkpoint holds the result; with room for it, --resume yes writes it."
            ) from error

    def _write(
        self,
        tuned: Params,
        policy: pretrained.Pretrained,
        adapters: low_rank.LoRA | None,
        tokenizer: Any,
    ) -> None:
        if adapters is not None:
            kind = policy.hf_config["model_type"]
            adapter_files.save_adapter(
                self.out / "adapter", tuned, adapters, policy.config, kind, self.model
            )
            tuned = low_rank.merge(overlay(policy.params, tuned), adapters.scale)
        pretrained.save_policy(self.out / "model", policy._replace(params=tuned), tokenizer)

    def _sum_up(self, updates: int, digest: str) -> None:
        lines = read_lines(
            self.out / "metrics.jsonl"
        )  # of the last update there may be two: an evaluation has its own
        metrics = {
            k: v
            for row in lines
            if row["update"] == lines[-1]["update"]
            for k, v in row.items()
            if k != "update"
        }
        write_json(self.out / "summary.json", {"updates": updates, "digest": digest, **metrics})

    def build(
        self, out: Path, loop: LoopConfig | None = None
    ) -> tuple[Trainer, pretrained.Pretrained, low_rank.LoRA | None]:
        """Reads everything, and makes a trainer that writes to `out`; beside it the policy as it came, and the adapters."""
        jax.config.update("jax_default_matmul_precision", self.matmul_precision)
        mesh = None if self.mesh == "pmap" else meshes.make_mesh(meshes.parse_mesh(self.mesh))
        mesh = None if mesh is None or mesh.size == 1 else mesh
        meshes.check_rows(
            self.ppo,
            jax.local_device_count() if self.mesh == "pmap" else meshes.devices_of_rows(mesh),
        )
        policy, tokenizer = load_model(self.model, self.dtype, self.remat, mesh)
        check_top_k(self.ppo.top_k, policy.config)
        reward = load_reward(self.reward, self.reward_given, self.reward_label)
        prompts, held_out = (
            None
            if path is None
            else load_prompts(path, tokenizer, policy, self.ppo.max_new_tokens, self.chat)
            for path in (self.prompts, self.eval_prompts)
        )
        adapters = self.lora.settings()
        if adapters is not None:
            policy = policy._replace(
                config=dataclasses.replace(policy.config, lora_scale=adapters.scale)
            )
        longest = (
            max(p.tokens.shape[1] for p in (prompts, held_out) if p is not None)
            + self.ppo.max_new_tokens
        )
        critic, critic_params = self.make_critic(policy, longest, mesh)
        stops = stop_ids(tokenizer, policy, self.stop_tokens)
        agent = iteration.Agent(
            language_model(policy.config), critic, self.ppo, stops, pad_id(tokenizer)
        )
        params, frozen = {"policy": policy.params, "critic": critic_params}, None
        if adapters is not None:
            params, frozen = low_rank.adapt(params, iteration.init_key(self.loop.seed, 1), adapters)
        trainer = Trainer(
            agent,
            params,
            tokenizer,
            prompts,
            reward,
            out=out,
            loop=loop or self.loop,
            eval_prompts=held_out,
            frozen=frozen,
            settings=self,
            resume=self.resume,
            mesh=mesh,
            pmap=self.mesh == "pmap",
        )
        return trainer, policy, adapters

    def make_critic(self, policy: pretrained.Pretrained, longest: int, mesh: Mesh | None = None):
        """The critic's function and its first parameters; it reads up to `longest` tokens."""
        if self.critic == "shared":
            return heads.shared_critic(), {"head": heads.zero_head(policy.config.width)}
        if self.critic == "separate":
            key = iteration.init_key(self.loop.seed, 0)
            return heads.separate_critic(policy.config), heads.init_scorer(
                policy.config, key, trunk=policy.params
            )
        try:
            scorer = scorers.load_scorer(
                self.critic, dtype=policy.config.dtype, remat=self.remat, mesh=mesh
            )
        except ValueError as error:
            raise ValueError(
                f"The critic must start from a reward model of one label: {error}"
            ) from error
        if scorer.config.vocab_size != policy.config.vocab_size:
            raise ValueError(
                f"The critic {self.critic} has vocab_size={scorer.config.vocab_size}, the policy {policy.config.vocab_size}: it "
                "must read the policy's tokens."
            )
        if scorer.config.positions < longest:
            raise ValueError(
                f"The critic {self.critic} has {scorer.config.positions} positions; the longest prompt and "
                f"max_new_tokens={self.ppo.max_new_tokens} need {longest}."
            )
        scorer_config = dataclasses.replace(scorer.config, lora_scale=policy.config.lora_scale)
        return heads.separate_critic(scorer_config), scorer.params
