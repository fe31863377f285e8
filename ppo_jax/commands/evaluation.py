"""The command `ppo-jax evaluate`, which compares models and runs on held-out prompts."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from jax import Array
from rich.console import Console

from ppo_jax import data
from ppo_jax.commands.prompts import PromptOptions
from ppo_jax.commands.rewards import Rewards, check_rewards
from ppo_jax.commands.runs import stored_command
from ppo_jax.commands.train import Train
from ppo_jax.data.chat import as_user_messages
from ppo_jax.data.rows import Row
from ppo_jax.data.text import pad_id
from ppo_jax.errors import SettingError, check_numbers
from ppo_jax.models.io.pretrained import Pretrained
from ppo_jax.models.transformer import language_model
from ppo_jax.ppo.critic import no_critic
from ppo_jax.ppo.forward import forward_responses
from ppo_jax.ppo.iteration import sampler
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.ppo.state import Agent
from ppo_jax.reward_functions import RewardFn, load_rewards
from ppo_jax.run.assembly import load_model
from ppo_jax.run.collection import response_texts
from ppo_jax.run.encoding import check_top_k, encode_for, stop_ids
from ppo_jax.run.evaluation import Evaluation, evaluation_metrics, optimized_scores
from ppo_jax.run.files import append_lines, write_json
from ppo_jax.run.logging import finite
from ppo_jax.run.summary import FIGURES, figures_table
from ppo_jax.types import Params, Rollout


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Evaluate one or more models on held-out prompts: score, KL, length and distinct-2.

    The score is the one that training optimizes. If a model is the folder of a run, options that
    are not given are those of the run. A model that is no run uses those of the first run.
    """

    model: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    """A folder, a Hugging Face id, a .gguf file, or the folder of a run. Give the option several
    times to compare models."""
    prompts: str | None = None
    """Prompts, in the formats of ppo-jax train. By default the held-out prompts of the run."""
    reward: Rewards = ()
    """The reward, as in ppo-jax train. Several rewards are added up. By default that of the run."""
    reward_given: Literal["text", "tokens"] = "text"
    """Whether the function is called with texts or with arrays of tokens, as in ppo-jax train."""
    reward_label: str | None = None
    """Label whose logit is the score, for a reward model with several labels: name or number."""
    reward_timeout: float | None = None
    """Time limit in seconds of a reward function for one response, as in ppo-jax train."""
    reference: str | None = None
    """The model that the KL is measured from. By default the one that the run started from."""
    responses: int = 1
    """Number of responses to each prompt."""
    greedy: bool = False
    """Take the most probable token instead of sampling."""
    max_new_tokens: int | None = None
    """Greatest number of tokens of a response. By default that of the run, or 32."""
    temperature: float | None = None
    """Sampling temperature. By default that of the run, or 1."""
    top_k: int | None = None
    """Sample only among the k most probable tokens. By default as in the run."""
    top_p: float | None = None
    """Sample only among the most probable tokens whose total probability reaches p. By default as
    in the run."""
    chat: bool = False
    """Put each prompt as a user's message through the tokenizer's chat template, as a run may."""
    stop_tokens: tuple[str, ...] = ()
    """Further tokens that end a response. By default those of the run."""
    seed: int = 0
    """Seed of the samples."""
    batch_size: int = 64
    """Number of responses sampled at once. The samples do not depend on it."""
    out: Path | None = None
    """Folder for evaluation.json, with the figures, and responses.jsonl, with the texts."""
    data_options: tyro.conf.OmitArgPrefixes[PromptOptions] = field(default_factory=PromptOptions)

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.reward:
            check_rewards(self.reward, self.reward_timeout)
        for name in ("batch_size", "responses"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.greedy and self.responses > 1:
            raise SettingError(
                f"greedy gives the same response each time; use responses=1, not {self.responses}."
            )

    def run(self) -> None:
        """Evaluate the models, print a table of their figures, and write the files."""
        if not self.model:
            raise ValueError("evaluate needs a model; give --model once or several times.")
        if self.out is not None and any(self.out.glob("*")):
            raise ValueError(f"{self.out} is not empty; choose another folder for the evaluation.")
        runs = {name: _command_of(name) for name in self.model}
        first = next((run for run in runs.values() if run is not None), None)
        rows, reward = self._prompts(first), self._reward(first)
        reference = self.reference or (first.model if first else None)
        found = {
            name: self._evaluate(name, run or first, rows, reward, reference)
            for name, run in runs.items()
        }
        figures = {
            title: [evaluation.metrics.get(key) for evaluation in found.values()]
            for key, title in FIGURES.items()
        }
        figures["standard error of the score"] = [
            evaluation.metrics["eval/scores_error"] for evaluation in found.values()
        ]
        count = len(rows) * self.responses
        Console(soft_wrap=True).print(figures_table(f"{count} responses", list(found), figures))
        if self.out is not None:
            self._write(self.out, found, reference)

    def _prompts(self, run: Train | None) -> list[Row]:
        if self.prompts is not None:
            return data.read_rows(self.prompts, names=self.data_options.names())
        held_out = run.read_prompts()[1] if run else []
        if not held_out:
            raise ValueError(
                "evaluate needs --prompts, because no model is a run with held-out prompts."
            )
        return held_out

    def _reward(self, run: Train | None) -> RewardFn:
        source = self if self.reward else run
        if source is None:
            raise ValueError("evaluate needs --reward, because no model is a run.")
        return load_rewards(
            source.reward, source.reward_given, source.reward_label, source.reward_timeout
        )

    def _settings(self, run: Train | None) -> PPOConfig:
        """Return the settings of the run, or the default ones, with the options that were given."""
        names = ("max_new_tokens", "temperature", "top_k", "top_p")
        given = {name: x for name in names if (x := getattr(self, name)) is not None}
        base = run.ppo if run else PPOConfig(max_new_tokens=32)
        return replace(base, **given)

    def _evaluate(
        self,
        model: str,
        run: Train | None,
        rows: list[Row],
        reward: RewardFn,
        reference: str | None,
    ) -> Evaluation:
        """Sample the responses of a model, and compute their figures."""
        policy, tokenizer = load_model(model, dtype=run.dtype if run else "float32")
        config = self._settings(run)
        check_top_k(config.top_k, policy.config)
        rows = as_user_messages(rows) if self.chat or (run and run.chat) else rows
        prompts = encode_for(
            rows, tokenizer, policy.config, config.max_new_tokens, **self.data_options.limits()
        )
        stop_tokens = self.stop_tokens or (run.stop_tokens if run else ())
        agent = Agent(
            language_model(policy.config),
            no_critic,
            config,
            stop_ids(tokenizer, policy, stop_tokens),
            pad_id(tokenizer, policy.config.vocab_size),
        )
        other = None if reference is None else _reference(reference, policy)
        return self._sample(agent, tokenizer, policy, other, prompts, reward)

    def _sample(
        self,
        agent: Agent,
        tokenizer: Any,
        policy: Pretrained,
        reference: Pretrained | None,
        prompts: data.Prompts,
        reward: RewardFn,
    ) -> Evaluation:
        generate, logprobs = _steps(agent, greedy=self.greedy)
        total = len(prompts) * self.responses
        size, key = min(self.batch_size, total), jax.random.key(self.seed)
        found: dict[str, list[Any]] = {"scores": [], "lengths": [], "texts": [], "kl": []}
        for first in range(0, total, size):
            # The last batch is filled up with the first prompts, so that one shape is compiled.
            ids = np.arange(first, first + size)
            batch, keep = prompts.take(ids % len(prompts)), min(size, total - first)
            out = generate(policy.params, key, batch.tokens, batch.mask, row_ids=ids)
            if reference is not None:
                kl = logprobs(policy.params, out) - logprobs(reference.params, out)
                found["kl"].extend(np.where(out.response_mask, kl, 0).sum(axis=1)[:keep])
            out = jax.tree.map(lambda x, n=keep: np.asarray(x)[:n], out)
            batch = batch.take(np.arange(keep))
            texts = response_texts(agent, tokenizer, out)
            task = reward(out, batch, texts).total(out.response_mask)
            found["scores"].extend(optimized_scores(agent.config, task, out.ended))
            found["lengths"].extend(out.response_mask.sum(axis=1))
            found["texts"].extend(texts)
        scores = np.array(found["scores"])
        moved = np.array(found["kl"]) if reference is not None else None
        metrics = evaluation_metrics(scores, np.array(found["lengths"]), found["texts"], moved)
        return Evaluation(metrics, found["texts"], scores, prompts.texts * self.responses)

    def _write(self, out: Path, found: dict[str, Evaluation], reference: str | None) -> None:
        """Write the figures and the texts."""
        out.mkdir(parents=True, exist_ok=True)
        for name, evaluation in found.items():
            rows = [{"model": name, **row} for row in evaluation.rows()]
            append_lines(out / "responses.jsonl", rows)
        models = {name: finite(evaluation.metrics) for name, evaluation in found.items()}
        write_json(out / "evaluation.json", {"reference": reference, "models": models})
        print(f"The figures and texts are in {out}.")


def _command_of(model: str) -> Train | None:
    """Return the options of a run, or None if a model is no folder of a run."""
    folder = Path(model)
    of_run = all((path / "config.json").is_file() for path in (folder, folder / "model"))
    return stored_command(folder) if of_run else None


def _steps(agent: Agent, *, greedy: bool) -> tuple[Callable[..., Rollout], Callable[..., Array]]:
    """Compile sampling as in training, and the log-probs `[B, R]` of the sampled tokens."""
    c = agent.config
    generate = partial(sampler(agent), greedy=greedy)

    def logprobs(params: Params, out: Rollout) -> Array:
        forward = partial(forward_responses, temperature=c.temperature, chunk=c.logit_chunk)
        both = {"policy": params, "critic": {}}
        return forward(
            agent.model, agent.critic, both, out.tokens, out.mask, out.prompt_length
        ).logprobs

    return jax.jit(generate), jax.jit(logprobs)


def _reference(reference: str, policy: Pretrained) -> Pretrained:
    """Read the reference, and check that it has the policy's vocabulary."""
    dtype = policy.config.dtype
    read, _ = load_model(reference, dtype=jax.numpy.dtype(dtype).name)
    if read.config.vocab_size != policy.config.vocab_size:
        raise ValueError(
            f"The reference {reference} has vocab_size={read.config.vocab_size} and the policy has "
            f"{policy.config.vocab_size}; choose another --reference."
        )
    return read
