"""Test faults of rewards and gradients, and the commands replay and compare that examine a run."""

import asyncio
import dataclasses
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
import tyro
from helpers import FULL_PPO, full_trainer, likes_b, options, tiny_policy, word_tokenizer
from tokenizers import normalizers

from ppo_jax import cli, data, errors
from ppo_jax.commands.train import Train
from ppo_jax.errors import NonFiniteError, RewardError, SettingError
from ppo_jax.hashing import digest
from ppo_jax.models import heads
from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.io import pretrained
from ppo_jax.ppo.state import PPOState, init_key
from ppo_jax.reward_functions import ModelReward, TextReward, TokenReward, check_scores
from ppo_jax.reward_functions.loading import load_reward
from ppo_jax.run import faults
from ppo_jax.run.compare import compare
from ppo_jax.run.faults import persist
from ppo_jax.run.files import lock_folder, read_json, read_lines, write_json
from ppo_jax.run.provenance import code_hash, tokenizer_hash
from ppo_jax.run.serialize import from_json, to_json
from ppo_jax.run.settings import Faults


def failing(at, times, how):
    """Return a reward that fails in its calls `at .. at + times - 1`.

    The evaluation before the first update is call -1.
    """
    calls, window = (
        iter(range(-1, 10**6)),
        [at, at + times, how],
    )  # a list, so that the hash of the reward does not depend on the window

    def reward(prompts, responses):
        scores = likes_b(prompts, responses)
        return window[2](scores) if window[0] <= next(calls) < window[1] else scores

    return reward


def with_nan(scores):
    return [*scores[:3], float("nan"), *scores[4:]]


def raises(scores):
    raise KeyError("gone")


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [raises, lambda scores: None, lambda scores: time.sleep(30)],
    ids=["raises", "none", "hangs"],
)
def test_a_failing_reward_is_retried(tmp_path, how):
    calm = full_trainer(tmp_path / "calm", updates=3)
    limits = Faults(reward_retries=2, reward_timeout_s=1.0)
    run = full_trainer(tmp_path / "run", updates=3, reward=failing(1, 2, how), faults=limits)
    assert digest(calm.run().train.params) == digest(run.run().train.params)
    assert not (tmp_path / "run/faults.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, message, rows, staleness",
    [(with_nan, "nan for response 3", 1, 0), (raises, "KeyError in test_faults.py, line", 16, 2)],
)
def test_a_reward_that_keeps_failing_stops_the_run_after_a_checkpoint(
    tmp_path, how, message, rows, staleness
):
    options = {"updates": 5, "save_every": 0, "staleness": staleness}
    run = full_trainer(
        tmp_path / "run",
        **options,
        reward=failing(2, 9, how),
        faults=Faults(reward_retries=1),
    )
    with pytest.raises(RewardError, match=message):
        run.run()
    dumped = read_lines(tmp_path / "run/faults.jsonl")
    assert (
        len(dumped) == rows
        and dumped[0]["update"] == 2
        and dumped[0]["kind"] == "reward"
        and message[:8] in dumped[0]["message"]
    )
    resumed = full_trainer(
        tmp_path / "run", resume="auto", reward=failing(99, 0, raises), **options
    )
    assert int(resumed.state.update) == 2
    again = digest(resumed.run().train.params)
    assert again == digest(full_trainer(tmp_path / "calm", **options).run().train.params)
    assert not (tmp_path / "run/faults.jsonl").exists()  # its update was repeated


@pytest.mark.slow
def test_a_reward_failing_in_an_evaluation_stops_the_run_after_a_checkpoint(tmp_path):
    again = {"updates": 3, "save_every": 0, "eval_every": 1}
    with pytest.raises(RewardError, match="KeyError"):
        full_trainer(tmp_path / "run", reward=failing(1, 1, raises), **again).run()
    dumped = read_lines(tmp_path / "run/faults.jsonl")
    assert "In the evaluation after update 0: " in dumped[0]["message"] and all(
        row["prompt"] and row["tokens"] for row in dumped
    )
    resumed = full_trainer(tmp_path / "run", resume="yes", reward=failing(99, 0, raises), **again)
    assert int(resumed.state.update) == 1
    calm = full_trainer(tmp_path / "calm", reward=failing(99, 0, raises), **again)
    assert digest(resumed.run().train.params) == digest(calm.run().train.params)
    assert compare(tmp_path / "run", tmp_path / "calm") == []


