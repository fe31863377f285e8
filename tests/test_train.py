"""Test training end to end on a tiny model: the trainer, rewards, and the commands."""

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from helpers import (
    ROOT,
    SIMPLE_PPO,
    WORDS,
    command_line,
    full_trainer,
    likes_b,
    options,
    simple_trainer,
    tiny_policy,
    word_tokenizer,
)

from ppo_jax import cli, data
from ppo_jax.errors import SettingError
from ppo_jax.models import heads, lora
from ppo_jax.models.io import adapter_files, pretrained, scorers
from ppo_jax.models.transformer import language_model
from ppo_jax.ops.metrics import explained_variance
from ppo_jax.ppo import iteration
from ppo_jax.ppo.choices import Loss
from ppo_jax.ppo.loss import ppo_loss_fn
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.ppo.state import overlay
from ppo_jax.reward_functions import RewardError, TextReward, TokenReward, check_scores
from ppo_jax.reward_functions.loading import load_reward
from ppo_jax.run.files import read_lines
from ppo_jax.types import Rollout


@pytest.mark.parametrize("shared", [pytest.param(False, marks=pytest.mark.slow), True])
def test_learns_and_writes_its_folder(tmp_path, shared):
    run = simple_trainer(tmp_path / "run", shared=shared, updates=40)
    seen = []
    run.run(on_update=seen.append)
    assert seen[-1]["objective/scores"] > seen[0]["objective/scores"] + 0.3
    assert max(m["policy/first_ratio_error_max"] for m in seen) < 2e-6
    assert seen[0]["objective/kl"] == 0 and all(m["policy/first_clipfrac"] == 0 for m in seen)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in lines if "objective/kl" in row] == list(range(40))
    assert "eval/scores" in lines[-1]
    assert (
        json.loads((tmp_path / "run/config.json").read_text())["settings"]["ppo"]["score_at"]
        == "last_token"
    )
    with pytest.raises(ValueError, match="holds another run"):
        simple_trainer(tmp_path / "run")


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    """It is packed and has slots, and its responses are of 1 to 80 tokens; one program does all."""
    changes = {"kl_target": 0.5, "scale_scores": True, "rollout_slots": 4, "pack": 128}
    ppo = dataclasses.replace(SIMPLE_PPO, **changes, batch_size=16, epochs=1, max_new_tokens=80)
    traced, lengths = [], []

    def reward(prompts, responses):
        lengths.extend(len(response.split()) for response in responses)
        return likes_b(prompts, responses)

    settings = {"ppo": ppo, "positions": 96, "reward": reward, "updates": 3}
    trainer = functools.partial(simple_trainer, **settings)
    half = trainer(tmp_path / "half", save_every=2)
    half.step()
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: traced.append(name))
    half.step()
    assert not [name for name in traced if "compile" in name], traced
    half.save()
    half.checkpoints.close()
    again = trainer(tmp_path / "half", resume="yes")
    assert int(again.state.update) == 2
    resumed = again.run()
    assert min(lengths) < 16 and max(lengths) > 64  # in two blocks of a bin, with its prompt
    whole = trainer(tmp_path / "whole").run()
    for a, b in zip(
        jax.tree.leaves(whole.train.params), jax.tree.leaves(resumed.train.params), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert float(whole.kl.coef) == float(resumed.kl.coef) != ppo.kl_coef
    assert float(whole.scale.count) == float(resumed.scale.count)


def test_a_second_update_compiles_nothing(tmp_path):
    run = simple_trainer(tmp_path / "run")
    run.step()
    traced = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: traced.append(name))
    run.step()
    assert not [name for name in traced if "compile" in name], traced


def test_samples_and_shuffles_differ_between_updates():
    state = iteration.PPOState(None, None, None, jax.random.key(0), jax.numpy.int32(0))
    keys = [state.replace(update=jax.numpy.int32(u)).key_for(p) for u in range(5) for p in (0, 1)]
    assert len({tuple(jax.random.key_data(k).tolist()) for k in keys}) == 10


@pytest.mark.parametrize("n, size", [(10, 4), (4, 10), (8, 8)])
def test_batches_use_every_row_before_repeating_one(n, size):
    stream = np.concatenate([data.batch_rows(n, size, update, seed=3) for update in range(n)])
    for one_pass in stream.reshape(-1, n):
        assert sorted(one_pass) == list(range(n))
    assert (stream[:n] != stream[n : 2 * n]).any()


@pytest.mark.parametrize(
    "scores, message",
    [
        ([1.0], "shape"),
        (["a", "b"], "'a' for response 0, which is no number"),
        ([1.0, float("nan")], "nan for response 1"),
        ([[1.0], [2.0]], r"\[1.0\] for response 0, which is no number"),
        (np.ones((2, 1)), "shape"),
        (None, "numbers"),
    ],
)
def test_invalid_scores_are_refused(scores, message):
    with pytest.raises(RewardError, match=message):
        check_scores(scores, (2,))


