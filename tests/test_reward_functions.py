"""Test what users' reward functions take and return, their worker processes, and unscored rows."""

import asyncio
import dataclasses
import functools
import json
import os
import signal
import sys

import numpy as np
import pytest
from helpers import FULL_PPO, full_trainer

from ppo_jax import data
from ppo_jax.errors import RewardError
from ppo_jax.ops.rewards import MissingEOS
from ppo_jax.reward_functions import TextReward
from ppo_jax.reward_functions.loading import load_reward
from ppo_jax.run import faults
from ppo_jax.run.files import read_lines


def column(folder, name):
    """Return the values of a metric over the updates that report it."""
    return [line[name] for line in read_lines(folder / "metrics.jsonl") if name in line]


def columns_by_name(prompts, responses, answer=None, **kwargs):
    return [float(a == 7) + len(kwargs["level"]) for a in answer]


def of_trl(completions, answer, **kwargs):
    return [
        len(text) + value + len(kwargs["prompt"][0])
        for text, value in zip(completions, answer, strict=True)
    ]


def with_rows(prompts, responses, given):
    return [row["answer"] for row in given]


async def waits(prompts, responses):
    await asyncio.sleep(0)
    return [1.0, 2.0]


@pytest.fixture
def reward_in_files(tmp_path):
    """Return a reward whose worker processes import it, and which imports a file beside it."""
    (tmp_path / "beside_it.py").write_text("def score(text):\n    return len(text)\n")
    (tmp_path / "random.py").write_text("")  # must not replace Python's, which a worker imports
    file = tmp_path / "reward_with_workers.py"
    file.write_text(
        "import multiprocessing\n"
        "from beside_it import score\n"
        "def one(response):\n"
        "    return score(response)\n"
        "def reward(prompts, responses, method='spawn'):\n"
        "    with multiprocessing.get_context(method).Pool(1) as pool:\n"
        "        return pool.map_async(one, responses).get(timeout=60)\n"
    )
    yield load_reward(f"{file}:reward")
    sys.path.remove(str(tmp_path))
    for name in ("beside_it", "reward_with_workers"):
        sys.modules.pop(name)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_reward_may_have_worker_processes(reward_in_files, method):
    """A worker that starts afresh finds the functions of the reward's file by their names."""
    assert reward_in_files.function([], ["a", "bcd"], method) == [1, 3]


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
        (functools.partial(columns_by_name, answer=[8, 7]), [2, 3]),
        (waits, [1, 2]),
    ],
)
def test_a_reward_gets_columns_by_name_and_may_be_async(function, scores):
    given = TextReward(function)(None, two_prompts(), ["x", "y"]).response
    np.testing.assert_array_equal(given, scores)


@pytest.mark.parametrize(
    "returned, message",
    [([None, None], "None for every response"), ({"length": [1, 2]}, "dict .*length")],
)
def test_no_score_at_all_and_a_dict_are_refused_by_name(returned, message):
    with pytest.raises(RewardError, match=message):
        TextReward(lambda prompts, responses: returned)(None, two_prompts(), ["x", "y"])


def test_an_async_reward_inside_an_event_loop():
    """A notebook runs its cells inside an event loop."""

    async def cell():
        return TextReward(waits)(None, two_prompts(), ["x", "y"]).response

    np.testing.assert_array_equal(asyncio.run(cell()), [1, 2])


def test_a_response_without_a_score_is_left_out(tmp_path):
    """The reward returns None for it; the other responses are learned from, and it is counted."""
    unscored = lambda prompts, responses: [None, *[float(len(r)) for r in responses[1:]]]
    full_trainer(tmp_path / "run", reward=unscored, updates=2, eval_every=1).run()
    assert column(tmp_path / "run", "response/scored") == [15 / 16] * 2
    assert min(column(tmp_path / "run", "optimizer/steps")) > 0
    assert np.isfinite(column(tmp_path / "run", "eval/scores")).all()
    samples = [json.loads(x) for x in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert samples[0]["score"] is None


@pytest.mark.slow
def test_an_evaluation_applies_the_rule_for_a_missing_end(tmp_path):
    """A policy that never ends its responses must not be the best by evaluation."""
    ppo = dataclasses.replace(FULL_PPO, missing_eos=MissingEOS.REPLACE, missing_eos_penalty=50.0)
    trainer = full_trainer(tmp_path / "run", ppo=ppo, adapters=False, updates=1, eval_every=1)
    trainer.run()
    plain = full_trainer(tmp_path / "plain", adapters=False, updates=1, eval_every=1)
    plain.run()
    with_rule, without = (column(tmp_path / x, "eval/scores")[-1] for x in ("run", "plain"))
    assert with_rule < without - 5


@pytest.mark.filterwarnings("ignore:os.fork.. was called:RuntimeWarning")
def test_a_forked_worker_does_not_inherit_the_stop_handler():
    with faults.StopSignals() as signals:
        child = os.fork()
        if child == 0:
            os._exit(int(signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL))
        assert os.waitpid(child, 0)[1] == 0
        assert signal.getsignal(signal.SIGTERM) == signals._handle
