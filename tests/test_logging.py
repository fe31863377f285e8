"""Test the files that a run writes, and what happens if the disk is full."""

import math
import resource
import signal
import struct

import pytest
from helpers import tiny_policy
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from ppo_jax.models.io import pretrained
from ppo_jax.run.files import LINES, lock_folder, read_lines
from ppo_jax.run.logging import RunLog


@pytest.fixture
def small_disk():
    """Return a function that limits the size of files, so that writes fail as on a full disk."""
    limits, before = (
        resource.getrlimit(resource.RLIMIT_FSIZE),
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
    )
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)


def test_tensorboard_events_stop_with_a_warning_if_the_disk_is_full(tmp_path, small_disk, caplog):
    log = RunLog(tmp_path)
    small_disk(3000)
    for update in range(100):  # an event takes more bytes than its line in metrics.jsonl
        log.metrics(update, {"a": 1.0})
    log.close()
    assert (
        caplog.text.count("TensorBoard's events end here") == 1
        and len(read_lines(tmp_path / "metrics.jsonl")) == 100
    )


def test_a_line_that_does_not_fit_on_the_disk_is_removed(tmp_path, small_disk):
    log = RunLog(tmp_path, tensorboard=False)
    log.metrics(0, {"a": 1.0})
    small_disk(100)
    with pytest.raises(ValueError, match=r"samples.jsonl cannot be written: File too large"):
        log.samples(0, [{"text": "long " * 30}])
    assert log.sizes() == dict.fromkeys(LINES, 0) | {"metrics.jsonl": 24}


def test_a_model_that_does_not_fit_on_the_disk_is_one_sentence(tmp_path, small_disk):
    model = tiny_policy(layers=1)
    small_disk(4000)
    with pytest.raises(ValueError, match=r"model cannot be written: .*File too large"):
        pretrained.save_policy(tmp_path / "model", model)


def events(folder):
    """Yield the events of the only file; a record is a length, a checksum, an event, a checksum."""
    [file] = folder.iterdir()
    content, at = file.read_bytes(), 0
    while at < len(content):
        [size] = struct.unpack_from("Q", content, at)
        yield Event.FromString(content[at + 12 : at + 12 + size])
        at += size + 16


def test_tensorboard_receives_every_number(tmp_path):
    log = RunLog(tmp_path, first_update=3)
    log.metrics(3, {"a/b": 0.5, "c": math.nan})
    log.metrics(4, {"a/b": 0.25})
    log.close()
    log.close()
    found = list(events(tmp_path / "tensorboard"))
    values = [
        (event.step, value.tag, value.simple_value)
        for event in found
        for value in event.summary.value
    ]
    assert (
        values[0] == (3, "a/b", 0.5)
        and values[2] == (4, "a/b", 0.25)
        and math.isnan(values[1][2])
        and len(values) == 3
    )
    starts = [event for event in found if event.session_log.status == event.session_log.START]
    assert [event.step for event in starts] == [
        3
    ]  # TensorBoard discards older events from update 3 on


def test_tensorboard_receives_texts_and_settings(tmp_path):
    log = RunLog(tmp_path, settings={"ppo": {"lam": 0.5, "top_k": None}, "command": None})
    log.evaluation(-1, [{"prompt": "a", "response": " b\n# c", "score": 0.25}])
    log.samples(0, [{"prompt": "d", "response": " e", "score": None}])
    log.close()
    found = list(events(tmp_path / "tensorboard"))
    values = {value.tag: (event.step, value) for event in found for value in event.summary.value}
    step, before = values["evaluations/text_summary"]
    # Markdown shows indented lines as they are.
    assert step == -1 and before.tensor.string_val == [b"Score 0.25:\n\n    a| b\n    # c\n"]
    assert values["samples/text_summary"][0] == 0
    start = values["_hparams_/session_start_info"][1].metadata.plugin_data
    settings = HParamsPluginData.FromString(start.content).session_start_info.hparams
    assert {name: x.number_value for name, x in settings.items()} == {"ppo.lam": 0.5}


def test_numbers_that_are_not_finite_are_written_as_null(tmp_path):
    log = RunLog(tmp_path, tensorboard=False)
    log.metrics(0, {"a": math.nan, "b": math.inf, "c": 1.0})
    assert read_lines(tmp_path / "metrics.jsonl") == [{"update": 0, "a": None, "b": None, "c": 1.0}]


def test_a_folder_that_cannot_be_locked_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    held = lock_folder(tmp_path)
    assert not held.is_locked and "cannot be locked" in caplog.text