def test_a_token_reward_may_score_responses_tokens_or_both():
    mask = jax.numpy.array([[True, True, False], [True, True, True]])
    rollout = Rollout(
        jax.numpy.zeros((2, 4), int),
        jax.numpy.ones((2, 4), bool),
        mask,
        jax.numpy.zeros((2, 3)),
        mask[:, 0],
    )
    of_tokens = lambda tokens, mask, real: jax.numpy.where(real, 0.5, 9.0)
    of_both = lambda tokens, mask, real: (real.sum(axis=1), of_tokens(tokens, mask, real))
    ask = lambda function: TokenReward(function)(rollout, None, ["", ""])
    np.testing.assert_array_equal(ask(lambda t, m, real: real.sum(axis=1)).response, [2, 3])
    assert ask(lambda t, m, real: real.sum(axis=1)).tokens is None
    np.testing.assert_array_equal(ask(of_tokens).total(mask), [1, 1.5])
    np.testing.assert_array_equal(ask(of_both).total(mask), [3, 4.5])
    for wrong, message in (
        (lambda t, m, r: (r, r, r), "3 arrays"),
        (lambda t, m, r: t, "shape"),
        (lambda t, m, r: 1 / 0, "Zero"),
    ):
        with pytest.raises(RewardError, match=message):
            ask(wrong)


@pytest.mark.slow
def test_a_run_learns_from_a_token_reward(tmp_path):
    """Each occurrence of the token "b" is rewarded at its own step."""
    run = simple_trainer(
        tmp_path / "run", reward=None, updates=25, wrap=lambda _: TokenReward(pays_for_b)
    )
    seen = []
    run.run(on_update=seen.append)
    assert seen[-1]["objective/scores"] > seen[0]["objective/scores"] + 0.5


def pays_for_b(tokens, mask, response_mask):
    return (tokens[:, -response_mask.shape[1] :] == WORDS.index("b")) * 0.5


def test_an_exception_of_a_reward_is_named(tmp_path):
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        simple_trainer(tmp_path / "run", reward=lambda prompts, responses: 1 / 0).step()


def test_a_reward_with_a_parameter_rows_gets_the_rows():
    rows = [{"prompt": "a", "answer": "b"}]
    prompts = data.Prompts(rows, np.zeros((1, 1), np.int32), np.ones((1, 1), bool))
    reward = TextReward(lambda prompts, responses, rows: [float(rows[0]["answer"] == responses[0])])
    assert reward(None, prompts, ["b"]).response.tolist() == [1.0]


@pytest.fixture
def folder(tmp_path):
    pretrained.save_policy(tmp_path / "model", tiny_policy(layers=1), word_tokenizer())
    (tmp_path / "prompts.txt").write_text("a b\nc\n")
    (tmp_path / "long.txt").write_text("a " * 40)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "broken.jsonl").write_text('{"prompt": 3}\n')
    (tmp_path / "needy.py").write_text("def score(prompts, responses, answer): return []")
    (tmp_path / "reward.py").write_text(
        "def score(prompts, responses):\n    return [len(r) / 3 for r in responses]\n"
        "def count(tokens, mask, response_mask):\n    return response_mask.sum(axis=1)\n"
    )
    return tmp_path


def train_command(folder, **changes):
    given = {
        "model": folder / "model",
        "prompts": folder / "prompts.txt",
        "reward": f"{folder / 'reward.py'}:score",
        "out": folder / "out",
        "loop.updates": 2,
        "ppo.batch-size": 8,
        "ppo.max-new-tokens": 4,
    } | changes
    return ["train", "--loop.no-progress", "--mesh", "data=1", *options(given)]


def evaluate_command(folder, **given):
    model, prompts = folder / "out/model", folder / "prompts.txt"
    return command_line("evaluate", model=model, prompts=prompts, **{"max-new-tokens": 3}, **given)


@pytest.mark.parametrize(
    "rows, flags, message",
    [
        ([{"response": "a"}], "--learn-from scores", "needs a column 'score' or 'label'"),
        (
            [{"response": "a", "score": 1}],
            "--learn-from scores --label-column none",
            "so label_column cannot be none",
        ),
        (
            [{"response": "a", "score": 0.5}],
            "--learn-from classes",
            "Row 0 needs a class 0, 1, 2, ... in 'score', not 0.5",
        ),
        ([{"response": "a", "score": 0}], "--learn-from classes", "single class"),
        (
            [{"chosen": "a"}],
            "",
            "needs a column 'rejected', but its columns are: 'chosen'. To learn",
        ),
        ([{"chosen": "a", "rejected": ""}], "", "no text in 'rejected'"),
    ],
)
def test_unusable_rows_of_reward_training_are_named(folder, rows, flags, message, capsys):
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows * 20))
    with pytest.raises(SystemExit):
        paths = {"model": folder / "model", "data": folder / "rows.jsonl", "out": folder / "new"}
        cli.main([*command_line("reward", **paths), *flags.split()])
    assert message in capsys.readouterr().err
    assert not (folder / "new").exists()


@pytest.mark.slow
def test_the_commands_take_token_rewards(folder, capsys):
    reward = {"reward": f"{folder / 'reward.py'}:count", "reward-given": "tokens"}
    cli.main(train_command(folder, **reward))
    cli.main(evaluate_command(folder, **reward))
    assert "2 responses" in capsys.readouterr().out


