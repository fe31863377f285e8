"""Test what users' reward functions take and return, their worker processes, and unscored rows."""

import asyncio
import dataclasses
import functools
import json
import os
import signal
import sys
from decimal import Decimal

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FULL_PPO, full_trainer

from ppo_jax import cli, data
from ppo_jax.errors import RewardError
from ppo_jax.ops.rewards import MissingEOS
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.reward_functions import TaskScores, TextReward, TimedReward, require_scores
from ppo_jax.reward_functions.loading import load_reward, load_rewards
from ppo_jax.run import evaluation, faults
from ppo_jax.run.files import read_lines
from ppo_jax.types import Rollout


def column(folder, name):
    """Return the values of a metric over the updates that report it."""
    return [line[name] for line in read_lines(folder / "metrics.jsonl") if name in line]


def columns_by_name(prompts, responses, answer=None, **kwargs):
    return [float(a == 7) + len(kwargs["level"]) for a in answer]


def of_trl(completions, answer, **kwargs):
    return [
        len(text) + value + len(kwargs["prompt"][0]) + len(kwargs["prompts"]) - 2
        for text, value in zip(completions, answer, strict=True)
    ]


def with_rows(prompts, responses, rows):
    return [row["answer"] for row in rows]


def responses_first(responses, prompts):
    return ["xy".index(response) + 1 for response in responses]


async def waits(prompts, responses):
    await asyncio.sleep(0)
    return [1.0, 2.0]


@pytest.fixture(params=["reward_with_workers", "code"])
def file_with_workers(tmp_path, request):
    """Return a reward's file whose worker processes import it, and which imports one beside it."""
    (tmp_path / "beside_it.py").write_text("def score(text):\n    return len(text)\n")
    (tmp_path / "random.py").write_text("")  # must not replace Python's, which a worker imports
    file = tmp_path / f"{request.param}.py"  # Python has a module `code`.
    file.write_text(
        "import multiprocessing\n"
        "from beside_it import score\n"
        "def one(response):\n"
        "    return score(response)\n"
        "def reward(prompts, responses, method='spawn'):\n"
        "    with multiprocessing.get_context(method).Pool(1) as pool:\n"
        "        return pool.map_async(one, responses).get(timeout=60)\n"
    )
    yield file
    sys.path.remove(str(tmp_path))
    sys.modules.pop("beside_it")


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_reward_may_have_worker_processes(file_with_workers, method):
    """A worker that starts afresh finds the functions of the reward's file by their names.

    So it does if the file was loaded before, for another reward for example.
    """
    for file in (os.path.relpath(file_with_workers), file_with_workers):
        reward = load_reward(f"{file}:reward")
        assert reward.function([], ["a", "bcd"], method) == [1, 3]


def test_a_reward_file_hides_no_other_module(tmp_path):
    """A file with the name of a module of Python runs under a name of its own."""
    (tmp_path / "json.py").write_text("def reward(prompts, responses):\n    return [1.0]\n")
    reward = load_reward(f"{tmp_path / 'json.py'}:reward")
    sys.path.remove(str(tmp_path))
    assert reward.function([], [""]) == [1.0]
    assert sys.modules["json"] is json


def two_prompts():
    rows = [{"prompt": "a", "answer": n, "level": 0} for n in (7, 8)]
    return data.Prompts(rows, np.array([[1], [1]]), np.ones((2, 1), bool))


@pytest.mark.parametrize(
    "function, scores",
    [
        (columns_by_name, [3, 2]),
        (of_trl, [9, 10]),
        (with_rows, [7, 8]),
        (responses_first, [1, 2]),
        (functools.partial(columns_by_name, answer=[8, 7]), [2, 3]),
        (waits, [1, 2]),
    ],
)
def test_a_reward_gets_columns_by_name_and_may_be_async(function, scores):
    given = TextReward(function)(None, two_prompts(), ["x", "y"]).response
    np.testing.assert_array_equal(given, scores)


@pytest.mark.parametrize(
    "returned, rows, message",
    [
        ([1.0, "good"], (1,), "returned 'good' for response 1, which is no number"),
        (["1.5", None], (0,), "returned '1.5' for response 0"),
        ([1.0, [2.0]], (1,), "for response 1, which is no number"),
        ([{"a": 1.0}, {"a": 2.0}], (0, 1), "2 of 2 scores"),
        ((1.0 for _ in "xy"), (), "must return 2 numbers: it returned <generator"),
        (1.0, (), "must return 2 numbers: it returned 1.0"),
        ([1.0, np.nan], (1,), "returned nan for response 1"),
    ],
)
def test_what_is_no_score_is_named_with_its_row(returned, rows, message):
    with pytest.raises(RewardError, match=message) as caught:
        TextReward(lambda prompts, responses: returned)(None, two_prompts(), ["x", "y"])
    assert caught.value.rows == rows


