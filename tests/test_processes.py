"""Test runs of several processes on this machine, each with virtual devices.

They give the result of one process, and none hangs if another dies.
"""

import json
import os
import signal
import socket
import time

import jax
import numpy as np
import pytest
from helpers import (
    command_line,
    has_zero_gradient,
    options,
    run_command,
    run_script,
    start_process,
    tiny_policy,
    word_tokenizer,
)

from ppo_jax.distributed import processes
from ppo_jax.errors import NonFiniteError, RewardError, SettingError
from ppo_jax.models.io import pretrained
from ppo_jax.run.compare import compare
from ppo_jax.run.files import read_json, read_lines

REWARD = """
import itertools, os, pathlib, time
calls = itertools.count(1)
def score(prompts, responses):
    if len(responses) != int(os.environ["ROWS"]):
        raise ValueError(f"{len(responses)} rows")
    if pathlib.Path("fail").exists() and os.environ.get("JAX_PROCESS_ID") == "1":
        return [float("nan")] * len(responses)
    if next(calls) == int(os.environ["WAIT_IN_CALL"]):
        while not pathlib.Path("go").exists():
            time.sleep(0.05)
    return [r.count("b") for r in responses]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("processes")
    pretrained.save_policy(place / "model", tiny_policy(layers=1), word_tokenizer())
    (place / "prompts.txt").write_text("a b\nc\nd e f\ng h\ni\n")
    (place / "reward.py").write_text(REWARD)
    return place


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(
    folder,
    out,
    count,
    *,
    mesh,
    devices=2,
    updates=4,
    rows=None,
    waits=False,
    last=None,
    last_in=None,
    **more,
):
    """Start `count` processes of one run.

    The last process may have additional options (`last`) or another working folder (`last_in`).
    If `waits`, the reward of the second update waits until a file `go` exists.
    """
    given = {
        "model": "model",
        "prompts": "prompts.txt",
        "eval-prompts": "prompts.txt",
        "reward": "reward.py:score",
        "out": out,
        "loop.updates": updates,
        "loop.save-every": 1,
        "loop.eval-every": 1,
        "ppo.batch-size": 16,
        "ppo.minibatches": 2,
        "ppo.max-new-tokens": 5,
        "ppo.learning-rate": 1e-4,
        "ppo.adam-eps": 1e-5,
        "mesh": mesh,
        "processes.lost-after-s": 10,
        **more,
    }
    command = [*command_line("train", **given), "--loop.no-progress", "--loop.no-tensorboard"]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    rows = 16 // count if rows is None else rows
    env = {"XLA_FLAGS": flags, "ROWS": str(rows)}
    # Call 1 is the evaluation before the first update, and call 3 the one after it.
    env["WAIT_IN_CALL"] = "4" if waits else "0"
    if count > 1:
        env["JAX_COORDINATOR_ADDRESS"] = f"localhost:{free_port()}"
        env["JAX_NUM_PROCESSES"] = str(count)
    started = []
    for index in range(count):
        number = {"JAX_PROCESS_ID": str(index)} if count > 1 else {}
        is_last = index == count - 1
        process = start_process(
            run_command,
            command + options(last or {}) if is_last else command,
            log=folder / f"{out}.{index}.log",
            folder=last_in if last_in and is_last else folder,
            **env,
            **number,
        )
        started.append(process)
    return started


def finish(folder, out, started, expected=0, timeout=600):
    try:
        for index, process in enumerate(started):
            process.join(timeout)
            printed = (folder / f"{out}.{index}.log").read_text()
            assert process.exitcode == expected, printed[-3000:]
    finally:
        for process in started:  # so that none outlives a failed test
            process.kill()
            process.join()


def run(folder, out, count, **options):
    finish(folder, out, start(folder, out, count, **options))
    return folder / out


def parameters(out):
    return pretrained.load_policy(out / "model").params


def assert_same_run(found, expected):
    rounding, causes = (
        ("metrics", "Final"),
        ("mesh is", "xla_flags is"),
    )  # hashes, settings and samples are equal
    assert [x for x in compare(found, expected) if not x.startswith((*rounding, *causes))] == []
    for path, x in jax.tree_util.tree_leaves_with_path(parameters(found)):
        if not has_zero_gradient(path):
            y = parameters(expected)
            for part in path:
                y = y[part.key]
            np.testing.assert_allclose(x, y, atol=1e-6, err_msg=jax.tree_util.keystr(path))
    for a, b in zip(
        read_lines(found / "metrics.jsonl"), read_lines(expected / "metrics.jsonl"), strict=True
    ):
        for name in set(a) - {"update"}:
            if not name.startswith(("time/", "perf/")):
                np.testing.assert_allclose(a[name], b[name], atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_two_processes_give_the_result_of_one_even_if_one_of_them_dies(folder):
    """The run learns from older responses, so that a checkpoint also holds pending rollouts."""
    late = {"mesh": "data=2,fsdp=2", "updates": 3, "loop.staleness": 1}
    two = run(folder, "two", 2, **late)
    assert_same_run(two, run(folder, "one", 1, devices=4, **late))
    assert len(read_json(two / "config.json")["processes"]) == 1
    kill_one(folder, "again", 1, **late)
    again = run(folder, "again", 2, resume="auto", **late)
    assert compare(two, again) == []
    assert read_json(two / "summary.json")["digest"] == read_json(again / "summary.json")["digest"]


@pytest.mark.slow
def test_if_the_coordinator_dies_the_others_end(folder):
    kill_one(folder, "dies", 0, mesh="data=4")


def kill_one(folder, out, dies, **more):
    """Kill one of two processes in the second update, and check that the other ends."""
    started = start(folder, out, 2, waits=True, **more)
    wait_for_the_second_update(folder / out)
    started[dies].kill()
    started[1 - dies].join(60)
    assert started[1 - dies].exitcode not in (0, None)
    assert "process" in (folder / f"{out}.{1 - dies}.log").read_text().lower()


@pytest.mark.slow
def test_a_signal_to_one_of_four_stops_all_and_fewer_go_on(folder):
    started = start(folder, "four", 4, devices=1, mesh="data=2,fsdp=2", waits=True)
    wait_for_the_second_update(folder / "four")
    os.kill(started[1].pid, signal.SIGTERM)
    (folder / "go").touch()
    finish(folder, "four", started, expected=75)
    (folder / "go").unlink()
    assert read_lines(folder / "four/metrics.jsonl")[-1]["update"] == 1
    run(folder, "four", 2, devices=1, mesh="fsdp=2", updates=3, resume="yes")
    four = run(folder, "four", 1, devices=1, mesh="data=1", resume="auto")
    assert_same_run(four, run(folder, "alone", 1, devices=4, mesh="data=2,fsdp=2"))


@pytest.mark.slow
def test_a_fault_in_one_process_stops_all_after_a_checkpoint(folder):
    (folder / "fail").touch()
    finish(folder, "fault", start(folder, "fault", 2, mesh="data=4"), expected=2)
    (folder / "fail").unlink()
    for index in range(2):
        assert (
            "In process 1: The reward function returned nan for response 0"
            in (folder / f"fault.{index}.log").read_text()
        )
    dumped = read_lines(folder / "fault/faults.jsonl")
    assert len(dumped) == 8 and dumped[0]["prompt"]


@pytest.mark.slow
def test_processes_with_different_settings_are_refused(folder):
    finish(
        folder,
        "parts",
        start(folder, "parts", 2, mesh="data=4", last={"ppo.epochs": 1}),
        expected=2,
    )
    for index in (0, 1):
        assert (
            "ppo.epochs is not the same in process 1 as in process 0"
            in (folder / f"parts.{index}.log").read_text()
        )
    assert not (folder / "parts").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "shared, message",
    [(True, "prompts is not the same in process 1"), (False, "is not visible to all processes")],
)
def test_processes_with_different_files_or_folders_are_refused(folder, shared, message):
    out = f"files{shared}"
    place = folder / f"elsewhere{shared}"
    place.mkdir()
    if shared:
        (folder / out).mkdir()
    for name in ("model", "reward.py", *([out] if shared else [])):
        (place / name).symlink_to(folder / name)
    (place / "prompts.txt").write_text("a b\n")
    finish(folder, out, start(folder, out, 2, mesh="data=4", last_in=place), expected=2)
    for index in (0, 1):
        assert message in (folder / f"{out}.{index}.log").read_text()
    assert not (folder / out / "metrics.jsonl").exists()


def test_an_invalid_coordinator_is_refused():
    first_of_two = {"count": 2, "index": 0}
    for where in ("localhost", "localhost:", "localhost:99999", ":80"):
        with pytest.raises(SettingError, match="coordinator must be HOST:PORT"):
            processes.Processes(coordinator=where, **first_of_two).start()
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        with pytest.raises(ValueError, match="Process 0 cannot listen on port"):
            processes.Processes(
                coordinator=f"localhost:{taken.getsockname()[1]}", **first_of_two
            ).start()


EXCHANGE = """
from ppo_jax.distributed import processes
from ppo_jax.errors import RewardError, SettingError