OWN_METHODS = """
import jax.numpy as jnp
from ppo_jax import clipped_policy_loss, discounted_returns

def advantage(rewards, values, mask, *, rollout, scores):
    returns = discounted_returns(rewards, mask, gamma=1.0)
    return returns, returns

def loss(*arrays, aggregate):
    return clipped_policy_loss(*arrays, clip_low=0.2, clip_high=0.2, aggregate=aggregate)
"""


@pytest.mark.slow
def test_the_command_takes_methods_of_your_own(folder, capsys):
    """They do what the settings do, and a run goes on with the same ones only."""
    file = folder / "own.py"
    file.write_text(OWN_METHODS)
    own = {"advantage": f"{file}:advantage", "loss": f"{file}:loss", "critic": "none"}
    cli.main(train_command(folder, **own))
    cli.main(train_command(folder, out=folder / "named", **{"ppo.advantage": "monte_carlo"}))
    summaries = [json.loads((folder / x / "summary.json").read_text()) for x in ("out", "named")]
    assert summaries[0]["digest"] == summaries[1]["digest"]
    changed = OWN_METHODS + "\n"
    without_loss = {name: own[name] for name in ("advantage", "critic")}
    for text, given in ((OWN_METHODS, without_loss), (changed, own)):
        file.write_text(text)
        with pytest.raises(SystemExit):
            cli.main(train_command(folder, resume="yes", **given))
        name = "loss" if text == OWN_METHODS else "advantage"
        assert f"The {name} of the run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(train_command(folder, loss="nothing", out=folder / "new"))
    assert "The loss must be like my_file.py:function" in capsys.readouterr().err


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_mistake_in_a_method_of_your_own_is_found_before_a_folder_is_made(folder, capsys, more):
    file = folder / "own.py"
    file.write_text(
        "def one(rewards, values, mask, *, rollout, scores):\n    return rewards\n"
        "def terms(logprobs, old_logprobs, advantages, mask, *, aggregate):\n    return logprobs\n"
    )
    for given, message in (
        ({"advantage": f"{file}:one"}, "one must return two arrays of [8, 4], not one of [8, 4]."),
        ({"loss": f"{file}:terms"}, "terms must return one number"),
    ):
        with pytest.raises(SystemExit):
            cli.main([*train_command(folder, **given), *more])
        assert message in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_an_existing_run_is_found_before_the_model_is_loaded(folder, capsys):
    (folder / "out").mkdir()
    (folder / "out/config.json").write_text("{}")
    with pytest.raises(SystemExit):
        cli.main(train_command(folder, model="no such model"))
    assert "holds another run" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("critic", ["shared", "separate", "reward model"])
def test_the_command_trains_adapters(folder, critic):
    """The exported model equals the base with the exported adapter merged."""
    if critic == "reward model":
        critic = str(folder / "scorer")
        save_scorer(critic)
    cli.main(
        train_command(
            folder,
            **{
                "lora.rank": 2,
                "lora.targets": "attn/(q|o)$",
                "critic": critic,
                "ppo.learning-rate": 1e-2,
            },
        )
    )
    base, tuned = (pretrained.load_policy(folder / name) for name in ("model", "out/model"))
    adapters, scale = adapter_files.load_adapter(folder / "out/adapter", base.config, "gpt2")
    merged = lora.merge(overlay(base.params, adapters), scale)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), merged, tuned.params)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), base.params, tuned.params)
    assert (
        moved["layer_0"]["attn"]["q"]["kernel"]
        and not moved["layer_0"]["attn"]["k"]["kernel"]
        and not moved["embedding"]
    )


@pytest.mark.parametrize(
    "option, changes, message",
    [
        (
            "critic",
            {"positions": 5},
            "critic has 5 positions; the longest prompt and max_new_tokens=4 need 6",
        ),
        (
            "reward",
            {"vocab_size": 20},
            "nor a reward model: The tokenizer gives ids up to 20, but the model has vocab_size=20",
        ),
    ],
)
def test_critic_and_reward_model_must_fit_the_policy(folder, capsys, option, changes, message):
    save_scorer(folder / "scorer", **changes)
    with pytest.raises(SystemExit):
        cli.main(train_command(folder, **{option: folder / "scorer"}))
    assert re.search(message, capsys.readouterr().err)


def test_a_reward_model_reads_the_end_of_a_long_text(folder):
    save_scorer(folder / "scorer", positions=4)
    scores = load_reward(str(folder / "scorer")).score_texts(["a b c d e f", "c d e f", "f e d c"])
    assert scores[0] == scores[1] != scores[2]


def save_scorer(path, **changes):
    base = tiny_policy(layers=1, **changes)
    scorers.save_scorer(
        path,
        base._replace(params=heads.init_scorer(base.config, jax.random.key(3))),
        word_tokenizer(),
    )


