"""The command `ppo-jax`: every stage on one's own model, data and reward."""

import dataclasses
import importlib.util
import itertools
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from ppo_jax import data, iteration, reward_model, rollout, sft
from ppo_jax.config import PRESETS, PPOConfig
from ppo_jax.logging import claim, plain, write_json
from ppo_jax.models import heads, pretrained
from ppo_jax.models.transformer import language_model
from ppo_jax.reward_functions import ModelReward, RewardFn, TextReward
from ppo_jax.train import LoopConfig, Trainer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """PPO: sample responses to prompts, score them with a reward, improve the policy, repeat."""

    model: str
    """The policy: a folder or a Hugging Face id of a GPT-2 checkpoint."""
    prompts: Path
    """A text file (one prompt a line) or .jsonl (one object a line, with a column "prompt")."""
    reward: str
    """my_file.py:function, called with lists of prompts and responses; or the folder of a reward model."""
    out: Path
    """Folder for metrics, samples, checkpoints and the final model."""
    eval_prompts: Path | None = None
    """Held-out prompts for evaluation, in the same formats."""
    critic: Literal["shared", "separate"] = "separate"
    """A value head on the policy's trunk, or a critic of its own that starts from the policy."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type; parameters are float32 always."""
    remat: bool = False
    """Recompute activations in the backward pass to save memory."""
    preset: Literal["default", "oai2019", "nplus", "trl"] = "default"
    """Settings to start from; options given beside it win."""
    loop: LoopConfig = dataclasses.field(default_factory=LoopConfig)
    ppo: PPOConfig = dataclasses.field(default_factory=PPOConfig)

    def run(self) -> None:
        if self.loop.updates < 1:
            raise ValueError(f"loop.updates must be at least 1, not {self.loop.updates}.")
        policy, tokenizer = _load(self.model, self.dtype, self.remat)
        reward = load_reward(self.reward)
        prompts = _prompts(self.prompts, tokenizer, policy, self.ppo.max_new_tokens)
        held_out = None
        if self.eval_prompts is not None:
            held_out = _prompts(self.eval_prompts, tokenizer, policy, self.ppo.max_new_tokens)
        key = jax.random.key(self.loop.seed)
        if self.critic == "shared":
            critic, critic_params = heads.shared_critic(), {"head": heads.init_head(policy.config.width, key)}
        else:
            critic = heads.separate_critic(policy.config)
            critic_params = heads.init_scorer(policy.config, key, trunk=policy.params)
        agent = iteration.Agent(language_model(policy.config), critic, self.ppo, (tokenizer.eos_token_id,), _pad_id(tokenizer))
        params = {"policy": policy.params, "critic": critic_params}
        trainer = Trainer(
            agent, params, tokenizer, prompts, reward, out=self.out, loop=self.loop, eval_prompts=held_out, settings=self
        )
        metrics: dict[str, float] = {}
        state = trainer.run(on_update=metrics.update)
        pretrained.save_policy(self.out / "model", policy._replace(params=state.policy), tokenizer)
        write_json(self.out / "summary.json", {"updates": int(state.update), **metrics})
        print(f"The fine-tuned model is in {self.out / 'model'}; every update's metrics are in {self.out / 'metrics.jsonl'}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """What supervised stages share."""

    model: str
    """Where to start: a folder or a Hugging Face id of a GPT-2 checkpoint."""
    data: Path
    """Training rows, one JSON object a line."""
    out: Path
    """Folder for the result."""
    eval_data: Path | None = None
    """Held-out rows; by default a tenth of the training rows is held out."""
    length: int = 128
    """Tokens that a row is cut to."""
    epochs: int = 3
    """Passes over the rows."""
    batch_size: int = 16
    """Rows a step."""
    learning_rate: float = 5e-5
    """Peak of the cosine schedule."""
    weight_decay: float = 0.01
    """AdamW's decoupled decay."""
    seed: int = 0
    """Of the shuffles and of new parameters."""

    def rows(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        column = "response" if isinstance(self, SFT) else "chosen"
        rows = data.read_rows(self.data, column=column)
        if self.eval_data is not None:
            return rows, data.read_rows(self.eval_data, column=column)
        order = np.random.default_rng(self.seed).permutation(len(rows))
        held = max(len(rows) // 10, 1)
        return [rows[i] for i in order[held:]], [rows[i] for i in order[:held]]

    def fit(self, loss_fn, params, arrays, held):
        def show(epoch: int, loss: float, params) -> None:
            held_loss, accuracy = sft.evaluate_loss(loss_fn, params, held)
            print(f"epoch {epoch + 1}: loss {loss:.4f}, held out: loss {held_loss:.4f}, accuracy {accuracy:.3f}", flush=True)

        params = sft.fit(
            loss_fn, params, arrays, seed=self.seed, epochs=self.epochs, batch_size=self.batch_size,
            learning_rate=self.learning_rate, weight_decay=self.weight_decay, on_epoch=show,
        )  # fmt: skip
        loss, accuracy = sft.evaluate_loss(loss_fn, params, held)
        write_json(self.out / "summary.json", {"eval/loss": loss, "eval/accuracy": accuracy})
        return params


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFT(Fit):
    """Supervised fine-tuning on rows {"prompt": ..., "response": ...}; only the response is learned. Without a prompt, all is."""

    def run(self) -> None:
        policy, tokenizer = _load(self.model)
        claim(self.out)
        model = language_model(policy.config)

        def encode(rows):
            pairs = [(tokenizer(row.get("prompt", "") if "prompt" in row and row["prompt"] != row["response"] else "").input_ids,
                      [*tokenizer(row["response"]).input_ids, tokenizer.eos_token_id]) for row in rows]  # fmt: skip
            tokens, mask = data.pad([(p + r)[: self.length] for p, r in pairs], length=self.length, pad_id=0, left=False)
            learned = mask & (np.arange(self.length)[None] >= np.array([[len(p)] for p, _ in pairs]))
            return tokens, mask, learned

        train, held = (encode(rows) for rows in self.rows())
        params = self.fit(lambda p, *batch: sft.sft_loss(model, p, *batch), policy.params, train, held)
        pretrained.save_policy(self.out, policy._replace(params=params), tokenizer)
        write_json(self.out / "run.json", plain(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward(Fit):
    """A reward model from pairs: rows {"chosen": ..., "rejected": ...}, with a "prompt" before both if there is one."""

    def run(self) -> None:
        policy, tokenizer = _load(self.model)
        claim(self.out)
        score = heads.reward_model(policy.config)

        def encode(rows):
            arrays = []
            for side in ("chosen", "rejected"):
                texts = [(row["prompt"] if row["prompt"] != row["chosen"] else "") + row[side] for row in rows]
                ids = [tokenizer(text).input_ids[: self.length] for text in texts]
                arrays += data.pad(ids, length=self.length, pad_id=0, left=False)
            return tuple(arrays)

        def loss_fn(params, chosen, chosen_mask, rejected, rejected_mask):
            return reward_model.bradley_terry_loss(score(params, chosen, chosen_mask), score(params, rejected, rejected_mask))

        train, held = (encode(rows) for rows in self.rows())
        start = heads.init_scorer(policy.config, jax.random.key(self.seed), trunk=policy.params)
        params = self.fit(loss_fn, start, train, held)
        pretrained.save_scorer(self.out, policy._replace(params=params), tokenizer)
        write_json(self.out / "run.json", plain(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue prompts with a model."""

    model: str
    """A folder or a Hugging Face id."""
    prompts: list[str]
    """One or more texts."""
    max_new_tokens: int = 32
    """Longest response."""
    temperature: float = 1.0
    """Of sampling."""
    top_k: int | None = None
    """Sample among the k likeliest tokens."""
    top_p: float | None = None
    """Sample within this probability mass."""
    greedy: bool = False
    """Take the likeliest token."""
    seed: int = 0
    """Of sampling."""

    def run(self) -> None:
        for prompt, response in zip(self.prompts, self.responses(self.prompts), strict=True):
            print(f"{prompt}|{response}")

    def responses(self, texts: list[str]) -> list[str]:
        policy, tokenizer = _load(self.model)
        batch = data.encode_prompts(
            [{"prompt": text} for text in texts], tokenizer, positions=policy.config.positions,
            new_tokens=self.max_new_tokens, pad_id=_pad_id(tokenizer),
        )  # fmt: skip
        out = jax.jit(
            lambda params, key: rollout.generate(
                language_model(policy.config),
                params,
                key,
                jnp.asarray(batch.tokens),
                jnp.asarray(batch.mask),
                max_new_tokens=self.max_new_tokens,
                stop_ids=(tokenizer.eos_token_id,),
                pad_id=_pad_id(tokenizer),
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                greedy=self.greedy,
            )
        )(policy.params, jax.random.key(self.seed))
        return data.decode(tokenizer, out.responses, out.response_mask)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Mean reward of a model's responses to held-out prompts."""

    model: str
    """A folder or a Hugging Face id."""
    prompts: Path
    """A text file or .jsonl, as for train."""
    reward: str
    """As for train."""
    max_new_tokens: int = 32
    """Longest response."""
    temperature: float = 1.0
    """Of sampling."""
    seed: int = 0
    """Of sampling."""

    def run(self) -> None:
        rows = data.read_rows(self.prompts)
        reward, texts = load_reward(self.reward), [row["prompt"] for row in rows]
        sampler = Generate(
            model=self.model, prompts=texts, max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=self.seed
        )
        responses = sampler.responses(texts)
        empty = np.zeros((len(rows), 0), np.int32)
        scores = reward(None, data.Prompts(rows, empty, empty.astype(bool)), responses)
        print(f"mean score {scores.mean():.4f}, standard error {scores.std() / len(scores) ** 0.5:.4f}, {len(scores)} responses")


def load_reward(spec: str) -> RewardFn:
    """A reward of `file.py:function` or a reward model's folder.

    Raises:
      ValueError: if there is no such thing.
    """
    file, colon, name = spec.rpartition(":")
    if not colon or not file.endswith(".py"):
        scorer = pretrained.load_scorer(spec)
        _, tokenizer = _tokenizer(spec)
        score = jax.jit(heads.reward_model(scorer.config))
        return ModelReward(score, scorer.params, tokenizer, scorer.config.positions, _pad_id(tokenizer))
    if not Path(file).is_file():
        raise ValueError(f"The reward file {file} does not exist.")
    module_spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"The reward file {file} does not run: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, name, None)):
        raise ValueError(f"The reward file {file} has no function {name!r}.")
    return TextReward(getattr(module, name))


def _tokenizer(model: str) -> tuple[Path, Any]:
    from transformers import AutoTokenizer  # slow to import, and `--help` does without

    folder = pretrained.resolve(model)
    try:
        return folder, AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise ValueError(f"{folder} holds no tokenizer that transformers can load: {error}") from error


def _load(model: str, dtype: str = "float32", remat: bool = False) -> tuple[pretrained.Pretrained, Any]:
    policy = pretrained.load_policy(model, dtype=jnp.dtype(dtype), remat=remat)
    _, tokenizer = _tokenizer(model)
    pretrained.check_tokenizer(tokenizer, policy.config)
    return policy, tokenizer


def _pad_id(tokenizer: Any) -> int:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _prompts(path: Path, tokenizer: Any, policy: pretrained.Pretrained, new_tokens: int) -> data.Prompts:
    return data.encode_prompts(
        data.read_rows(path), tokenizer, positions=policy.config.positions, new_tokens=new_tokens, pad_id=_pad_id(tokenizer)
    )


def main(args: list[str] | None = None) -> None:
    """Entry point; every error that a user can mend is one sentence and exit status 2."""
    args = sys.argv[1:] if args is None else args
    chosen = next((b for a, b in itertools.pairwise(args) if a == "--preset"), "default")
    missing = tyro.MISSING
    train = Train(model=missing, prompts=missing, reward=missing, out=missing, ppo=PRESETS.get(chosen, PPOConfig()))
    commands = (
        Annotated[Train, tyro.conf.subcommand("train", default=train)]
        | Annotated[SFT, tyro.conf.subcommand("sft")]
        | Annotated[Reward, tyro.conf.subcommand("reward")]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Generate, tyro.conf.subcommand("generate")]
    )
    try:
        tyro.cli(commands, prog="ppo-jax", description="PPO fine-tuning of GPT-style language models.", args=args).run()
    except (ValueError, RuntimeError) as error:
        print(f"ppo-jax: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