def test_a_hanging_reward_is_abandoned(tmp_path):
    hangs = failing(1, 9, lambda scores: time.sleep(30))
    run = full_trainer(
        tmp_path / "run", updates=3, save_every=0, reward=hangs, faults=Faults(reward_timeout_s=1.0)
    )
    with pytest.raises(RewardError, match="took more than 1 s"):
        run.run()
    assert (tmp_path / "run/checkpoints/1").is_dir()


def test_an_update_with_a_failed_reward_may_be_skipped(tmp_path, capsys):
    run = full_trainer(
        tmp_path / "run", updates=3, reward=failing(1, 1, with_nan), faults=Faults(reward="skip")
    )
    seen = []
    run.run(on_update=seen.append)
    assert len(seen) == 2 and int(run.state.update) == 3
    rows = read_lines(tmp_path / "run/metrics.jsonl")
    assert [row["update"] for row in rows if "faults/skipped" in row] == [1]
    printed = capsys.readouterr().err
    assert (
        "Update 1: The reward function returned nan for response 3" in printed
        and "1 of 3 updates had faults" in printed
    )


def test_scores_too_large_for_the_running_scale_are_a_fault(tmp_path):
    huge = failing(1, 1, lambda scores: [3e38, *scores[1:]])
    run = full_trainer(tmp_path / "run", updates=3, reward=huge, faults=Faults(reward="skip"))
    run.run()
    assert (
        np.isfinite(jax.tree.leaves(run.state.scale)).all()
        and int(run.state.scale.count) == 2 * FULL_PPO.batch_size
    )
    assert (
        "The score 3e+38 of response 0 is too large"
        in read_lines(tmp_path / "run/faults.jsonl")[0]["message"]
    )


@pytest.mark.parametrize("call", [1, 2], ids=["evaluation", "reward"])
def test_a_signal_during_scoring_stops_after_a_checkpoint(tmp_path, call):
    def signals(scores):
        os.kill(os.getpid(), signal.SIGTERM)
        return scores

    run = full_trainer(
        tmp_path / "run", updates=4, save_every=0, eval_every=1, reward=failing(call, 1, signals)
    )
    with pytest.raises(SystemExit) as stop:
        run.run()
    assert stop.value.code == faults.STOPPED and run.checkpoints.steps()[-1] == (call + 1) // 2 + (
        call == 2
    )


def spoiled(run):
    """Return the run with NaN in the head of its critic."""
    params = run.state.train.params
    bad = {
        **params,
        "critic": {
            **params["critic"],
            "head": jax.tree.map(lambda x: x * jnp.nan, params["critic"]["head"]),
        },
    }
    run.state = run.state.replace(train=run.state.train.replace(params=bad))
    return run


def test_values_that_are_not_finite_are_detected(tmp_path):
    run = spoiled(full_trainer(tmp_path / "run", updates=3))
    with pytest.raises(NonFiniteError, match="A value is not finite in 16 of 16 responses"):
        run.run()
    assert len(read_lines(tmp_path / "run/faults.jsonl")) == 16
    with pytest.raises(NonFiniteError, match="A value is not finite"):
        run.evaluate(run.prompts)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_gradient_that_is_not_finite_is_detected_in_its_update(tmp_path, policy, capsys):
    huge = lambda prompts, responses: [3e38] * len(responses)  # finite, but its square is not
    ppo = FULL_PPO.__class__(
        **{**vars(FULL_PPO), "scale_scores": False, "whiten_rewards": False, "target_kl": None}
    )
    run = full_trainer(
        tmp_path / "run", ppo=ppo, updates=2, reward=huge, faults=Faults(gradient=policy)
    )
    before = digest(run.state.train.params)
    if policy == "stop":
        with pytest.raises(errors.GradientError, match="not finite; 4 steps"):
            run.run()
        assert run.checkpoints.steps() == [1]
    else:
        with pytest.raises(errors.GradientError, match="No optimizer step of the run was taken"):
            run.run()
        assert digest(run.state.train.params) == before
        printed = capsys.readouterr().err
        assert (
            "Update 1: A loss or gradient was not finite; 4 steps" in printed
            and "2 of 2 updates had faults" in printed
        )
    assert {row["update"] for row in read_lines(tmp_path / "run/faults.jsonl")} == (
        {0} if policy == "stop" else {0, 1}
    )
    assert read_lines(tmp_path / "run/metrics.jsonl")[1]["optimizer/skipped"] == 4


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    spoils = dataclasses.replace(
        FULL_PPO, learning_rate=1e38, weight_decay=1e3, target_kl=None, epochs=1, minibatches=1
    )
    run = full_trainer(tmp_path / "run", ppo=spoils, updates=2, faults=Faults(gradient="skip"))
    with pytest.raises(errors.NonFiniteParametersError, match="The new parameters are not finite"):
        run.run()
    rows = read_lines(tmp_path / "run/metrics.jsonl")
    assert run.checkpoints.steps() == [] and [row["update"] for row in rows] == [-1, 0]
    assert {row["kind"] for row in read_lines(tmp_path / "run/faults.jsonl")} == {"gradient"}