@pytest.mark.slow
def test_a_label_of_a_classifier_is_the_reward(folder, capsys):
    """A score is the logit of the chosen label, which is required and cannot change on resume."""
    config = transformers.DistilBertConfig(
        vocab_size=len(WORDS),
        dim=16,
        n_layers=1,
        n_heads=2,
        hidden_dim=16,
        max_position_embeddings=20,
        initializer_range=0.3,
        pad_token_id=0,
        id2label={0: "BAD", 1: "GOOD"},
        label2id={"BAD": 0, "GOOD": 1},
    )
    classes = transformers.DistilBertForSequenceClassification(config).eval()
    classes.save_pretrained(folder / "classes")
    word_tokenizer().save_pretrained(folder / "classes")
    with pytest.raises(SystemExit):
        cli.main(train_command(folder, reward=folder / "classes"))
    assert "scores by labels (BAD, GOOD): reward_label must name one" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(train_command(folder, critic=folder / "classes"))
    assert "The critic must start from a reward model with one label: " in capsys.readouterr().err
    cli.main(train_command(folder, reward=folder / "classes", **{"reward-label": "GOOD"}))
    rows = read_lines(folder / "out/samples.jsonl")
    assert rows
    for row in rows:
        ids = word_tokenizer()(row["prompt"] + row["response"], return_tensors="pt").input_ids
        with torch.no_grad():
            assert row["score"] == pytest.approx(float(classes(ids).logits[0, 1]), abs=1e-5)
    with pytest.raises(SystemExit):
        cli.main(
            train_command(
                folder,
                reward=folder / "classes",
                resume="yes",
                **{"reward-label": "BAD", "loop.updates": 3},
            )
        )
    assert "reward_label" in capsys.readouterr().err
    cli.main(evaluate_command(folder, reward=folder / "classes", **{"reward-label": "1"}))
    assert "2 responses" in capsys.readouterr().out


@pytest.mark.slow
def test_weights_and_biases_receives_settings_metrics_and_samples(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb

    runs, logged, init, log = [], [], wandb.init, wandb.Run.log
    monkeypatch.setattr(wandb, "init", lambda **given: runs.append(init(**given)) or runs[-1])
    monkeypatch.setattr(
        wandb.Run,
        "log",
        lambda self, data, **more: (logged.append((more["step"], data)), log(self, data, **more)),
    )
    summaries = []
    summary = wandb.sdk.wandb_summary.Summary  # of a finished run it is empty
    monkeypatch.setattr(summary, "update", lambda self, given: summaries.append(given))
    out = tmp_path / "first_try"
    # A run, the same run resumed, and a new run at the same path.
    for updates, resume in ((1, "no"), (2, "yes"), (1, "no")):
        if resume == "no":
            for name in ("config.json", "metrics.jsonl", "samples.jsonl", "checkpoints"):
                shutil.rmtree(out / name, ignore_errors=True)
                (out / name).unlink(missing_ok=True)
        simple_trainer(out, updates=updates, resume=resume, wandb_project="ppo_jax").run()
        run = runs[-1]
        assert (run.project, run.name) == ("ppo_jax", "first_try")
        assert run.config["ppo"]["batch_size"] == 32 and run.config["loop"]["updates"] == updates
    assert runs[0].id == runs[1].id != runs[2].id
    assert [step for step, data in logged if "objective/kl" in data] == [0, 1, 0]
    tables = [(step, data["samples"]) for step, data in logged if "samples" in data]
    assert [step for step, _ in tables] == [0, 1, 0]
    assert tables[0][1].columns == ["prompt", "response", "score"] and len(tables[0][1].data) == 4
    evaluations = [(step, data["evaluations"]) for step, data in logged if "evaluations" in data]
    assert [step for step, _ in evaluations] == [0, 0, 1, 0, 0] and len(evaluations[0][1].data) == 4
    assert "before/eval/scores" in summaries[0]
    assert list((out / "wandb").glob("offline-run-*/run-*.wandb"))


def test_prompts_from_a_dataset():
    rows = data.read_rows(
        datasets.Dataset.from_list([{"prompt": "a b", "answer": 1}, {"prompt": "c", "answer": 2}])
    )
    assert rows == [{"prompt": "a b", "answer": 1}, {"prompt": "c", "answer": 2}]
    with pytest.raises(ValueError, match="column 'prompt'"):
        data.read_rows(datasets.Dataset.from_list([{"x": "a"}]))


def test_the_exported_model_generates_and_is_evaluated(folder, capsys):
    (folder / "prompts.csv").write_text("question,x\na b,1\nc,2\nd,3\ne,4\n" + "a " * 20 + ",5\n")
    reward = f"{folder / 'reward.py'}:score"
    given = {"prompts": folder / "prompts.csv", "long-prompts": "drop", "eval-fraction": 0.5}
    cli.main([*train_command(folder, **given), "--reward", f"{reward}=0.5"])
    assert "1 of 2 prompts of the held-out part of" in capsys.readouterr().out
    metrics = read_lines(folder / "out/metrics.jsonl")
    for row in (row for row in metrics if "objective/scores" in row):
        assert row["reward/score"] == row["reward/score#2"] > 0
        np.testing.assert_allclose(row["objective/scores"], 1.5 * row["reward/score"], rtol=1e-5)
    held_out = metrics[-1]
    assert held_out["eval/reward/score"] == held_out["eval/reward/score#2"]
    np.testing.assert_allclose(held_out["eval/scores"], 1.5 * held_out["eval/reward/score"])
    assert json.loads((folder / "out/summary.json").read_text())["updates"] == 2
    sample = {"model": folder / "out/model", "max-new-tokens": 3}
    cli.main([*command_line("generate", **sample), "--prompts", "a b", "c"])
    assert "a b|" in capsys.readouterr().out
    cli.main(evaluate_command(folder, reward=reward))
    assert "2 responses" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompts": "nowhere.txt"}, "nowhere.txt does not exist"),
        ({"prompts": "empty.txt"}, "no prompt"),
        ({"prompts": "broken.jsonl"}, "needs a text or messages in its column 'prompt'"),
        ({"prompts": "long.txt"}, "exceeds the model's 16 positions. 1 of 1 prompts"),
        ({"prompts": "long.txt", "long-prompts": "drop"}, "drop leaves none"),
        ({"prompt-column": "x"}, "needs a column 'x', but its columns are: 'prompt'. Name"),
        ({"eval-fraction": 1}, "eval_fraction must be at least 0 and less than 1, not 1"),
        ({"reward-timeout": 0}, "reward_timeout must be a positive number of seconds"),
        ({"reward": "reward.py:nothing"}, "no function 'nothing'"),
        ({"reward": "none.py:score"}, "does not exist"),
        ({"reward": "needy.py:score"}, "needs the column 'answer', but the columns of"),
        ({"loop.updates": 0}, "at least 1"),
        ({"ppo.top-k": 999}, "top_k=999 must lie in 1 .. 21"),
    ],
)
def test_bad_input_is_refused_in_one_sentence_without_writing(folder, capsys, changes, message):
    at = {k: folder / v if k in ("prompts", "reward") else v for k, v in changes.items()}
    with pytest.raises(SystemExit) as stop:
        cli.main(train_command(folder, **at))
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and message in printed and printed.count("\n") == 1, printed
    assert not (folder / "out").exists()


