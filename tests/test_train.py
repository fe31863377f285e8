"""The loop and the command, end to end on a tiny model: it learns, resumes without a break, and refuses bad input in a sentence."""

import functools
import json
import os
import re
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
    SIMPLE_PPO,
    WORDS,
    full_trainer,
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
from ppo_jax.ppo.loss import ppo_loss_fn
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.reward_functions import RewardError, TextReward, TokenReward, check_scores
from ppo_jax.reward_functions.loading import load_reward
from ppo_jax.run.files import read_lines
from ppo_jax.types import Rollout, overlay


@pytest.mark.parametrize("shared", [False, True])
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


def test_resume_is_no_break(tmp_path):
    ppo = PPOConfig(**{**vars(SIMPLE_PPO), "kl_target": 0.5, "scale_scores": True})
    whole = simple_trainer(tmp_path / "whole", ppo=ppo).run()
    half = simple_trainer(tmp_path / "half", ppo=ppo, save_every=2)
    half.step(), half.step()
    half.save()
    half.checkpoints.close()
    again = simple_trainer(tmp_path / "half", ppo=ppo, resume="yes")
    assert int(again.state.update) == 2
    resumed = again.run()
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
def test_batches_pass_over_every_row_before_any_returns(n, size):
    stream = np.concatenate([data.batch_rows(n, size, update, seed=3) for update in range(n)])
    for one_pass in stream.reshape(-1, n):
        assert sorted(one_pass) == list(range(n))
    assert (stream[:n] != stream[n : 2 * n]).any()


@pytest.mark.parametrize(
    "scores, says",
    [
        ([1.0], "shape"),
        (["a", "b"], "numbers"),
        ([1.0, float("nan")], "nan for response 1"),
        ([[1.0], [2.0]], "shape"),
        (None, "numbers"),
    ],
)
def test_what_is_no_score_is_refused(scores, says):
    with pytest.raises(RewardError, match=says):
        check_scores(scores, (2,))


def test_scores_of_tokens_stand_beside_those_of_responses():
    """A jittable reward may score responses, tokens, or both; what it returns reaches the rewards of the right tokens."""
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
    for wrong, says in (
        (lambda t, m, r: (r, r, r), "3 arrays"),
        (lambda t, m, r: t, "shape"),
        (lambda t, m, r: 1 / 0, "Zero"),
    ):
        with pytest.raises(RewardError, match=says):
            ask(wrong)


def test_a_reward_of_tokens_teaches(tmp_path):
    """Token 2 pays wherever it stands: the loop hands each token's score to its step."""
    run = simple_trainer(
        tmp_path / "run", reward=None, updates=25, wrap=lambda _: TokenReward(pays_for_b)
    )
    seen = []
    run.run(on_update=seen.append)
    assert seen[-1]["objective/scores"] > seen[0]["objective/scores"] + 0.5


def pays_for_b(tokens, mask, response_mask):
    return (tokens[:, -response_mask.shape[1] :] == WORDS.index("b")) * 0.5


def test_a_reward_that_raises_is_named(tmp_path):
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        simple_trainer(tmp_path / "run", reward=lambda prompts, responses: 1 / 0).step()


def test_reward_gets_the_rows_if_it_wants_them():
    rows = [{"prompt": "a", "answer": "b"}]
    prompts = data.Prompts(rows, np.zeros((1, 1), np.int32), np.ones((1, 1), bool))
    reward = TextReward(lambda prompts, responses, rows: [float(rows[0]["answer"] == responses[0])])
    assert reward(None, prompts, ["b"]).response.tolist() == [1.0]


@pytest.fixture
def folder(tmp_path):
    pretrained.save_policy(tmp_path / "model", tiny_policy(), word_tokenizer())
    (tmp_path / "prompts.txt").write_text("a b\nc\n")
    (tmp_path / "long.txt").write_text("a " * 40)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "broken.jsonl").write_text('{"prompt": 3}\n')
    (tmp_path / "reward.py").write_text(
        "def score(prompts, responses):\n    return [len(r) / 3 for r in responses]\n"
        "def count(tokens, mask, response_mask):\n    return response_mask.sum(axis=1)\n"
    )
    return tmp_path