@pytest.mark.parametrize(
    "returned",
    [
        [Decimal("1.5"), None],
        (np.float32(1.5), None),
        [jnp.float32(1.5), None],
        np.array([1.5, None]),
        np.ma.array([1.5, 2.0], mask=[False, True]),
    ],
)
def test_numbers_of_any_type_are_scores(returned):
    scores = TextReward(lambda prompts, responses: returned)(None, two_prompts(), ["x", "y"])
    np.testing.assert_array_equal(scores.response, [1.5, np.nan])


@pytest.mark.parametrize(
    "function",
    [lambda prompts, responses, anser: [0, 0], lambda completions, anser, **kwargs: [0, 0]],
)
def test_a_reward_whose_column_is_missing_is_refused(function):
    message = "needs the column 'anser', but the columns of the prompts are: answer, level, prompt"
    with pytest.raises(RewardError, match=message):
        TextReward(function)(None, two_prompts(), ["x", "y"])


def test_named_parts_are_added_up():
    returned = {"long": [1, None], "right": np.array([0.5, 2.0]), "given": [None, None]}
    scores = TextReward(lambda prompts, responses: returned)(None, two_prompts(), ["x", "y"])
    np.testing.assert_array_equal(scores.response, [1.5, 2])
    np.testing.assert_array_equal(scores.parts["long"], [1, np.nan])
    assert scores.part_means() == {"reward/long": 1, "reward/right": 1.25}
    with pytest.raises(RewardError, match=r"In the part 'long': .*shape"):
        TextReward(lambda prompts, responses: {"long": [1]})(None, two_prompts(), ["x", "y"])
    with pytest.raises(RewardError, match="no score for any of 2 responses"):
        require_scores(TaskScores(np.full(2, np.nan)))


