"""Reruns and resumes reproduce a run exactly, also after kills; unsuitable runs are not resumed."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from filelock import FileLock, Timeout
from helpers import (
    FULL_PPO,
    command_line,
    full_trainer,
    likes_b,
    run_full_trainer,
    slow_but,
    start_process,
)

from ppo_jax.errors import CheckpointError, SettingError
from ppo_jax.hashing import digest
from ppo_jax.run import background, faults
from ppo_jax.run.checkpoints import Checkpoints
from ppo_jax.run.compare import compare
from ppo_jax.run.files import read_json, read_lines, write_json

UPDATES = 12


def run_to_digest(run):
    return digest(run.run().train.params)


class FinishedRun(NamedTuple):
    folder: Path
    digest: str


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Return the folder of an uninterrupted run with all its checkpoints, and its digest."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    return FinishedRun(folder, run_to_digest(full_trainer(folder, updates=UPDATES, keep=UPDATES)))


def lines(folder, name):
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


def same_files(a, b):
    return all(lines(a, name) == lines(b, name) for name in ("metrics.jsonl", "samples.jsonl"))


def killed_after(source, folder, step):
    """Copy a run as if it had been killed after checkpoint `step`.

    The copy has half a line in `metrics.jsonl` and an unfinished checkpoint.
    """
    shutil.copytree(source, folder)
    for place in (folder / "checkpoints").iterdir():
        if place.name.isdigit() and int(place.name) > step:
            shutil.rmtree(place)
    (folder / "checkpoints" / f"{step + 1}.orbax-checkpoint-tmp").mkdir()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"update": 3, "objec')
    return folder


@pytest.mark.slow
def test_the_run_uses_everything_that_a_checkpoint_holds(uninterrupted):
    rows = [row for row in lines(uninterrupted.folder, "metrics.jsonl") if "objective/kl" in row]
    assert len({row["objective/kl_coef"] for row in rows}) > UPDATES // 2
    assert any(row["optimizer/stopped"] for row in rows) and any(
        not row["optimizer/stopped"] for row in rows
    )
    assert sum("eval/scores" in row for row in lines(uninterrupted.folder, "metrics.jsonl")) == 5


def test_a_second_run_is_the_same(uninterrupted, tmp_path):
    assert (
        run_to_digest(full_trainer(tmp_path / "run", updates=UPDATES, keep=UPDATES))
        == uninterrupted.digest
    )
    assert compare(uninterrupted.folder, tmp_path / "run") == []
    assert same_files(uninterrupted.folder, tmp_path / "run")


@pytest.mark.parametrize("step", slow_but((1, 6, 11), range(1, UPDATES)))
def test_resume_from_every_checkpoint(uninterrupted, tmp_path, step):
    folder = killed_after(uninterrupted.folder, tmp_path / "run", step)
    run = full_trainer(folder, updates=UPDATES, resume="yes", keep=UPDATES)
    assert int(run.state.update) == step
    assert run_to_digest(run) == uninterrupted.digest
    assert same_files(uninterrupted.folder, folder)


@pytest.fixture(scope="module")
def behind(tmp_path_factory):
    """Return the folder of a run whose policy samples two updates ahead, and its digest."""
    folder = tmp_path_factory.mktemp("behind") / "run"
    run = full_trainer(folder, updates=5, keep=9, staleness=2)
    return FinishedRun(folder, run_to_digest(run))


@pytest.mark.parametrize("step", range(1, 5))
def test_resume_with_pending_rollouts_from_every_checkpoint(behind, tmp_path, step):
    folder = killed_after(behind.folder, tmp_path / "run", step)
    run = full_trainer(folder, updates=5, resume="yes", keep=9, staleness=2)
    assert int(run.state.update) == step
    assert run_to_digest(run) == behind.digest
    assert same_files(behind.folder, folder) and compare(behind.folder, folder) == []


def test_a_finished_run_with_pending_rollouts_can_be_extended(behind, tmp_path):
    full_trainer(tmp_path / "run", updates=2, keep=9, staleness=2).run()
    run = full_trainer(tmp_path / "run", updates=5, resume="auto", keep=9, staleness=2)
    assert run_to_digest(run) == behind.digest


def test_pending_rollouts_are_checked_and_may_be_left_out(behind, tmp_path, caplog):
    folder = killed_after(behind.folder, tmp_path / "run", 3)
    for staleness in (0, 1):
        with pytest.raises(ValueError, match=rf"loop\.staleness was 2 .* and is {staleness} now"):
            full_trainer(folder, updates=5, resume="yes", staleness=staleness)
    plain, one = (full_trainer(tmp_path / str(k), staleness=k).state for k in (0, 1))
    checkpoints = Checkpoints(folder / "checkpoints")
    assert int(checkpoints.restore(plain)[0].update) == 3
    with pytest.raises(CheckpointError, match=r"it has int32\[.*\] for pending/1/tokens, and the"):
        checkpoints.restore(one)
    checkpoints.close()
    files = (p for p in (folder / "checkpoints/3/pending").rglob("*") if p.is_file())
    file = max(files, key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    run = full_trainer(folder, updates=5, resume="auto", keep=9, staleness=2)
    assert int(run.state.update) == 2 and "Checkpoint 3 in" in caplog.text
    assert run_to_digest(run) == behind.digest


def test_a_run_older_than_a_setting_of_the_loop_can_be_resumed(uninterrupted, tmp_path):
    folder = killed_after(uninterrupted.folder, tmp_path / "run", 6)
    config = read_json(folder / "config.json")
    del config["settings"]["loop"]["staleness"]
    write_json(folder / "config.json", config)
    assert int(full_trainer(folder, updates=7, resume="yes").state.update) == 6
    with pytest.raises(ValueError, match=r"loop\.staleness was 0 in the run"):
        full_trainer(folder, updates=7, resume="yes", staleness=1)


def test_a_finished_run_can_be_extended(uninterrupted, tmp_path):
    first = full_trainer(tmp_path / "run", updates=5)
    first.run()
    assert (
        run_to_digest(full_trainer(tmp_path / "run", updates=UPDATES, resume="auto"))
        == uninterrupted.digest
    )


def test_a_fresh_run_does_not_overwrite_checkpoints(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted.folder / "checkpoints", tmp_path / "run/checkpoints")
    with pytest.raises(ValueError, match="holds another run"):
        full_trainer(tmp_path / "run", updates=UPDATES)


def test_auto_starts_a_fresh_run_if_there_is_no_checkpoint(uninterrupted, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text('{"update": 0}\n')
    (tmp_path / "run/config.json").write_text("{")
    assert (
        run_to_digest(full_trainer(tmp_path / "run", updates=UPDATES, resume="auto"))
        == uninterrupted.digest
    )
    assert same_files(uninterrupted.folder, tmp_path / "run")
    with pytest.raises(ValueError, match="no checkpoint"):
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty/config.json").write_bytes((tmp_path / "run/config.json").read_bytes())
        full_trainer(tmp_path / "empty", updates=UPDATES, resume="yes")


def checkpoint_steps(folder):
    return {int(place.name) for place in (folder / "checkpoints").iterdir() if place.name.isdigit()}


def test_the_best_by_evaluation_is_checkpoint_steps(tmp_path):
    """The best checkpoint is kept even if no checkpoint is due at its evaluation."""
    run = full_trainer(tmp_path / "run", updates=9, keep=1, eval_every=2, save_every=9)
    run.run()
    evals = {
        row["update"] + 1: row["eval/scores"]
        for row in lines(tmp_path / "run", "metrics.jsonl")
        if "eval/scores" in row and row["update"] >= 0
    }
    best = max(evals, key=lambda step: (evals[step], -step))
    assert best < 9 and checkpoint_steps(tmp_path / "run") == {best, 9}


def test_the_best_by_evaluation_is_kept_over_interruptions(tmp_path):
    scores = {0: 9.0, 2: 0.0, 4: 2.0, 6: 1.0, 8: 2.0, 9: -1.0}
    runs = []

    def reward(prompts, responses):
        """Score the responses to the held-out prompt as `scores` says."""
        if prompts[0] != "n":
            return likes_b(prompts, responses)
        return [scores[int(runs[-1].state.update)]] * len(responses)

    def trainer(out):
        options = {"updates": 9, "keep": 1, "eval_every": 2, "save_every": 3, "resume": "auto"}
        runs.append(full_trainer(out, reward=reward, held_out=["n"], **options))
        return runs[-1]

    whole = run_to_digest(trainer(tmp_path / "whole"))
    assert checkpoint_steps(tmp_path / "whole") == {4, 9}
    for _ in range(2):
        steps = iter(range(3))
        with pytest.raises(StopIteration):  # ends in the fourth update without saving
            trainer(tmp_path / "run").run(on_update=lambda _, steps=steps: next(steps))
    assert run_to_digest(trainer(tmp_path / "run")) == whole
    assert checkpoint_steps(tmp_path / "run") == {4, 9} and same_files(
        tmp_path / "whole", tmp_path / "run"
    )


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_checkpoint_is_reported_and_skipped(uninterrupted, tmp_path, damage, caplog):
    folder = killed_after(uninterrupted.folder, tmp_path / "run", 6)
    file = max(
        (p for p in (folder / "checkpoints/6/state").rglob("*") if p.is_file()),
        key=lambda p: p.stat().st_size,
    )
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    match damage:
        case "flip":
            file.write_bytes(content)
        case "truncate":
            file.write_bytes(content[: len(content) // 2])
        case "delete":
            file.unlink()
    run = full_trainer(folder, updates=UPDATES, resume="auto", keep=UPDATES)
    assert int(run.state.update) == 5 and "Checkpoint 6 in" in caplog.text
    assert run_to_digest(run) == uninterrupted.digest and same_files(uninterrupted.folder, folder)
    assert (folder / "checkpoints/6.damaged").is_dir()


def test_a_run_with_only_damaged_checkpoints_is_not_restarted(tmp_path):
    full_trainer(tmp_path / "run", updates=2, keep=1).run()
    kept = (tmp_path / "run/metrics.jsonl").read_bytes()
    for file in (tmp_path / "run/checkpoints").rglob("*"):
        if file.is_file() and "state" in file.parts:
            file.write_bytes(b"")
    for message in ("cannot be used", "holds no checkpoint but 2.damaged"):
        with pytest.raises(ValueError, match=message):
            full_trainer(tmp_path / "run", updates=2, resume="auto")
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == kept


@pytest.mark.parametrize(
    "option, value", [("jax_default_prng_impl", "rbg"), ("jax_threefry_partitionable", False)]
)
def test_a_change_of_random_number_generation_is_refused(uninterrupted, tmp_path, option, value):
    folder = killed_after(uninterrupted.folder, tmp_path / "run", 6)
    before = getattr(jax.config, option)
    jax.config.update(option, value)
    try:
        with pytest.raises(
            ValueError, match=f"jax.{option.removeprefix('jax_')} was {before} in the run"
        ):
            full_trainer(folder, updates=UPDATES, resume="yes")
    finally:
        jax.config.update(option, before)
    assert (
        not list((folder / "checkpoints").glob("*.damaged"))
        and run_to_digest(full_trainer(folder, updates=UPDATES, resume="yes", keep=UPDATES))
        == uninterrupted.digest
    )


def test_a_checkpoint_of_other_shapes_is_not_treated_as_damaged(uninterrupted, tmp_path):
    folder = killed_after(uninterrupted.folder, tmp_path / "run", 6)
    run = full_trainer(tmp_path / "other", adapters=False)
    checkpoints = Checkpoints(folder / "checkpoints")
    with pytest.raises(
        CheckpointError,
        match=r"Checkpoint 6 in .* it has float32\[.*\] for train/.*, and the run now",
    ):
        checkpoints.restore(run.state)
    assert checkpoints.steps() == list(range(1, 7)) and not list(
        (folder / "checkpoints").glob("*.damaged")
    )


def test_other_versions_are_warned_about(uninterrupted, tmp_path, caplog):
    folder = killed_after(uninterrupted.folder, tmp_path / "run", 6)
    config = read_json(folder / "config.json")
    config["processes"][-1]["versions"]["jaxlib"] = "0.0.1"
    write_json(folder / "config.json", config)
    full_trainer(folder, updates=UPDATES, resume="yes")
    assert "versions.jaxlib was 0.0.1 when the run in" in caplog.text


def test_a_run_folder_without_hashes_is_refused(uninterrupted, tmp_path):
    folder = killed_after(uninterrupted.folder, tmp_path / "run", 6)
    write_json(folder / "config.json", read_json(folder / "config.json") | {"hashes": {}})
    with pytest.raises(ValueError, match="had the hash None"):
        full_trainer(folder, updates=UPDATES, resume="yes")


def test_fewer_updates_than_already_done_are_refused(uninterrupted, tmp_path):
    folder = killed_after(uninterrupted.folder, tmp_path / "run", 6)
    with pytest.raises(SettingError, match="has made 6 updates; updates=5 is fewer"):
        full_trainer(folder, updates=5, resume="yes")


def test_longer_held_out_prompts_are_refused_by_name(tmp_path):
    full_trainer(tmp_path / "run", updates=1).run()
    with pytest.raises(ValueError, match=r"data\.longest_prompt was 3 in the run"):
        full_trainer(tmp_path / "run", updates=2, resume="yes", held_out=["a b c d e"])


def test_two_processes_do_not_write_to_one_folder(tmp_path):
    full_trainer(tmp_path / "run", updates=1).run()
    holder = (
        "import sys, pathlib\nfrom ppo_jax.run.files import lock_folder\n"
        "held = lock_folder(pathlib.Path(sys.argv[1]))\nprint(1, flush=True)\ninput()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout.readline() == "1\n"
    with pytest.raises(ValueError, match="Another process is writing to"):
        full_trainer(tmp_path / "run", updates=2, resume="auto")
    other.kill()
    other.communicate()
    assert int(full_trainer(tmp_path / "run", updates=2, resume="auto").run().update) == 2


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"ppo": FULL_PPO.__class__(**{**vars(FULL_PPO), "lam": 0.9})},
            "ppo.lam was 0.95 in the run in .* and is 0.9 now",
        ),
        ({"seed": 3}, "loop.seed was 0"),
        ({"adapters": False}, "The model of the run"),
        ({"reward": sorted}, "The reward of the run"),
    ],
)
def test_a_change_that_affects_the_result_is_refused(uninterrupted, tmp_path, changes, message):
    folder = killed_after(uninterrupted.folder, tmp_path / "run", 6)
    with pytest.raises(ValueError, match=message):
        full_trainer(folder, updates=UPDATES, resume="yes", **changes)
    assert len(lines(uninterrupted.folder, "samples.jsonl")) == len(
        (folder / "samples.jsonl").read_text().splitlines()
    )
    free = full_trainer(
        folder, updates=7, resume="yes", samples=0, save_every=0, keep=1, tensorboard=True
    )
    assert int(free.state.update) == 6


def test_updates_cannot_change_if_the_learning_rate_decays_over_them(tmp_path):
    ppo = FULL_PPO.__class__(**{**vars(FULL_PPO), "decay_learning_rate": True})
    full_trainer(tmp_path / "run", ppo=ppo, updates=2).run()
    with pytest.raises(ValueError, match=r"loop\.updates was 2"):
        full_trainer(tmp_path / "run", ppo=ppo, updates=3, resume="auto")


def test_a_checkpoint_larger_than_the_free_space_is_not_started(tmp_path, monkeypatch):
    run = full_trainer(tmp_path / "run", updates=3)
    run.step()
    run.save()
    run.step()
    monkeypatch.setattr(
        "shutil.disk_usage", lambda _: shutil._ntuple_diskusage(2**30, 2**30 - 2**20, 2**20)
    )
    with pytest.raises(
        CheckpointError, match=r"Checkpoint 2 cannot be written to .* the disk has 1\.0 MB left\."
    ):
        run.save()
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["1"]


def test_a_full_disk_does_not_harm_earlier_checkpoints(tmp_path):
    """A limit on file sizes makes writes fail as on a full disk."""
    run = full_trainer(tmp_path / "run", updates=2)
    run.step()
    run.save()
    run.step()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(CheckpointError, match="Checkpoint 2 cannot be written"):
            run.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    run.checkpoints.close()
    assert int(full_trainer(tmp_path / "run", updates=2, resume="yes").state.update) == 1


def test_checkpoints_are_opened_for_reading_without_a_warning(uninterrupted, caplog):
    Checkpoints(uninterrupted.folder / "checkpoints", read_only=True).close()
    assert caplog.messages == []


def test_a_checkpoint_in_the_background_is_not_changed_by_later_updates(uninterrupted, tmp_path):
    """The writing starts only after two more updates, which have donated the saved arrays."""
    run = full_trainer(tmp_path / "run", updates=UPDATES)
    run.step()
    later = threading.Event()
    run.checkpoints._background._thread.submit(later.wait)
    run.save(wait=False)
    run.step()
    run.step()
    assert not (tmp_path / "run/checkpoints/1").exists()
    later.set()
    assert run.checkpoints.steps() == [1]
    like = full_trainer(tmp_path / "like", updates=UPDATES).state
    saved = Checkpoints(uninterrupted.folder / "checkpoints", read_only=True)
    want, got = (c.restore(like, 1)[0] for c in (saved, run.checkpoints))
    assert digest(got.train.params) == digest(want.train.params) != digest(run.state.train.params)
    assert digest(got.train.opt_state) == digest(want.train.opt_state)


def test_an_error_in_the_background_is_raised_later_and_memory_decides(tmp_path, monkeypatch):
    run = full_trainer(tmp_path / "run", updates=3)
    run.step()
    full = shutil._ntuple_diskusage(2**30, 2**30 - 2**20, 2**20)
    monkeypatch.setattr("shutil.disk_usage", lambda _: full)
    run.save(wait=False)
    with pytest.raises(CheckpointError, match="Checkpoint 1 cannot be written to"):
        run.checkpoints.close()
    x = np.zeros(2)
    copied = background.host_copy({"x": x}, free=2 * x.nbytes)["x"]
    assert copied is not x and not np.shares_memory(copied, x)
    assert background.host_copy({"x": x}, free=2 * x.nbytes - 1) is None


# --- signals and kills, in separate processes ---


def start(folder, updates):
    """Start a process that runs `full_trainer` and prints the digest of the final parameters."""
    place = folder.parent
    return start_process(run_full_trainer, folder, updates, log=log_of(folder), folder=place)


def log_of(folder):
    return folder.with_suffix(".log")


def finish(process, folder, status=0):
    """Wait for a process and return the last line that it printed."""
    process.join(300)
    printed = log_of(folder).read_text()
    assert process.exitcode == status, printed
    return printed.splitlines()[-1]


def wait_for(condition, process, seconds=120.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.is_alive():
        if condition():
            return
        time.sleep(0.002)


@pytest.mark.slow
def test_a_signal_ends_a_run_after_its_update(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    for number in (signal.SIGTERM, signal.SIGINT):
        process = start(folder, 500)
        seen = len(list((folder / "checkpoints").glob("[0-9]*"))) and max(
            int(p.name) for p in (folder / "checkpoints").glob("*")
        )
        wait_for(lambda seen=seen: (folder / f"checkpoints/{seen + 2}").exists(), process)
        os.kill(process.pid, number)
        finish(process, folder, faults.STOPPED)
        assert "Stopped by a signal after " in log_of(folder).read_text()
    updates = [row["update"] for row in lines(folder, "metrics.jsonl") if "objective/kl" in row]
    assert updates == list(range(len(updates)))


def test_a_second_signal_ends_it_at_once():
    code = (
        "import os, signal, time\nfrom ppo_jax.run.faults import StopSignals\n"
        "with StopSignals():\n    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('on', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signal.SIGINT and done.stdout == "on\n"


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(tmp_path):
    """Use `kill -9` while the run compiles, samples, learns and writes; half aim at a write.

    No kill waits for more than three new checkpoints, so that the run lasts for eight kills on a
    machine of any speed.
    """
    chance, updates = random.Random(0), 32
    expected = finish(start(tmp_path / "whole", updates), tmp_path / "whole")
    folder, kills = tmp_path / "killed", 0
    while kills < 8:
        process = start(folder, updates)
        aim = kills % 2 == 0
        newest = max(
            (int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdigit()), default=0
        )
        if aim:  # while one of the next two checkpoints is written
            wanted = newest + chance.choice((1, 2))
            wait_for(
                lambda wanted=wanted: list((folder / "checkpoints").glob(f"{wanted}.*tmp*")),
                process,
            )
            time.sleep(chance.uniform(0, 0.03))
        else:
            last = folder / "checkpoints" / str(newest + 3)
            wait_for(last.exists, process, seconds=chance.uniform(1, 8))
        assert process.is_alive(), log_of(folder).read_text()
        process.kill()
        process.join()
        kills += 1
    assert finish(start(folder, updates), folder) == expected
    assert same_files(tmp_path / "whole", folder)
    assert compare(tmp_path / "whole", folder) == []


def test_digests_depend_on_every_bit_but_not_on_sharding():
    x = jax.random.normal(jax.random.key(0), (8, 6, 4))
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spread = jax.device_put(
        x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b"))
    )
    assert digest({"x": x}) == digest({"x": spread}) != digest({"y": x})
    bits = np.asarray(x).view(np.uint32).copy()
    seen = {digest(x), digest(x.reshape(6, 8, 4)), digest(x.swapaxes(0, 1))}
    for at in np.ndindex(2, 3, 2):
        flipped = bits.copy()
        flipped[at] ^= 1
        seen.add(digest(flipped.view(np.float32)))
    assert len(seen) == 15


def test_a_renamed_checkpoint_is_skipped(uninterrupted, tmp_path, caplog):
    killed_after(uninterrupted.folder, tmp_path / "run", 4)
    (tmp_path / "run/checkpoints/3").rename(tmp_path / "aside")
    (tmp_path / "run/checkpoints/4").rename(tmp_path / "run/checkpoints/9")
    (tmp_path / "aside").rename(tmp_path / "run/checkpoints/3")
    run = full_trainer(tmp_path / "run", resume="auto", updates=6)
    assert (
        int(run.state.update) == 3
        and "Checkpoint 9 in" in caplog.text
        and "it holds update 4 under another name" in caplog.text
    )


def test_a_checkpoint_that_orbax_does_not_write_is_an_error(tmp_path, monkeypatch):
    run = full_trainer(tmp_path / "run", updates=1)
    monkeypatch.setattr(ocp.CheckpointManager, "save", lambda self, step, args: False)
    with pytest.raises(CheckpointError, match="Checkpoint 1 cannot be written"):
        run.run()


def test_lines_changed_since_the_checkpoint_are_refused(uninterrupted, tmp_path):
    killed_after(uninterrupted.folder, tmp_path / "run", 3)
    file = tmp_path / "run/metrics.jsonl"
    file.write_bytes(b" " + file.read_bytes())
    before = file.read_bytes()
    with pytest.raises(ValueError, match="is not as it was at the checkpoint, where a line ended"):
        full_trainer(tmp_path / "run", resume="auto", updates=6)
    assert file.read_bytes() == before


def test_a_file_named_checkpoints_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").touch()
    (tmp_path / "run/metrics.jsonl").write_text('{"update": 0}\n')
    with pytest.raises(ValueError, match="checkpoints is a file; the results need a folder"):
        full_trainer(tmp_path / "run", resume="auto")
    assert (tmp_path / "run/metrics.jsonl").exists()


def test_another_number_of_cores_is_warned_about(uninterrupted, tmp_path, caplog):
    folder = killed_after(uninterrupted.folder, tmp_path / "run", 3)
    config = read_json(folder / "config.json")
    cores = config["processes"][-1]["cpu_cores"]
    config["processes"][-1]["cpu_cores"] = 99
    write_json(folder / "config.json", config)
    full_trainer(folder, resume="yes", updates=6)
    assert "cpu_cores was 99" in caplog.text
    assert f"is {cores} now: the last bits may differ" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_loading_ends_the_program_at_once(tmp_path, number):
    """This holds even in a callback of the garbage collector, where an exception would be lost."""
    (tmp_path / "reward.py").write_text(
        "import gc, os\n"
        f"gc.callbacks.append(lambda *_: os.kill(os.getpid(), {int(number)}))\n"
        "gc.collect()\nopen(__file__ + '.read', 'w')\ndef score(prompts, responses): ...\n"
    )
    (tmp_path / "prompts.txt").write_text("a\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"model_type": "gpt2"}')
    given = {"model": tmp_path / "model", "prompts": tmp_path / "prompts.txt"}
    arguments = command_line("evaluate", reward=f"{tmp_path / 'reward.py'}:score", **given)
    done = subprocess.run(
        [sys.executable, "-m", "ppo_jax.cli", *arguments], capture_output=True, text=True
    )
    assert done.returncode == (130 if number == signal.SIGINT else -number), done.stderr
    assert not (tmp_path / "reward.py.read").exists() and "Traceback" not in done.stderr


def is_locked(folder) -> bool:
    """Whether another process could not write to the folder of a run."""
    lock = FileLock(
        folder / ".lock", timeout=0
    )  # Not the lock that the trainers of a process share.
    try:
        lock.acquire()
    except Timeout:
        return True
    lock.release()
    return False


def test_a_later_trainer_of_a_process_takes_over_the_folder(tmp_path):
    """A notebook's cell is run again: the trainer of its first run must not write any more."""
    out = tmp_path / "run"
    first = full_trainer(out, updates=2)
    first.step()
    second = full_trainer(out, updates=2, resume="auto")
    second.step()
    first._run_loop.unevaluated = (
        True  # It owes an evaluation, which `run` makes before anything else.
    )
    before = {file: file.read_bytes() for file in out.glob("*.json*")}
    for write in (first.step, first.save, first.run, first.run):
        with pytest.raises(ValueError, match="A later Trainer of this process"):
            write()
    assert {file: file.read_bytes() for file in out.glob("*.json*")} == before
    assert is_locked(out)
    second.run()
    assert not is_locked(out)
    lines = read_lines(out / "metrics.jsonl")
    assert [line["update"] for line in lines if "loss/total" in line] == [0, 1]


def test_a_trainer_that_cannot_be_opened_takes_over_nothing(tmp_path):
    first = full_trainer(tmp_path / "run", updates=2)
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        full_trainer(tmp_path / "run", updates=2, resume="yes")
    first.run()
    assert not is_locked(tmp_path / "run")
