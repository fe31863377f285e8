"""What `ppo-jax evaluate` does."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from rich.console import Console

from ppo_jax import data
from ppo_jax.commands.evaluation import Evaluate
from ppo_jax.commands.prompts import PromptOptions
from ppo_jax.commands.stored import stored_command
from ppo_jax.commands.train import Train
from ppo_jax.commands.training import held_out_source, read_prompts
from ppo_jax.data.chat import as_user_messages
from ppo_jax.data.rows import Row
from ppo_jax.data.text import pad_id
from ppo_jax.models.io.pretrained import Pretrained
from ppo_jax.models.io.stored import read_config
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
from ppo_jax.run.files import append_lines, check_links, write_json
from ppo_jax.run.logging import finite
from ppo_jax.run.summary import figures_table, shown_figures
from ppo_jax.types import Params, Rollout


def evaluate_models(options: Evaluate) -> None:
    """Evaluate the models, print a table of their figures, and write the files."""
    if not options.model:
        raise ValueError("evaluate needs a model; give --model once or several times.")
    if options.out is not None:
        check_links(options.out)
        if any(options.out.glob("*")):
            raise ValueError(
                f"{options.out} is not empty; choose another folder for the evaluation."
            )
    runs = _runs(options)
    first = next((run for run in runs.values() if run is not None), None)
    rows, reward = _prompts(options, first), _reward(options, first)
    if options.prompts is None:
        _report_trained_on(rows, runs)
    reference = options.reference or (first.model if first else None)
    found = {
        name: _evaluate(options, name, run or first, rows, reward, reference)
        for name, run in runs.items()
    }
    figures = {
        title: [evaluation.metrics.get(key) for evaluation in found.values()]
        for key, title in shown_figures([x.metrics for x in found.values()]).items()
    }
    figures["standard error of the score"] = [
        evaluation.metrics["eval/scores_error"] for evaluation in found.values()
    ]
    counts = sorted({len(evaluation.responses) for evaluation in found.values()})
    title = f"{' to '.join(map(str, counts[:: len(counts) - 1 or 1]))} responses"
    Console(soft_wrap=True).print(figures_table(title, list(found), figures))
    if options.out is not None:
        _write(options, options.out, found, reference)


def _runs(options: Evaluate) -> dict[str, Train | None]:
    """Return the options of each run, or None for a model that is no run, which must exist."""
    runs = {name: _command_of(name) for name in options.model}
    if len(runs) < len(options.model):
        twice = next(name for name in runs if options.model.count(name) > 1)
        raise ValueError(f"evaluate has --model {twice} more than once; give each model once.")
    for name, run in runs.items():
        if run is None:
            read_config(name)
    return runs


def _report_trained_on(rows: list[Row], runs: Mapping[str, Train | None]) -> None:
    """Say which of the held-out prompts of the first run another run was trained on."""
    (name, first), *others = ((name, run) for name, run in runs.items() if run is not None)
    split = lambda run: (run.eval_prompts, run.eval_fraction, run.eval_seed)
    for other, run in others:
        if run.prompts != first.prompts or split(run) == split(first):
            continue
        known = {repr(row["prompt"]) for row in read_prompts(run)[0]}
        count = sum(repr(row["prompt"]) in known for row in rows)
        if count:
            print(
                f"{other} was trained on {count} of the {len(rows)} held-out prompts of {name}; "
                "pass others with --prompts."
            )


def _data_options(options: Evaluate, run: Train | None) -> PromptOptions:
    """Return the run's options about prompts, with those that were given in their place."""
    if run is None:
        return options.data_options
    default = asdict(PromptOptions())
    given = {k: x for k, x in asdict(options.data_options).items() if x != default[k]}
    columns = {name: default[name] for name in ("prompt_column", "messages_column")}
    # A column that was given is not to be combined with the other column of the run.
    return replace(run.data_options, **(columns if columns.keys() & given.keys() else {}) | given)


def _prompts(options: Evaluate, run: Train | None) -> list[Row]:
    if options.prompts is not None:
        return data.read_rows(options.prompts, names=_data_options(options, run).names())
    held_out = read_prompts(run)[1] if run else []
    if not held_out:
        raise ValueError(
            "evaluate needs --prompts, because no model is a run with held-out prompts."
        )
    return held_out


def _reward(options: Evaluate, run: Train | None) -> RewardFn:
    source = options if options.reward else run
    if source is None:
        raise ValueError("evaluate needs --reward, because no model is a run.")
    return load_rewards(
        source.reward, source.reward_given, source.reward_label, source.reward_timeout
    )


def _settings(options: Evaluate, run: Train | None) -> PPOConfig:
    """Return the settings of the run, or the default ones, with the options that were given."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p")
    given = {name: x for name in names if (x := getattr(options, name)) is not None}
    base = run.ppo if run else PPOConfig(max_new_tokens=32)
    return replace(base, **given)


def _evaluate(
    options: Evaluate,
    model: str,
    run: Train | None,
    rows: list[Row],
    reward: RewardFn,
    reference: str | None,
) -> Evaluation:
    """Sample the responses of a model, and compute their figures."""
    policy, tokenizer = load_model(model, dtype=run.dtype if run else "float32")
    config = _settings(options, run)
    check_top_k(config.top_k, policy.config)
    rows = as_user_messages(rows) if options.chat or (run and run.chat) else rows
    data_options = _data_options(options, run)
    prompts = encode_for(
        rows, tokenizer, policy.config, config.max_new_tokens, **data_options.limits()
    )
    source = options.prompts or (held_out_source(run) if run else "")
    if (note := data_options.report(prompts, source)) is not None:
        print(f"{model}: {note}")
    stop_tokens = options.stop_tokens or (run.stop_tokens if run else ())
    agent = Agent(
        language_model(policy.config),
        no_critic,
        config,
        stop_ids(tokenizer, policy, stop_tokens),
        pad_id(tokenizer, policy.config.vocab_size),
    )
    other = None if reference is None else _reference(reference, policy)
    return _sample(options, agent, tokenizer, policy, other, prompts, reward)


def _sample(
    options: Evaluate,
    agent: Agent,
    tokenizer: Any,
    policy: Pretrained,
    reference: Pretrained | None,
    prompts: data.Prompts,
    reward: RewardFn,
) -> Evaluation:
    generate, logprobs = _steps(agent, greedy=options.greedy)
    total = len(prompts) * options.responses
    size, key = min(options.batch_size, total), jax.random.key(options.seed)
    names = ("scores", "lengths", "texts", "kl", "parts")
    found: dict[str, list[Any]] = {name: [] for name in names}
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
        task = reward(out, batch, texts)
        total_scores = task.total(out.response_mask)
        found["scores"].extend(optimized_scores(agent.config, total_scores, out))
        found["parts"].append(task.parts or {})
        found["lengths"].extend(out.response_mask.sum(axis=1))
        found["texts"].extend(texts)
    scores = np.array(found["scores"])
    moved = np.array(found["kl"]) if reference is not None else None
    lengths = np.array(found["lengths"])
    metrics = evaluation_metrics(scores, lengths, found["texts"], moved, found["parts"])
    return Evaluation(metrics, found["texts"], scores, prompts.texts * options.responses)


def _write(
    options: Evaluate, out: Path, found: dict[str, Evaluation], reference: str | None
) -> None:
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