def test_a_reward_of_trl_gets_messages():
    seen = []
    function = lambda prompts, completions: seen.append((prompts, completions)) or [0] * 3
    turns = [[{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b "}], "c"]
    rows = [{"prompt": "text", "messages": x} for x in turns]
    tokens, flags = np.ones((3, 1), int), np.array([True, True, False])
    TextReward(function)(None, data.Prompts(rows, tokens, tokens > 0, flags), ["x", "y", "z"])
    answers = [[{"role": "assistant", "content": text}] for text in ("x", "b y")]
    assert seen == [([*turns[:2], "text"], [*answers, "z"])]


@pytest.fixture
def reward_file(tmp_path):
    """Return the file of functions that take long, fail or score some responses only."""
    file = tmp_path / "some_rewards.py"
    file.write_text(
        "import asyncio, os, time\n"
        "def length(prompts, responses):\n    return [len(text) for text in responses]\n"
        "def some(prompts, responses):\n    return [None, 2.0][-len(responses):]\n"
        "def parts(prompts, responses):\n"
        "    return {'a': [1.0 for _ in responses], 'b': [None for _ in responses]}\n"
        "def loops(prompts, completions, answer):\n"
        "    while completions[0] == 'loop': pass\n"
        "    if completions[0] == 'exit': os._exit(3)\n"
        "    return {'length': [len(completions[0])], 'answer': answer}\n"
        "async def waits(prompts, responses, rows):\n"
        "    await asyncio.sleep(9 * (responses[0] == 'loop'))\n"
        "    return [rows[0]['answer'] / (responses[0] != 'exit')]\n"
    )
    yield str(file)
    sys.path.remove(str(tmp_path))
    sys.modules.pop("some_rewards", None)


def test_several_rewards_are_added_up_by_their_weights(reward_file):
    specs = [f"{reward_file}:{name}" for name in ("length=0.5", "some", "parts=-2", "length=0")]
    reward = load_rewards(specs)
    scores = reward(None, two_prompts(), ["abcd", "ab"])
    np.testing.assert_array_equal(scores.response, [2 - 2, 1 + 2 - 2])
    means = {f"reward/{name}": float(x) for name, x in [("length", 3), ("some", 2), ("parts", 1)]}
    assert scores.part_means() == means | {"reward/parts/a": 1, "reward/length#2": 3}
    only_some = load_rewards([specs[1], specs[3]])(None, two_prompts(), ["abcd", "ab"])
    np.testing.assert_array_equal(only_some.response, [np.nan, 2])
    # Runs with one reward can still be resumed, because its hash is that of earlier versions.
    assert isinstance(load_rewards([f"{reward_file}:length"]), TextReward)


@pytest.mark.parametrize("name", ["loops", "waits"])
def test_a_response_that_takes_too_long_has_no_score(reward_file, name):
    reward = load_rewards([f"{reward_file}:{name}"], timeout_s=2)
    scores = reward(None, two_prompts(), ["loop", "ab"])
    np.testing.assert_array_equal(scores.response, [np.nan, 8 + 2 * (name == "loops")])
    np.testing.assert_array_equal(scores.parts["timeouts"], [1, 0])
    with pytest.raises(RewardError, match=r"(status 3)|(some_rewards.py, line 14: .*zero)"):
        reward(None, two_prompts(), ["exit", "ab"])
    with pytest.raises(RewardError, match="for any of 2 responses; 2 of them took longer"):
        require_scores(reward(None, two_prompts(), ["loop", "loop"]))


@pytest.mark.parametrize(
    "given, message",
    [
        ({"specs": []}, "Name a reward"),
        ({"specs": ["length=0"]}, "All weights .* are 0"),
        ({"specs": ["length=inf"]}, "must be a finite number"),
        ({"specs": ["length"], "given": "tokens", "timeout_s": 1}, "reward_timeout=1 limits"),
        ({"specs": ["length", "some"], "label": "a"}, "reward_label=a selects"),
        ({"specs": ["length=a"]}, "has no function 'length=a'"),
    ],
)
def test_rewards_that_cannot_be_added_up_are_refused(reward_file, given, message):
    specs = [f"{reward_file}:{name}" for name in given.pop("specs")]
    try:
        with pytest.raises(ValueError, match=message):
            load_rewards(specs, **given)
    finally:
        sys.path.append(os.path.dirname(reward_file))  # The fixture removes it.


def test_a_time_limit_needs_a_function_that_a_process_can_import():
    with pytest.raises(RewardError, match="define it at the top of a file"):
        TimedReward(lambda prompts, responses: [1], 1.0)(None, two_prompts(), ["x", "y"])


def test_an_async_reward_inside_an_event_loop():
    """A notebook runs its cells inside an event loop."""

    async def cell():
        return TextReward(waits)(None, two_prompts(), ["x", "y"]).response

    np.testing.assert_array_equal(asyncio.run(cell()), [1, 2])


@pytest.mark.slow
def test_a_response_without_a_score_is_left_out(tmp_path):
    """The reward returns None for it; the other responses are learned from, and it is counted."""
    unscored = lambda prompts, responses: {"a": [None, *[float(len(r)) for r in responses[1:]]]}
    full_trainer(tmp_path / "run", reward=unscored, updates=2, eval_every=1).run()
    assert column(tmp_path / "run", "response/scored") == [15 / 16] * 2
    assert min(column(tmp_path / "run", "optimizer/steps")) > 0
    assert np.isfinite(column(tmp_path / "run", "eval/scores")).all()
    samples = [json.loads(x) for x in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert samples[0]["score"] is None
    assert np.isfinite(column(tmp_path / "run", "reward/a")).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    [
        {"missing_eos": MissingEOS.REPLACE, "missing_eos_penalty": 50.0},
        {"overlong_buffer": 4, "overlong_penalty": 50.0},
    ],
    ids=lambda rule: next(iter(rule)),
)
def test_an_evaluation_applies_the_rules_for_ends_and_lengths(tmp_path, rule):
    """A policy that never ends its responses must not be the best by evaluation."""
    ppo = dataclasses.replace(FULL_PPO, **rule)
    trainer = full_trainer(tmp_path / "run", ppo=ppo, adapters=False, updates=1, eval_every=1)
    trainer.run()
    plain = full_trainer(tmp_path / "plain", adapters=False, updates=1, eval_every=1)
    plain.run()
    with_rule, without = (column(tmp_path / x, "eval/scores")[-1] for x in ("run", "plain"))
    assert with_rule < without - 5


@pytest.mark.parametrize("scaled, most", [(False, 2.0), (True, 9.0)])
def test_scores_of_an_evaluation_are_clipped_where_training_clips_the_same_scores(scaled, most):
    mask = np.array([[True, True], [True, False]])
    rollout = Rollout(mask.astype(int), mask, mask, np.zeros((2, 2)), np.array([True, True]))
    ppo = PPOConfig(score_clip=2.0, scale_scores=scaled)
    scores = evaluation.optimized_scores(ppo, np.array([9.0, -1.0], np.float32), rollout)
    np.testing.assert_array_equal(scores, [most, -1.0])


@pytest.mark.filterwarnings("ignore:os.fork.. was called:RuntimeWarning")
def test_a_forked_worker_does_not_inherit_the_stop_handler():
    with faults.StopSignals() as signals:
        child = os.fork()
        if child == 0:
            os._exit(int(signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL))
        assert os.waitpid(child, 0)[1] == 0
        assert signal.getsignal(signal.SIGTERM) == signals._handle


@pytest.mark.filterwarnings("ignore:os.fork.. was called:RuntimeWarning")
def test_only_the_main_process_says_that_it_was_interrupted(capfd):
    with cli._exit_on_interrupt():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGINT
    assert capfd.readouterr().err == ""