def command(folder, **changes):
    options = {
        "model": folder / "model",
        "prompts": folder / "prompts.txt",
        "reward": f"{folder / 'reward.py'}:score",
        "out": folder / "out",
        "loop.updates": 2,
        "ppo.batch-size": 8,
        "ppo.max-new-tokens": 4,
    } | changes
    return [
        "train",
        "--loop.no-progress",
        "--mesh",
        "data=1",
        *(str(x) for name, value in options.items() for x in (f"--{name}", value)),
    ]


@pytest.mark.parametrize(
    "rows, options, says",
    [
        ([{"response": "a"}], "--learn-from scores", "Row 0 needs a number in 'score', not None"),
        (
            [{"response": "a", "score": 0.5}],
            "--learn-from classes",
            "Row 0 needs a class 0, 1, 2, ... in 'score', not 0.5",
        ),
        ([{"response": "a", "score": 0}], "--learn-from classes", "single class"),
        ([{"chosen": "a"}], "", "Row 0 needs a text in its column 'rejected'"),
        ([{"chosen": "a", "rejected": ""}], "", "no text in 'rejected'"),
    ],
)
def test_rows_that_cannot_be_learned_from_are_named(folder, rows, options, says, capsys):
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows * 20))
    with pytest.raises(SystemExit):
        cli.main(
            [
                "reward",
                "--model",
                str(folder / "model"),
                "--data",
                str(folder / "rows.jsonl"),
                "--out",
                str(folder / "new"),
                *options.split(),
            ]
        )
    assert says in capsys.readouterr().err
    assert not (folder / "new").exists()


def test_rewards_on_arrays_from_the_command(folder, capsys):
    cli.main(
        command(folder, **{"reward": f"{folder / 'reward.py'}:count", "reward-given": "tokens"})
    )
    cli.main(
        [
            "evaluate",
            "--model",
            str(folder / "out/model"),
            "--prompts",
            str(folder / "prompts.txt"),
            "--reward",
            f"{folder / 'reward.py'}:count",
            "--reward-given",
            "tokens",
            "--max-new-tokens",
            "3",
        ]
    )
    assert "2 responses" in capsys.readouterr().out


def test_a_run_in_the_folder_is_seen_before_the_model_is_read(folder, capsys):
    (folder / "out").mkdir()
    (folder / "out/config.json").write_text("{}")
    with pytest.raises(SystemExit):
        cli.main(command(folder, model="no such model"))
    assert "holds another run" in capsys.readouterr().err