def test_a_tokenizer_too_large_for_its_model_is_refused(folder, capsys):
    pretrained.save_policy(folder / "model", tiny_policy(vocab_size=7), word_tokenizer())
    with pytest.raises(SystemExit):
        cli.main(train_command(folder))
    assert "vocab_size=7" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"minibatches": 3}, "minibatches=3"),
        ({"micro_batch": 5}, "micro_batch=5"),
        ({"epochs": 0}, "epochs must be positive"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number"),
        ({"top_k": 0}, "top_k must be positive, or none"),
        ({"top_p": 1.5}, "top_p must lie in 0 .. 1"),
        ({"kl_coef": -1}, "kl_coef must not be negative"),
        ({"min_new_tokens": 99}, "min_new_tokens=99"),
        ({"dual_clip": 0.5}, "dual_clip must be over 1"),
    ],
)
def test_invalid_settings_are_refused(changes, message):
    with pytest.raises(SettingError, match=message):
        PPOConfig(**changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, rows",
    [
        ("sft", [{"prompt": "a b", "response": "c d"}]),
        ("reward", [{"prompt": "a", "chosen": "b b", "rejected": "c c"}]),
        (
            "reward --learn-from scores",
            [{"response": "b b", "score": 1.5}, {"response": "c c", "score": -1}],
        ),
        (
            "reward --learn-from classes",
            [{"prompt": "a ", "response": x, "score": i} for i, x in enumerate("bcd")],
        ),
    ],
)
def test_supervised_stages_learn_and_their_models_load(folder, stage, rows, capsys):
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows * 40))
    paths = {"model": folder / "model", "data": folder / "rows.jsonl", "out": folder / "new"}
    training = {"length": 8, "epochs": 8, "learning-rate": 2e-2}
    cli.main([*stage.split(), *options({**paths, **training})])
    assert json.loads((folder / "new/summary.json").read_text())["eval/accuracy"] == 1.0
    if stage == "sft":
        assert pretrained.load_policy(folder / "new").config.vocab_size == len(WORDS)
    else:
        cli.main(train_command(folder, reward=folder / "new"))


def test_explained_variance_of_constant_returns_is_0():
    values = jnp.zeros((1, 7)).at[0, 0].set(5.0)
    assert explained_variance(values, jnp.full((1, 7), 0.3), jnp.ones((1, 7), bool)) == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda prompts, responses, **columns: [len(columns.keys() - {"prompt"})] * 3,
        lambda prompts, responses, scale=0.0: [scale] * 3,
        lambda prompts, responses, *, scale=0.0: [scale] * 3,
    ],
)
def test_a_reward_without_a_parameter_rows_gets_no_rows(function):
    prompts = data.Prompts([{"prompt": "a"}] * 3, np.zeros((3, 1), np.int32), np.ones((3, 1), bool))
    assert TextReward(function)(None, prompts, ["a"] * 3).response.tolist() == [0, 0, 0]


def test_a_reward_that_exits_is_a_reward_error():
    prompts = data.Prompts([{"prompt": "a"}], np.zeros((1, 1), np.int32), np.ones((1, 1), bool))
    with pytest.raises(RewardError, match="SystemExit"):
        TextReward(lambda prompts, responses: exit())(None, prompts, ["a"])


@pytest.mark.slow
def test_the_learning_rate_decays_with_updates_even_if_steps_are_stopped(tmp_path):
    def count(state):
        return int(
            optax.tree.get(
                state.train.opt_state,
                "count",
                filtering=lambda path, _: "Schedule" in path[-1].tuple_name,
            )
        )

    ppo = PPOConfig(
        **{
            **vars(SIMPLE_PPO),
            "decay_learning_rate": True,
            "target_kl": 1e-9,
            "learning_rate": 0.05,
        }
    )
    run = simple_trainer(tmp_path / "run", ppo=ppo, updates=4)
    run.run()
    due = 3 * ppo.epochs * ppo.minibatches
    assert due <= count(run.state) < due + 2