def test_persist_retries_reward_errors_within_its_time_limit():
    with pytest.raises(RewardError, match=r"more than 0.05 s"):
        persist(lambda: time.sleep(5), retries=0, timeout_s=0.05)
    with pytest.raises(ZeroDivisionError):  # not a RewardError, so it is not retried
        persist(lambda: 1 / 0, retries=3, timeout_s=1.0)
    for wrong in ({"reward_retries": -1}, {"reward_timeout_s": 0}):
        with pytest.raises(SettingError):
            Faults(**wrong)
    with faults.StopSignals() as signals:
        assert signals.received is None
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# --- commands ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Run six updates of `ppo-jax train`, with a checkpoint after every second update.

    The run is packed and has slots, so that replays and resumes of such runs are tested.
    """
    place = tmp_path_factory.mktemp("command")
    pretrained.save_policy(place / "model", tiny_policy(layers=1), word_tokenizer())
    (place / "prompts.txt").write_text("a b\nc\nd e f\n")
    (place / "reward.py").write_text(
        "def score(prompts, responses):\n    return [r.count('b') for r in responses]\n"
    )
    cli.main(train_command(place, "run"))
    return place


def train_command(place, out, **more):
    given = {
        "model": place / "model",
        "prompts": place / "prompts.txt",
        "reward": f"{place / 'reward.py'}:score",
        "out": place / out,
        "loop.updates": 6,
        "loop.save-every": 2,
        "loop.keep": 9,
        "ppo.batch-size": 8,
        "ppo.max-new-tokens": 4,
        "ppo.rollout-slots": 2,
        "ppo.pack": 64,
        "lora.rank": 2,
        "ppo.learning-rate": 0.03,
    } | more
    return ["train", "--loop.no-progress", "--mesh", "data=1", *options(given)]


def replay_command(run, update, out):
    return ["replay", str(run), "--update", str(update), "--out", str(out)]


@pytest.mark.slow
def test_the_command_prints_a_digest_and_resumes_to_it(folder, capsys):
    summary = read_json(folder / "run/summary.json")
    cli.main(train_command(folder, "half", **{"loop.updates": 3}))
    cli.main(train_command(folder, "half", resume="yes"))
    assert (
        capsys.readouterr().out.splitlines()[-1]
        == f"Digest of the final parameters: {summary['digest']}"
    )
    strip = lambda s: {k: v for k, v in s.items() if not k.startswith(("time/", "perf/"))}
    assert strip(read_json(folder / "half/summary.json")) == strip(summary)
    assert compare(folder / "run", folder / "half") == []
    config = read_json(folder / "half/config.json")
    assert [p["first_update"] for p in config["processes"]] == [0, 3]
    assert {"versions", "devices", "xla_flags"} <= set(config["processes"][0])
    assert set(config["hashes"]) == {
        "model",
        "model_config",
        "prompts",
        "reward",
        "stop_ids",
        "tokenizer",
    }
    assert all(config["hashes"].values())
    with pytest.raises(SystemExit):
        cli.main(train_command(folder, "half", resume="yes", **{"ppo.lam": 0.5}))
    assert "ppo.lam was 0.95" in capsys.readouterr().err


@pytest.fixture(scope="module")
def behind(folder):
    """Run `ppo-jax train` with a policy that samples ahead, and return its folder."""
    cli.main(train_command(folder, "behind", **{"loop.staleness": 2}))
    return folder / "behind"


@pytest.mark.slow
@pytest.mark.parametrize(
    "run, update", [("folder", 0), ("folder", 3), ("folder", 4), ("behind", 0), ("behind", 5)]
)
def test_replay_gives_the_same_bits(run, tmp_path, update, capsys, request):
    run = request.getfixturevalue(run)
    run = run / "run" if (run / "run").exists() else run
    cli.main(replay_command(run, update, tmp_path / "again"))
    out = capsys.readouterr().out
    assert "All its metrics are those of the run." in out
    original = [row for row in read_lines(run / "samples.jsonl") if row["update"] == update]
    replayed = [
        row for row in read_lines(tmp_path / "again/samples.jsonl") if row["update"] == update
    ]
    assert len(replayed) == 8 and replayed[:4] == original


def test_replay_skips_damaged_checkpoints(folder, tmp_path, capsys):
    shutil.copytree(folder / "run", tmp_path / "run")
    for file in (tmp_path / "run/checkpoints/4/state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    cli.main(replay_command(tmp_path / "run", 4, tmp_path / "again"))
    printed = capsys.readouterr()
    assert (
        "All its metrics are those of the run." in printed.out
        and "Trying the checkpoint before it." in printed.err
    )
    assert (tmp_path / "run/checkpoints/4").is_dir()  # replay changes nothing in the run


def test_replay_without_an_earlier_checkpoint_starts_at_update_0(folder, tmp_path, capsys):
    shutil.copytree(folder / "run", tmp_path / "run")
    for checkpoint in (tmp_path / "run/checkpoints").iterdir():
        if int(checkpoint.name) < 5:
            shutil.rmtree(checkpoint)
    cli.main(replay_command(tmp_path / "run", 2, tmp_path / "again"))
    printed = capsys.readouterr()
    assert "All its metrics are those of the run." in printed.out
    assert "no checkpoint at or before update 2; all updates before it are repeated." in printed.err


def test_replay_of_a_folder_or_update_that_does_not_exist_is_refused(folder, tmp_path, capsys):
    for wrong, message in (
        (folder / "model", "is not the configuration of a run"),
        (tmp_path, "is not the folder of a run"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(replay_command(wrong, 1, tmp_path / "new"))
        assert stop.value.code == 2 and message in capsys.readouterr().err
    for update in (-1, 6):
        with pytest.raises(SystemExit) as stop:
            cli.main(replay_command(folder / "run", update, tmp_path / "new"))
        assert stop.value.code == 2 and "must lie in 0 .. 5" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "gives, policy",
    [("[3e38] * len(responses)", "gradient"), ("[float('nan')] * len(responses)", "reward")],
)
def test_replay_of_a_faulty_update_reproduces_the_fault(folder, tmp_path, gives, policy, capsys):
    (tmp_path / "reward.py").write_text(f"def score(prompts, responses):\n    return {gives}\n")
    with pytest.raises(SystemExit):
        cli.main(
            train_command(
                folder,
                tmp_path / "run",
                reward=f"{tmp_path / 'reward.py'}:score",
                **{"loop.updates": 1, f"loop.faults.{policy}": "skip"},
            )
        )
    assert (
        "No optimizer step of the run was taken" in capsys.readouterr().err
        and not (tmp_path / "run/model").exists()
    )
    replay = lambda out: cli.main(replay_command(tmp_path / "run", 0, tmp_path / out))
    replay("same")
    assert "All its metrics are those of the run." in capsys.readouterr().out
    (tmp_path / "reward.py").write_text(
        "def score(prompts, responses):\n    return [1.0 * len(r) for r in responses]\n"
    )
    replay("other")
    out = capsys.readouterr().out
    assert "The reward of the run had the hash" in out and "It differs from the run" in out


@pytest.mark.slow
def test_compare_finds_the_first_difference_of_two_runs(folder, capsys):
    cli.main(train_command(folder, "other", **{"ppo.clip-low": 0.19, "ppo.epochs": 5}))
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", "--exact", str(folder / "run"), str(folder / "other")])
    out = capsys.readouterr().out
    assert stop.value.code == 1
    assert out.count("ppo.epochs is 4 and 5.") == out.count("ppo.clip_low is 0.2 and 0.19.") == 1
    assert "metrics.jsonl: first at update 0: " in out and "Final parameters: digest " in out
    cut = (folder / "other/samples.jsonl").read_text().splitlines()
    row = json.loads(cut[2])
    row["tokens"][1] += 1
    (folder / "other/samples.jsonl").write_text(
        "\n".join([*cut[:2], json.dumps(row), *cut[3:]]) + "\n"
    )
    message = f"token 1 is {row['tokens'][1] - 1} and {row['tokens'][1]}"
    assert any(message in line for line in compare(folder / "run", folder / "other"))
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", "--exact", str(folder / "run"), str(folder / "run")])
    assert stop.value.code == 0 and "final parameters." in capsys.readouterr().out
    (folder / "other/summary.json").unlink()
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", "--exact", str(folder / "other"), str(folder / "other")])
    assert stop.value.code == 0 and "the final parameters are unknown" in capsys.readouterr().out


def test_compare_ignores_output_settings_and_reports_missing_lines(folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run")
    config = read_json(tmp_path / "run/config.json")
    for part in (config["settings"]["loop"], config["settings"]["command"]["loop"]):
        part["save_every"] = 77
    write_json(tmp_path / "run/config.json", config)
    config["settings"]["command"]["mesh"] = "data=8"
    config["processes"][-1]["versions"]["jaxlib"] = "0.0.1"
    write_json(tmp_path / "run/config.json", config)
    assert compare(folder / "run", tmp_path / "run") == []
    rows = (tmp_path / "run/samples.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "run/samples.jsonl").write_bytes(b"".join(rows[:4]) + rows[4][:9])
    mesh, version, part = compare(folder / "run", tmp_path / "run")
    assert mesh == "mesh is data=1 and data=8." and version.endswith(" and 0.0.1.")
    assert part == "samples.jsonl: 1 is an update of one run only."
    (tmp_path / "run/samples.jsonl").write_text('{"update": 0, "tokens": null}\n')
    assert compare(folder / "run", tmp_path / "run")[2].startswith(
        "samples.jsonl: first at update 0: "
    )


def test_settings_survive_json(folder):
    stored = read_json(folder / "run/config.json")["settings"]["command"]
    assert json.loads(json.dumps(to_json(from_json(Train, stored)))) == stored


def test_deterministic_adds_its_flag_once(monkeypatch):
    from ppo_jax.run import provenance

    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    provenance.make_deterministic()
    provenance.make_deterministic()
    assert (
        os.environ["XLA_FLAGS"]
        == f"--xla_cpu_enable_fast_math=false {provenance.DETERMINISTIC_GPU}"
    )


def test_random_keys_of_parameters_and_updates_are_all_different():
    state = PPOState(None, None, None, jax.random.key(0), jnp.int32(0))
    keys = [init_key(0, part) for part in range(3)]
    keys += [child for key in keys for child in jax.random.split(key, 4)]
    keys += [state.replace(update=jnp.int32(u)).key_for(p) for u in range(8) for p in (0, 1)]
    keys += [jax.random.fold_in(jax.random.key(0), u) for u in range(8)]
    assert len({tuple(np.asarray(jax.random.key_data(k)).tolist()) for k in keys}) == len(keys)


def test_scores_may_be_tensors_of_any_float_type():
    want = np.array([0.5, -2.0], np.float32)
    tensor = torch.tensor([0.5, -2.0], requires_grad=True)
    for scores in (
        tensor,
        tensor.to(torch.bfloat16),
        jnp.array([0.5, -2.0], jnp.bfloat16),
        np.array([0.5, -2.0]),
        [0.5, -2],
    ):
        np.testing.assert_array_equal(check_scores(scores, (2,)), want)
    for scores in ([tensor[0], "a"], ["a", "b"], None, [[1], [2, 3]]):
        with pytest.raises(RewardError):
            check_scores(scores, (2,))


def cancelled(scores):
    raise asyncio.CancelledError


def test_a_cancelled_asyncio_task_is_a_reward_error(tmp_path):
    run = full_trainer(tmp_path / "run", updates=3, save_every=0, reward=failing(1, 9, cancelled))
    with pytest.raises(RewardError, match="CancelledError"):
        run.run()
    assert run.checkpoints.steps() == [1]


def test_the_hash_of_a_reward_depends_on_bound_arguments():
    of = lambda **more: code_hash(functools.partial(failing, **more))
    assert of(at=1, times=2) == of(times=2, at=1) != of(at=1, times=3)


class Likes:
    """A reward that is an object with state."""

    def __init__(self, word, made):
        self.word, self.made = word, made

    def __call__(self, prompts, responses):
        return [float(self.word in r) for r in responses]

    def score(self, prompts, responses):
        return self(prompts, responses)

    def other(self, prompts, responses):
        return self(prompts, responses)


def likes(word, more=0):
    calls = []

    def reward(prompts, responses, scale=more):
        calls.append(word)
        return [scale * float(word in r) for r in responses]

    reward([], [])
    return reward


def test_the_hash_of_a_reward_depends_on_code_and_closure():
    assert code_hash(likes("a")) == code_hash(likes("a"))
    assert code_hash(Likes("a", [])) == code_hash(Likes("a", [1]))  # mutable state does not count
    size = {"vocab_size": 21, "positions": 16, "width": 8, "layers": 1, "heads": 2, "mlp_width": 8}
    model = lambda **more: heads.reward_model(TransformerConfig(**size, **more))
    assert code_hash(model()) == code_hash(model())
    rewards = [
        likes("a"),
        likes("b"),
        likes("a", 1),
        likes,
        Likes,
        Likes("a", []),
        Likes("b", []),
        Likes("a", []).score,
        Likes("a", []).other,
        TextReward(likes("a")),
        TextReward(likes("b")),
        model(),
        model(causal=False),
    ]
    assert (
        len({code_hash(reward) for reward in rewards}) == len(rewards) - 2
    )  # the two `TextReward`s have the hashes of the functions in them


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("loop.seed", "-1", "seed must not be negative"),
        ("loop.seed", "9" * 30, r"seed must lie within ±2\.1e\+09"),
        ("ppo.warmup-steps", "9" * 30, "warmup_steps must lie within"),
        ("ppo.learning-rate", "1e300", r"learning_rate must lie within ±1\.7e\+38"),
        ("lora.rank", "9" * 30, "lora.rank must lie within"),
        ("lora.alpha", "nan", "lora.alpha must be a finite number"),
        ("loop.faults.reward-timeout-s", "1e300", "reward_timeout_s must"),
    ],
)
def test_numbers_out_of_range_are_refused_in_one_sentence(
    folder, tmp_path, capsys, name, value, message
):
    with pytest.raises(SystemExit) as stop:
        cli.main(train_command(folder, tmp_path / "run", **{name: value}))
    assert (
        stop.value.code == 2
        and re.search(message, capsys.readouterr().err)
        and not (tmp_path / "run").exists()
    )


def test_the_hash_of_a_tokenizer_depends_on_its_rules_not_on_its_last_call():
    one, other = word_tokenizer(), word_tokenizer()
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    before = tokenizer_hash(one)
    one(["a b c"], truncation=True, max_length=2)
    assert tokenizer_hash(one) == before != tokenizer_hash(other)
    reward = lambda words: code_hash(ModelReward(len, {}, words, 8, 0))
    assert reward(one) == reward(word_tokenizer()) != reward(other)


def test_an_invalid_lora_pattern_is_refused_in_one_sentence(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(train_command(folder, tmp_path / "run", **{"lora.targets": "attn/(q"}))
    assert "is not a regular expression" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings",
    [
        {"ppo": {"minibatches": [1, "a"]}},
        {"ppo": {"lam": ""}},
        {"ppo": {"lam": True}},
        {"loop": {"eval_every": None}},
        {"loop": {"faults": []}},
        {"loop": {"faults": {"reward": "maybe"}}},
        {"model": None},
        {"dtype": 3},
        {"stop_tokens": "<end>"},
        {"lora": None},
        {"ppo": {"epochs": 0}},
        {"ppo": {"kl_estimator": "k9"}},
        3,
        [],
    ],
)
def test_replay_of_invalid_settings_is_refused_in_one_sentence(folder, tmp_path, capsys, settings):
    shutil.copytree(folder / "run", tmp_path / "run")
    config = read_json(tmp_path / "run/config.json")
    command = config["settings"]["command"]
    message = "is not the configuration of a run"
    if isinstance(settings, dict):
        settings = command | {
            name: {**command[name], **x} if isinstance(x, dict) else x
            for name, x in settings.items()
        }
        message = "are not those of a run: "
    config["settings"]["command"] = settings
    write_json(tmp_path / "run/config.json", config)
    with pytest.raises(SystemExit) as stop:
        cli.main(replay_command(tmp_path / "run", 1, tmp_path / "new"))
    assert (
        stop.value.code == 2
        and message in capsys.readouterr().err
        and not (tmp_path / "new").exists()
    )


@pytest.mark.slow
def test_replay_uses_deterministic_kernels_if_the_run_did(folder, tmp_path, monkeypatch):
    shutil.copytree(folder / "run", tmp_path / "run")
    config = read_json(tmp_path / "run/config.json")
    config["settings"]["command"]["deterministic"] = True
    write_json(tmp_path / "run/config.json", config)
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    cli.main(replay_command(tmp_path / "run", 0, tmp_path / "new"))
    assert "--xla_gpu_deterministic_ops=true" in os.environ["XLA_FLAGS"]


def test_messages_with_lone_surrogates_are_written_unchanged(tmp_path):
    def with_surrogate(scores):
        raise ValueError("half of a pair: \ud800")

    run = full_trainer(
        tmp_path / "run",
        updates=2,
        reward=failing(0, 1, with_surrogate),
        faults=Faults(reward="skip"),
    )
    run.run()
    assert all(
        row["message"].endswith("half of a pair: \ud800")
        for row in read_lines(tmp_path / "run/faults.jsonl")
    )
    assert len(read_lines(tmp_path / "run/faults.jsonl")) == 16


class Unreadable:
    def __array__(self, *_, **__):
        raise KeyError("gone")


class Speechless(Exception):
    def __str__(self):
        raise KeyError("gone")


def speechless(prompts, responses):
    raise Speechless


def clears(prompts, responses):
    count = len(responses)
    responses.clear()
    return [0.5] * count


def test_odd_rewards_are_handled_or_refused(tmp_path):
    run = full_trainer(tmp_path / "run", updates=1, samples=0)
    batch = run.prompts.take(np.arange(16) % 6)
    seen = run.collector.collect(run.state, batch).host_rollout
    score = lambda function: TextReward(function)(seen, batch, ["a"] * 16)
    for function, message in (
        (lambda p, r: Unreadable(), "must return 16 numbers"),
        (speechless, "raised Speechless"),
        (max, "which is no number"),
    ):
        with pytest.raises(RewardError, match=message):
            score(function)
    assert score(clears).response.tolist() == [0.5] * 16
    run.step()  # samples=0 writes none
    assert read_lines(tmp_path / "run/samples.jsonl") == []


def test_the_first_quantity_that_is_not_finite_is_reported(tmp_path):
    run = full_trainer(tmp_path / "run", updates=1, adapters=False)
    params = run.state.train.params
    params = {**params, "policy": jax.tree.map(lambda x: x * jnp.nan, params["policy"])}
    run.state = run.state.replace(train=run.state.train.replace(params=params))
    with pytest.raises(NonFiniteError, match="A sampled log-prob is not finite"):
        run.step()


def test_pmap_is_refused_with_several_processes(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(SystemExit):
        cli.main(train_command(folder, tmp_path / "run", mesh="pmap"))
    assert (
        "mesh=pmap runs in one process" in capsys.readouterr().err
        and not (tmp_path / "run").exists()
    )


def parsed(arguments):
    return tyro.cli(Train, args=arguments[1:])


def leaves(*_):
    raise SystemExit(0)


def test_a_token_reward_that_exits_is_a_reward_error():
    seen = types.SimpleNamespace(
        **{name: np.zeros((2, 3), np.int32) for name in ("tokens", "mask", "response_mask")}
    )
    with pytest.raises(RewardError, match="raised SystemExit"):
        TokenReward(leaves)(seen, None, [])


def test_a_reward_cannot_change_the_rows_of_the_prompts():
    def reward(prompts, responses, rows):
        return [rows.pop()["words"].pop() for _ in responses]

    prompts = data.Prompts(
        [{"prompt": "a", "words": [1.0]}], np.zeros((1, 1), np.int32), np.ones((1, 1), bool)
    )
    scores = [TextReward(reward)(None, prompts, ["b"]).response.tolist() for _ in range(2)]
    assert scores == [[1.0], [1.0]] and prompts.rows == [{"prompt": "a", "words": [1.0]}]


def test_the_hash_of_a_reward_in_a_file_depends_on_its_class(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))  # A reward's folder is added to it.
    file, seen = tmp_path / "random.py", []  # named like a module that must not be replaced
    for factor in (1.0, 2.0, 1.0):
        file.write_text(
            "from __future__ import annotations\nimport dataclasses\n\n"
            "@dataclasses.dataclass\nclass Score:\n    by: float = 1.0\n"
            "    def __call__(self, prompts, responses):\n"
            f"        return [{factor} for _ in responses]\n\nscore = Score()\n"
        )
        seen.append(code_hash(load_reward(f"{file}:score")))
    assert seen[0] == seen[2] != seen[1] and random.random() < 1


@pytest.mark.slow
def test_a_resumed_run_has_no_summary_until_it_ends(folder, tmp_path, capsys):
    out = tmp_path / "run"
    cli.main(train_command(folder, out, **{"loop.updates": 2, "loop.faults.reward": "skip"}))
    assert (out / "summary.json").exists()
    command = parsed(
        train_command(
            folder, out, resume="auto", **{"loop.updates": 4, "loop.faults.reward": "skip"}
        )
    )
    trainer = command.build(out)
    assert not (out / "summary.json").exists()
    trainer.step()
    trainer.checkpoints.close()
    trainer._run_loop._claim.release()
    assert not any("Final parameters" in line for line in compare(folder / "run", out))
    cli.main(
        train_command(
            folder, out, resume="auto", **{"loop.updates": 4, "loop.faults.reward": "skip"}
        )
    )
    assert (
        read_json(out / "summary.json")["updates"] == 4
        and f"The run in {out} continues after 2 updates." in capsys.readouterr().out
    )


def test_a_summary_holds_the_metrics_of_the_last_update_only(folder, tmp_path):
    (tmp_path / "reward.py").write_text(
        "calls = iter(range(9))\ndef score(prompts, responses):\n"
        "    return [float('nan') if next(calls) == 1 else 1.0] + [1.0] * (len(responses) - 1)\n"
    )
    cli.main(
        train_command(
            folder,
            tmp_path / "run",
            reward=f"{tmp_path / 'reward.py'}:score",
            **{"loop.updates": 3, "loop.faults.reward": "skip"},
        )
    )
    summary = read_json(tmp_path / "run/summary.json")
    assert "faults/skipped" not in summary and "objective/kl" in summary
    assert [
        row["update"]
        for row in read_lines(tmp_path / "run/metrics.jsonl")
        if "faults/skipped" in row
    ] == [1]


def test_the_folder_is_locked_until_the_model_is_written(folder, tmp_path, monkeypatch):
    errors_seen, save = [], transformers.PreTrainedTokenizerFast.save_pretrained

    def try_to_lock(tokenizer, *args, **kwargs):
        program = (
            "from pathlib import Path\nfrom ppo_jax.run.files import lock_folder\n"
            f"lock_folder(Path({str(tmp_path / 'run')!r}))"
        )
        command = [sys.executable, "-c", program]
        errors_seen.append(subprocess.run(command, capture_output=True, text=True).stderr)
        return save(tokenizer, *args, **kwargs)

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", try_to_lock)
    cli.main(train_command(folder, tmp_path / "run", **{"loop.updates": 1}))
    assert "Another process is writing to" in errors_seen[0]
    lock_folder(tmp_path / "run").release()


def test_the_hash_of_a_tokenizer_depends_on_cleaning_up_spaces():
    one, other = word_tokenizer(), word_tokenizer()
    other.clean_up_tokenization_spaces = True
    assert tokenizer_hash(one) != tokenizer_hash(other)