@pytest.mark.parametrize("critic", ["shared", "separate", "reward model"])
def test_adapters_from_the_command(folder, critic):
    """The merged model is the base under its adapter, and the run resumes."""
    if critic == "reward model":
        critic = str(folder / "scorer")
        save_scorer(critic)
    cli.main(
        command(
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
    "option, changes, says",
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
def test_models_that_score_must_fit(folder, capsys, option, changes, says):
    save_scorer(folder / "scorer", **changes)
    with pytest.raises(SystemExit):
        cli.main(command(folder, **{option: folder / "scorer"}))
    assert re.search(says, capsys.readouterr().err)


def test_a_reward_model_reads_the_end_of_a_text_that_is_too_long(folder):
    save_scorer(folder / "scorer", positions=4)
    scores = load_reward(str(folder / "scorer")).score_texts(["a b c d e f", "c d e f", "f e d c"])
    assert scores[0] == scores[1] != scores[2]


def save_scorer(place, **changes):
    base = tiny_policy(**changes)
    scorers.save_scorer(
        place,
        base._replace(params=heads.init_scorer(base.config, jax.random.key(3))),
        word_tokenizer(),
    )


def test_a_classifiers_label_is_the_reward(folder, capsys):
    """Every sample's score is the logit of that label; without one, or with another on resume, the command says so."""
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
        cli.main(command(folder, reward=folder / "classes"))
    assert "scores by labels (BAD, GOOD): reward_label must name one" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(command(folder, critic=folder / "classes"))
    assert "The critic must start from a reward model with one label: " in capsys.readouterr().err
    cli.main(command(folder, reward=folder / "classes", **{"reward-label": "GOOD"}))
    rows = read_lines(folder / "out/samples.jsonl")
    assert rows
    for row in rows:
        ids = word_tokenizer()(row["prompt"] + row["response"], return_tensors="pt").input_ids
        with torch.no_grad():
            assert row["score"] == pytest.approx(float(classes(ids).logits[0, 1]), abs=1e-5)
    with pytest.raises(SystemExit):
        cli.main(
            command(
                folder,
                reward=folder / "classes",
                resume="yes",
                **{"reward-label": "BAD", "loop.updates": 3},
            )
        )
    assert "reward_label" in capsys.readouterr().err
    cli.main(
        [
            "evaluate",
            "--model",
            str(folder / "out/model"),
            "--prompts",
            str(folder / "prompts.txt"),
            "--reward",
            str(folder / "classes"),
            "--reward-label",
            "1",
            "--max-new-tokens",
            "3",
        ]
    )
    assert "2 responses" in capsys.readouterr().out


def test_weights_and_biases_hears_of_every_update(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb

    heard = []
    log = wandb.Run.log
    monkeypatch.setattr(
        wandb.Run,
        "log",
        lambda self, data, **more: (heard.append((more["step"], data)), log(self, data, **more)),
    )
    simple_trainer(tmp_path / "run", updates=2, wandb_project="ppo_jax").run()
    assert [step for step, data in heard if "objective/kl" in data] == [0, 1]
    assert list((tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"))


def test_prompts_from_a_dataset():
    rows = data.read_rows(
        datasets.Dataset.from_list([{"prompt": "a b", "answer": 1}, {"prompt": "c", "answer": 2}])
    )
    assert rows == [{"prompt": "a b", "answer": 1}, {"prompt": "c", "answer": 2}]
    with pytest.raises(ValueError, match="column 'prompt'"):
        data.read_rows(datasets.Dataset.from_list([{"text": "a"}]))


def test_the_command_trains_a_model_that_generates(folder, capsys):
    cli.main(command(folder))
    assert json.loads((folder / "out/summary.json").read_text())["updates"] == 2
    cli.main(
        [
            "generate",
            "--model",
            str(folder / "out/model"),
            "--prompts",
            "a b",
            "c",
            "--max-new-tokens",
            "3",
        ]
    )
    assert "a b|" in capsys.readouterr().out
    cli.main(
        [
            "evaluate",
            "--model",
            str(folder / "out/model"),
            "--prompts",
            str(folder / "prompts.txt"),
            "--reward",
            f"{folder / 'reward.py'}:score",
            "--max-new-tokens",
            "3",
        ]
    )
    assert "2 responses" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"prompts": "nowhere.txt"}, "nowhere.txt cannot be read"),
        ({"prompts": "empty.txt"}, "no prompt"),
        ({"prompts": "broken.jsonl"}, "needs a text in its column 'prompt'"),
        ({"prompts": "long.txt"}, "exceeds the model's 16 positions"),
        ({"reward": "reward.py:nothing"}, "no function 'nothing'"),
        ({"reward": "none.py:score"}, "does not exist"),
        ({"loop.updates": 0}, "at least 1"),
        ({"ppo.top-k": 999}, "top_k=999 must lie in 1 .. 21"),
    ],
)
def test_bad_input_gets_one_sentence_and_writes_nothing(folder, capsys, changes, says):
    at = {k: folder / v if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(SystemExit) as stop:
        cli.main(command(folder, **at))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and says in said and said.count("\n") == 1, said
    assert not (folder / "out").exists()


def test_a_tokenizer_too_large_for_its_model_is_refused(folder, capsys):
    pretrained.save_policy(folder / "model", tiny_policy(vocab_size=7), word_tokenizer())
    with pytest.raises(SystemExit):
        cli.main(command(folder))
    assert "vocab_size=7" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, says",
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
def test_settings_that_cannot_run_are_refused(changes, says):
    with pytest.raises(SettingError, match=says):
        PPOConfig(**changes)


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
def test_supervised_stages_learn_and_their_folders_load(folder, stage, rows, capsys):
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows * 40))
    cli.main(
        [
            *stage.split(),
            "--model",
            str(folder / "model"),
            "--data",
            str(folder / "rows.jsonl"),
            "--out",
            str(folder / "new"),
            "--length",
            "8",
            "--epochs",
            "20",
            "--learning-rate",
            "1e-2",
        ]
    )
    assert json.loads((folder / "new/summary.json").read_text())["eval/accuracy"] == 1.0
    if stage == "sft":
        assert pretrained.load_policy(folder / "new").config.vocab_size == len(WORDS)
    else:
        cli.main(command(folder, reward=folder / "new"))