def test_token_scores_cannot_be_combined_with_score_scaling(tmp_path):
    reward = lambda tokens, mask, response_mask: response_mask.astype(np.float32)
    run = simple_trainer(
        tmp_path / "run",
        ppo=PPOConfig(**{**vars(SIMPLE_PPO), "scale_scores": True}),
        reward=reward,
        wrap=TokenReward,
    )
    with pytest.raises(SettingError, match="leave them off where tokens are scored"):
        run.step()


def run_supervised(folder, command, rows, **given):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = {"model": folder / "model", "data": folder / "rows.jsonl"}
    cli.main(command_line(command, **paths, out=folder / f"new_{command}", **given))


@pytest.mark.parametrize(
    "command, rows, options, message",
    [
        ("sft", [{"response": "a"}] * 2, {"batch-size": 0}, "batch_size must be positive"),
        ("sft", [{"response": "a"}] * 2, {"epochs": 0}, "epochs must be positive"),
        ("sft", [{"response": "a"}], {}, "one more is needed to be held out"),
        (
            "sft",
            [{"response": "a", "prompt": 5}] * 2,
            {},
            "Line 1 of .* needs a text or messages in its column 'prompt', which is 5",
        ),
        (
            "reward",
            [{"chosen": [{"role": "user", "content": "a"}], "rejected": "b"}] * 2,
            {},
            "Messages need a tokenizer with a chat template",
        ),
    ],
)
def test_invalid_input_of_supervised_stages_is_named(
    folder, capsys, command, rows, options, message
):
    with pytest.raises(SystemExit):
        run_supervised(folder, command, rows, **options)
    printed = capsys.readouterr().err
    assert re.search(message, printed), printed
    assert not (folder / f"new_{command}").exists()


def test_rows_are_cut_to_the_positions_of_the_model(folder):
    run_supervised(
        folder,
        "sft",
        [{"response": "b " * 200}] * 4,
        **{"batch-size": 2, "epochs": 1, "length": 500},
    )
    assert (folder / "new_sft/model.safetensors").exists()


@pytest.mark.slow
def test_held_out_prompts_of_another_length_compile_nothing_new(tmp_path, caplog):
    """Held-out prompts that are shorter or longer than the others do not change the training."""
    policies = []
    for held_out in ("a", "a b c d e f"):
        run = full_trainer(tmp_path / held_out, updates=2, eval_every=1, held_out=[held_out])
        caplog.clear()
        with jax.log_compiles():
            run.run()
        for name in ("sample", "score", "learn"):
            assert caplog.text.count(f"Compiling jit({name})") == 1
        policies.append(run.state.policy)
    alone = full_trainer(tmp_path / "alone", updates=2, eval_every=1)
    alone.run()
    for policy in policies:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), policy, alone.state.policy
        )


DEFAULT_CACHE = "/home/ppo_jax/compiled"


@pytest.mark.parametrize(
    "given, cache, min_seconds",
    [
        ({}, DEFAULT_CACHE, 0.0),
        ({"JAX_COMPILATION_CACHE_DIR": "/mine"}, "/mine", 0.0),
        ({"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "7"}, DEFAULT_CACHE, 7.0),
    ],
)
def test_compiled_programs_are_cached_in_the_chosen_folder(given, cache, min_seconds):
    """Test in a separate process, because JAX reads the environment variables only once."""
    code = """import jax
from ppo_jax import cli
cli.keep_compiled_programs()
config = jax.config
print(config.jax_compilation_cache_dir, config.jax_persistent_cache_min_compile_time_secs)"""
    other_variables = {
        name: x
        for name, x in os.environ.items()
        if not name.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))
    }
    environment = (
        other_variables
        | {"XDG_CACHE_HOME": "/home", "PYTHONPATH": str(Path(__file__).parents[1])}
        | given
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    assert printed[0] == cache and float(printed[1]) == min_seconds


def test_added_tokens_outside_the_models_vocabulary_are_refused_in_texts(folder, capsys):
    words = word_tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})  # as in Gemma 3
    words.save_pretrained(folder / "model")
    cli.main(train_command(folder))
    (folder / "prompts.txt").write_text("a\nb <image>\n")
    given = {"model": folder / "model", "prompts": "b <image>", "max-new-tokens": 2}
    sample = command_line("generate", **given)
    for arguments in (train_command(folder, out=folder / "other"), sample):
        with pytest.raises(SystemExit):
            cli.main(arguments)
        assert (
            "holds the token id 21, but the model's vocabulary has only vocab_size=21 tokens"
            in capsys.readouterr().err
        )
    words.add_special_tokens({"bos_token": "<begin>"})
    words.save_pretrained(folder / "model")
    with pytest.raises(SystemExit):
        cli.main(train_command(folder, out=folder / "other"))
    assert "gives ids up to 22, but the model has vocab_size=21" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["BertForPreTraining", "BertModel", "BertLMHeadModel", "RobertaModel"]
)
def test_a_bert_reward_model_equals_transformers(folder, kind, capsys):
    family = "Bert" if kind.startswith("Bert") else "Roberta"
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        pad_token_id=0,
        max_position_embeddings=20,
        is_decoder="LMHead" in kind,
    )
    model = getattr(transformers, kind)(config)
    model.save_pretrained(folder / "bert")
    word_tokenizer().save_pretrained(folder / "bert")
    (folder / "pairs.jsonl").write_text('{"chosen": "a b", "rejected": "c d e"}\n' * 20)
    paths = {"model": folder / "bert", "data": folder / "pairs.jsonl", "out": folder / "scorer"}
    training = {"epochs": 1, "batch-size": 4, "learning-rate": 1e-3}
    cli.main(command_line("reward", **paths, **training))
    assert "after epoch 1:" in capsys.readouterr().out
    reward, texts = load_reward(str(folder / "scorer")), ["a b c", "d e f"]
    words = transformers.AutoTokenizer.from_pretrained(folder / "scorer")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder / "scorer"
    ).eval()
    ids = words(texts, return_tensors="pt").input_ids
    with torch.no_grad():
        want = theirs(ids, attention_mask=torch.ones_like(ids)).logits[:, 0].numpy()
    np.testing.assert_allclose(reward.score_texts(texts), want, atol=1e-5)
    if kind == "BertForPreTraining":
        fresh = scorers.start_scorer(folder / "bert", jax.random.key(0))
        pooler = model.bert.pooler.dense.weight.detach().numpy().T
        np.testing.assert_array_equal(fresh.params["head"]["pooler"]["kernel"], pooler)