def message_of(call):
    try:
        call()
    except (RewardError, ValueError) as error:
        return str(error), getattr(error, "rows", None)

processes.Processes().start()
first, rows = processes.is_first(), tuple(range(100))
for message in ("x" * 5000, "\u9519" * 900, '"\\\\' * 900, "\x01\\udc80" * 900):
    fault = None if first else RewardError(message, rows)
    found = message_of(lambda: processes.raise_everywhere(fault))
    assert found == (f"In process 1: {message}", rows), found
assert [processes.any_process(flag) for flag in (False, not first, True)] == [False, True, True]
processes.check_same({"a": 1, "b": None})
for values in ({"a": 1, "b": first}, {"a": 1} if first else {"a": 1, "b": 2}):
    message, _ = message_of(lambda: processes.check_same(values))
    assert message.startswith("b is not the same in process 1 as in process 0"), message
"""


@pytest.mark.slow
def test_processes_exchange_messages_of_any_length_and_script_and_name_differences(folder):
    (folder / "exchange.py").write_text(EXCHANGE)
    several = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    started = [
        start_process(
            run_script,
            folder / "exchange.py",
            log=folder / f"exchange.{index}.log",
            folder=folder,
            **several,
            JAX_PROCESS_ID=str(index),
        )
        for index in range(2)
    ]
    finish(folder, "exchange", started)


def wait_for_the_second_update(out, seconds=300):
    """Wait until the evaluations before and after the first update are written."""
    metrics, end = out / "metrics.jsonl", time.monotonic() + seconds
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert time.monotonic() < end
        time.sleep(0.1)


# --- a single process ---


def test_one_process_agrees_with_itself():
    assert processes.is_first() and processes.any_process(True) and not processes.any_process(False)
    processes.raise_everywhere(None)
    with pytest.raises(RewardError, match="gone"):
        processes.raise_everywhere(RewardError("gone", (3,)))
    done = []
    processes.on_first_process(lambda: done.append(1))
    assert done == [1]
    with pytest.raises(ValueError, match="full"):
        processes.on_first_process(
            lambda: json.loads(
                "full is no JSON" if not done else (_ for _ in ()).throw(ValueError("full"))
            )
        )
    assert NonFiniteError.kind in ("logprobs",)


@pytest.mark.parametrize(
    "given, message",
    [({"count": 2}, "need coordinator, count and index"), ({"index": 0}, "need coordinator")],
)
def test_incomplete_process_settings_are_refused(given, message):
    with pytest.raises(SettingError, match=message):
        processes.Processes(**given).start()


@pytest.mark.slow
def test_waiting_for_a_missing_process_ends(folder):
    """If the second of two processes never joins, JAX aborts the first."""
    first, second = start(folder, "waits", 2, mesh="data=4", **{"processes.join-within-s": 5})
    second.kill()
    first.join(60)
    assert first.exitcode == -signal.SIGABRT and not (folder / "waits").exists()