def test_explained_variance_of_returns_that_do_not_vary():
    values = jnp.zeros((1, 7)).at[0, 0].set(5.0)
    assert explained_variance(values, jnp.full((1, 7), 0.3), jnp.ones((1, 7), bool)) == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda prompts, responses, **more: [len(more)] * 3,
        lambda prompts, responses, scale=0.0: [scale] * 3,
        lambda prompts, responses, *, scale=0.0: [scale] * 3,
    ],
)
def test_a_reward_gets_rows_only_where_it_asks_for_them(function):
    prompts = data.Prompts([{"prompt": "a"}] * 3, np.zeros((3, 1), np.int32), np.ones((3, 1), bool))
    assert TextReward(function)(None, prompts, ["a"] * 3).response.tolist() == [0, 0, 0]


def test_a_reward_that_exits_is_a_reward_that_raises():
    prompts = data.Prompts([{"prompt": "a"}], np.zeros((1, 1), np.int32), np.ones((1, 1), bool))
    with pytest.raises(RewardError, match="SystemExit"):
        TextReward(lambda prompts, responses: exit())(None, prompts, ["a"])


def test_the_learning_rate_decays_by_updates_whatever_steps_are_taken(tmp_path):
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


def test_scores_of_tokens_are_not_clipped_or_scaled_unseen(tmp_path):
    reward = lambda tokens, mask, response_mask: response_mask.astype(np.float32)
    run = simple_trainer(
        tmp_path / "run",
        ppo=PPOConfig(**{**vars(SIMPLE_PPO), "scale_scores": True}),
        reward=reward,
        wrap=TokenReward,
    )
    with pytest.raises(SettingError, match="leave them off where tokens are scored"):
        run.step()


def supervised(folder, command, rows, **options):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        "model": folder / "model",
        "data": folder / "rows.jsonl",
        "out": folder / f"audit_{command}",
    } | options
    cli.main([command, *(str(x) for name, value in given.items() for x in (f"--{name}", value))])


@pytest.mark.parametrize(
    "command, rows, options, says",
    [
        ("sft", [{"response": "a"}] * 2, {"batch-size": 0}, "batch_size must be positive"),
        ("sft", [{"response": "a"}] * 2, {"epochs": 0}, "epochs must be positive"),
        ("sft", [{"response": "a"}], {}, "one more is needed to be held out"),
        (
            "sft",
            [{"response": "a", "prompt": 5}] * 2,
            {},
            "Row 0 of .* needs a text or messages in its column 'prompt', not 5",
        ),
        (
            "reward",
            [{"chosen": [{"role": "user", "content": "a"}], "rejected": "b"}] * 2,
            {},
            "chat template does not take",
        ),
    ],
)
def test_supervised_stages_name_what_is_wrong(folder, capsys, command, rows, options, says):
    with pytest.raises(SystemExit):
        supervised(folder, command, rows, **options)
    said = capsys.readouterr().err
    assert re.search(says, said), said
    assert not (folder / f"audit_{command}").exists()


def test_rows_are_cut_to_the_models_positions(folder):
    supervised(
        folder,
        "sft",
        [{"response": "b " * 200}] * 4,
        **{"batch-size": 2, "epochs": 1, "length": 500},
    )
    assert (folder / "audit_sft/model.safetensors").exists()