@pytest.mark.slow
@pytest.mark.parametrize("pad", [None, "b"])
def test_the_scores_of_a_trained_reward_model_equal_transformers(folder, pad):
    """Also of texts that end in the pad token, such as the end token of a GPT-2."""
    tokenizer = word_tokenizer()
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(folder / "model")
    row = '{"chosen": "a b <end>", "rejected": "c <end> d e <end>"}\n'
    (folder / "pairs.jsonl").write_text(row * 20)
    paths = {"model": folder / "model", "data": folder / "pairs.jsonl", "out": folder / "scorer"}
    cli.main(command_line("reward", **paths, epochs=1, **{"learning-rate": 1e-2}))
    reward = load_reward(str(folder / "scorer"))
    words = transformers.AutoTokenizer.from_pretrained(folder / "scorer")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "scorer")
    texts = ["a b c", "a b <end>", "d <end> <end>", "a <end> e", "c b b", "<end>", "b"]
    with torch.no_grad():
        want = [theirs(words(text, return_tensors="pt").input_ids).logits[0, 0] for text in texts]
    np.testing.assert_allclose(reward.score_texts(texts), want, rtol=1e-4, atol=1e-5)
    fresh = scorers.start_scorer(folder / "model", jax.random.key(0), words)
    scorers.save_scorer(folder / "again", fresh, words)
    assert scorers.load_scorer(folder / "again").config.pad_id == fresh.config.pad_id is not None


@pytest.mark.slow
def test_the_folder_of_a_run_stands_for_its_model(folder, capsys):
    (folder / "run").mkdir()
    (folder / "run/config.json").write_text('{"settings": {}, "hashes": {}, "processes": []}')
    with pytest.raises(SystemExit):
        cli.main(["info", str(folder / "run")])
    assert "a run that has not written its model yet" in capsys.readouterr().err
    shutil.copytree(folder / "model", folder / "run/model")
    cli.main(train_command(folder, model=folder / "run", **{"lora.rank": 2}))
    settings = json.loads((folder / "out/adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(folder / "run/model")
    want, got = (pretrained.load_policy(folder / name) for name in ("out/model", "out/adapter"))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, got.params, want.params)


@pytest.mark.slow
def test_an_unused_pad_token_needs_no_row_in_the_embedding(folder):
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == tiny_policy().config.vocab_size
    tokenizer.save_pretrained(folder / "model")
    cli.main(train_command(folder))
    pairs = folder / "pairs.jsonl"
    pairs.write_text('{"chosen": "a b <end>", "rejected": "c d e <end>"}\n' * 20)
    cli.main(command_line("reward", model=folder / "model", data=pairs, out=folder / "scorer"))
    assert scorers.load_scorer(folder / "scorer").config.pad_id == 0  # the end token
    assert np.isfinite(load_reward(str(folder / "scorer")).score_texts(["a b", "c"])).all()
    with pytest.raises(RewardError, match="token id 21"):
        load_reward(str(folder / "scorer")).score_texts(["a <pad> b"])
    pads = dataclasses.replace(tiny_policy().config, vocab_size=20)
    with pytest.raises(ValueError, match="gives ids up to 21"):  # the word t is beyond, too
        pretrained.check_tokenizer(tokenizer, pads)


def test_a_bert_decoder_as_classifier_is_refused(tmp_path):
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        is_decoder=True,
        num_labels=1,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="sees no other"):
        load_reward(str(tmp_path))


@pytest.mark.slow
def test_a_custom_loss_is_used_and_checked_on_resume(tmp_path):
    def zero_loss(params, batch, counts):
        model = tiny_policy(layers=1).config
        loss, metrics = ppo_loss_fn(
            language_model(model),
            heads.separate_critic(model),
            *Loss.PPO.function(PPOConfig(value_clip=None, vf_coef=1.0)),
            temperature=1.0,
        )(params, batch, counts)
        return 0.0 * loss, metrics

    before = simple_trainer(tmp_path / "run", updates=1, loss_fn=zero_loss)
    start = jax.tree.map(np.asarray, before.state.train.params)
    end = before.run().train.params
    jax.tree.map(np.testing.assert_array_equal, start, end)
    with pytest.raises(ValueError, match="The loss of the run in"):
        simple_trainer(tmp_path / "run", updates=2, resume="yes")


def test_without_a_terminal_each_update_prints_a_line(tmp_path, capsys):
    simple_trainer(tmp_path / "run", updates=2, progress=True).run()
    lines = capsys.readouterr().err.splitlines()
    assert [line[: line.index(":")] for line in lines] == [
        "update 1 of 2",
        "update 2 of 2",
    ] and "score=" in lines[0]


def start_command(*arguments, platform="cpu"):
    """Start `ppo-jax` in a process of its own, which sees no GPU."""
    return subprocess.Popen(
        [sys.executable, "-m", "ppo_jax.cli", *map(str, arguments)],
        env={**os.environ, "JAX_PLATFORMS": platform, "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("arguments", [["--help"], ["info", "model", "--ppo.max-new-tokens", "8"]])
def test_a_reader_of_the_output_may_end_first(folder, arguments):
    with start_command(*(folder / x if x == "model" else x for x in arguments)) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_a_platform_without_a_device_is_one_sentence(folder, platform):
    arguments = command_line("generate", model=folder / "model", prompts="a")
    process = start_command(*arguments, platform=platform)
    _, printed = process.communicate(timeout=120)
    last = printed.splitlines()[-1]
    assert process.returncode == 2 and "Traceback" not in printed
    assert last.startswith("ppo-jax: ") and platform in last


@pytest.mark.parametrize("below", ["", "run"])
@pytest.mark.parametrize("name", ["train", "sft", "reward", "convert", "evaluate", "report"])
def test_a_link_to_nothing_is_no_folder_for_results(folder, capsys, name, below):
    (folder / "link").symlink_to(folder / "nothing")
    out = folder / "link" / below
    arguments = {
        "train": train_command(folder, out=out),
        "convert": command_line("convert", model=folder / "model", out=out),
        "evaluate": [*evaluate_command(folder), "--out", str(out)],
        "report": ["report", str(folder), "--out", str(out)],
    }
    given = {"model": folder / "model", "data": folder / "prompts.txt", "out": out}
    with pytest.raises(SystemExit):
        cli.main(arguments.get(name, command_line(name, **given)))
    assert (
        f"link is a link to {folder / 'nothing'}, which does not exist" in capsys.readouterr().err
    )
    assert not (folder / "nothing").exists()


def test_generate_reads_prompts_from_files(folder, capsys):
    (folder / "more.csv").write_text("prompt,x\nd e,1\n")
    files = [str(folder / "prompts.txt"), "g", str(folder / "more.csv")]
    sample = command_line("generate", model=folder / "model", **{"max-new-tokens": 2})
    cli.main([*sample, "--prompts", *files])
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition("|")[0] for line in printed] == ["a b", "c", "g", "d e"]
    with pytest.raises(SystemExit):
        cli.main([*sample, "--prompts", "g", "nowhere.txt"])
    assert "nowhere.txt does not exist" in capsys.readouterr().err


@pytest.mark.slow
def test_supervised_stages_read_tables_and_count_rows_that_teach_nothing(folder, capsys):
    training = {"model": folder / "model", "length": 6, "epochs": 1, "batch-size": 2}
    (folder / "demos.csv").write_text("question,answer\n" + "a b, c\n" * 4 + "a a a a a a, b\n" * 3)
    given = {**training, "data": folder / "demos.csv", "eval-data": folder / "demos.csv"}
    cli.main(command_line("sft", **given, out=folder / "new"))
    message = "3 of 7 rows of .*demos.csv are left out, because their prompts leave no room for a"
    assert len(re.findall(message, capsys.readouterr().out)) == 2
    (folder / "pairs.jsonl").write_text(
        '{"prompt": "a ", "chosen": "b", "rejected": "c"}\n' * 4
        + '{"chosen": "b a a a a a a", "rejected": "c a a a a a a"}\n' * 2
    )
    given = {**training, "data": folder / "pairs.jsonl"}
    cli.main(command_line("reward", **given, out=folder / "scorer"))
    assert (
        "2 of 6 rows of" in (printed := capsys.readouterr().out)
        and "because their two texts have the same last 6 tokens" in printed
    )
    (folder / "pairs.jsonl").write_text('{"chosen": "b", "rejected": "b"}\n' * 3)
    with pytest.raises(SystemExit):
        cli.main(command_line("reward", **given, out=folder / "other"))
    assert "No row of" in capsys.readouterr().err and not (folder / "other").exists()
    with pytest.raises(SystemExit):
        cli.main(command_line("sft", **training, data=folder / "demos.csv", out=folder / "new"))
    assert "or continue that run with --resume auto." in capsys.readouterr().err