@pytest.mark.parametrize("held_out", ["a", "a b c d e f"])
def test_held_out_prompts_of_another_length_are_sampled_by_the_same_program(
    tmp_path, caplog, held_out
):
    run = full_trainer(tmp_path / "run", updates=2, eval_every=1, held_out=[held_out])
    with jax.log_compiles():
        run.run()
    for name in ("sample", "score", "learn"):
        assert caplog.text.count(f"Compiling jit({name})") == 1
    alone = full_trainer(tmp_path / "alone", updates=2, eval_every=1)
    alone.run()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        run.state.policy,
        alone.state.policy,
    )


OWN = "/home/ppo_jax/compiled"


@pytest.mark.parametrize(
    "given, cache, least",
    [
        ({}, OWN, 0.0),
        ({"JAX_COMPILATION_CACHE_DIR": "/mine"}, "/mine", 0.0),
        ({"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "7"}, OWN, 7.0),
    ],
)
def test_everything_that_is_compiled_is_kept_wherever_it_is(given, cache, least):
    """In a process of its own, as JAX reads the variables once."""
    code = """import jax
from ppo_jax import cli
cli.keep_compiled_programs()
print(jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs)"""
    outside = {
        name: x
        for name, x in os.environ.items()
        if not name.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))
    }
    environment = (
        outside | {"XDG_CACHE_HOME": "/home", "PYTHONPATH": str(Path(__file__).parents[1])} | given
    )
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    assert said[0] == cache and float(said[1]) == least


def test_added_tokens_that_the_model_has_no_word_for_are_refused_where_a_text_holds_one(
    folder, capsys
):
    words = word_tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})  # as Gemma 3's
    words.save_pretrained(folder / "model")
    cli.main(command(folder))
    (folder / "prompts.txt").write_text("a\nb <image>\n")
    sample = [
        "generate",
        "--model",
        str(folder / "model"),
        "--prompts",
        "b <image>",
        "--max-new-tokens",
        "2",
    ]
    for arguments in (command(folder, out=folder / "other"), sample):
        with pytest.raises(SystemExit):
            cli.main(arguments)
        assert (
            "holds the token 21, for which the model, with vocab_size=21, has no word"
            in capsys.readouterr().err
        )
    words.add_special_tokens({"pad_token": "<pad>"})
    words.save_pretrained(folder / "model")
    with pytest.raises(SystemExit):
        cli.main(command(folder, out=folder / "other"))
    assert "gives ids up to 22, but the model has vocab_size=21" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind", ["BertForPreTraining", "BertModel", "BertLMHeadModel", "RobertaModel"]
)
def test_bert_learns_to_score_as_an_encoder_and_transformers_agrees(folder, kind, capsys):
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
    cli.main(
        [
            "reward",
            "--model",
            str(folder / "bert"),
            "--data",
            str(folder / "pairs.jsonl"),
            "--out",
            str(folder / "scorer"),
            "--epochs",
            "1",
            "--batch-size",
            "4",
            "--learning-rate",
            "1e-3",
        ]
    )
    assert "epoch 1" in capsys.readouterr().out
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


def test_a_decoder_that_scores_by_its_first_token_is_refused(tmp_path):
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


def test_a_loss_of_ones_own_goes_through_the_loop_and_is_known_on_resume(tmp_path):
    def only(params, batch, counts):
        model = tiny_policy().config
        loss, metrics = ppo_loss_fn(
            language_model(model),
            heads.separate_critic(model),
            temperature=1.0,
            clip_low=0.2,
            clip_high=0.2,
            value_clip=None,
            vf_coef=1.0,
        )(params, batch, counts)
        return 0.0 * loss, metrics

    before = simple_trainer(tmp_path / "run", updates=1, loss_fn=only)
    start = jax.tree.map(np.asarray, before.state.train.params)
    end = before.run().train.params
    jax.tree.map(np.testing.assert_array_equal, start, end)
    with pytest.raises(ValueError, match="The loss of the run in"):
        simple_trainer(tmp_path / "run", updates=2, resume="yes")


def test_without_a_terminal_each_update_is_a_line(tmp_path, capsys):
    simple_trainer(tmp_path / "run", updates=2, progress=True).run()
    lines = capsys.readouterr().err.splitlines()
    assert [line[: line.index(":")] for line in lines] == [
        "update 1 of 2",
        "update 2 of 2",
    ] and "score=" in lines[0]
