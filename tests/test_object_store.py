"""Run folders in object stores: servers of S3 and of Google Cloud Storage on this machine."""

import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import tensorstore
from helpers import full_trainer

from ppo_jax import cli
from ppo_jax.hashing import digest
from ppo_jax.run import remote
from ppo_jax.run.compare import compare
from ppo_jax.run.remote import Mirror, local_copy

TESTS = Path(__file__).parent


class Server(NamedTuple):
    """How a server of an object store on this machine is started and found."""

    command: list[str]
    announced: str  # what it prints before its address
    environment: Callable[[str], dict[str, str]]  # from its address
    bucket: Callable[[str, str], urllib.request.Request]  # makes a bucket at an address, by name


SERVERS = {
    "s3": Server(
        ["moto.server", "-H", "127.0.0.1", "-p", "0"],
        " * Running on ",
        lambda address: {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
        },
        lambda address, name: urllib.request.Request(f"{address}/{name}", method="PUT"),
    ),
    "gs": Server(
        ["gcp_storage_emulator", "start", "--in-memory", "--port", "{port}"],
        "Starting server at ",
        lambda address: {"TENSORSTORE_GCS_HTTP_URL": address},
        lambda address, name: urllib.request.Request(
            f"{address}/storage/v1/b?project=p",
            data=json.dumps({"name": name}).encode(),
            headers={"Content-Type": "application/json"},
        ),
    ),
}


class Store(NamedTuple):
    """A running server."""

    scheme: str
    address: str

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which its clients find it."""
        return SERVERS[self.scheme].environment(self.address)

    def url(self, bucket: str) -> str:
        """Make a bucket, and return the address of a run's folder in it."""
        urllib.request.urlopen(SERVERS[self.scheme].bucket(self.address, bucket)).close()
        return f"{self.scheme}://{bucket}/runs/a"


@pytest.fixture(scope="module", params=SERVERS)
def store(tmp_path_factory, request):
    """Start a server of S3 or of Google Cloud Storage."""
    server, log = SERVERS[request.param], tmp_path_factory.mktemp("store") / "log.txt"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [part.replace("{port}", port) for part in server.command]
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-m", *command], stdout=file, stderr=file)
    while server.announced not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    address = log.read_text().partition(server.announced)[2].split()[0]
    yield Store(request.param, address if "//" in address else f"http://{address}")
    process.kill()
    process.wait()


@pytest.fixture
def here(store, monkeypatch, tmp_path):
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def start(url, store, cache):
    """Start a process that runs `full_trainer` in the store and prints the final digest."""
    program = (
        "import sys\nfrom helpers import full_trainer\nfrom ppo_jax.hashing import digest\n"
        "from ppo_jax.run.remote import Mirror\nmirror = Mirror(sys.argv[1])\n"
        "run = full_trainer(mirror.folder, updates=16, resume='auto', mirror=mirror)\n"
        "print(digest(run.run().train.params), flush=True)"
    )
    path = {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "XDG_CACHE_HOME": str(cache)}
    path["JAX_COMPILATION_CACHE_DIR"] = str(cache.parent / "compiled")  # saves time only
    path["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    return subprocess.Popen(
        [sys.executable, "-c", program, url],
        env=os.environ | store.environment | path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def names(url):
    store = tensorstore.KvStore.open(remote._spec(url)).result()
    return {key.decode() for key in store.list().result()}


def complete(url):
    return {name for name in names(url) if name.endswith(".complete")}


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(here, store, tmp_path):
    """Each process starts with an empty cache, as on another machine."""
    expected = digest(full_trainer(tmp_path / "whole", updates=16).run().train.params)
    chance, url = random.Random(0), store.url("killed")
    for number in range(2):
        before, end = complete(url), time.monotonic() + 120
        process = start(url, store, tmp_path / f"cache-{number}")
        while process.poll() is None and complete(url) <= before and time.monotonic() < end:
            time.sleep(0.05)  # until a checkpoint is in the store, so that each process gets on
        time.sleep(chance.uniform(0, 0.3))
        assert process.poll() is None, process.communicate()
        process.kill()
        process.communicate()
    last = start(url, store, tmp_path / "cache")
    out, err = last.communicate(timeout=300)
    assert last.returncode == 0, err
    assert out.strip() == expected
    found = compare(tmp_path / "whole", local_copy(Path(url)))
    # Earlier tests of this process may have set the precision of products, as a command does.
    assert [x for x in found if not x.startswith("jax.default_matmul_precision")] == []


def test_a_run_is_resumed_from_what_is_complete(here, store, tmp_path):
    url = store.url("resumed")
    expected = digest(full_trainer(tmp_path / "whole", updates=6).run().train.params)
    mirror = Mirror(url)
    with pytest.raises(StopIteration):  # in the fifth update; each of the others has a checkpoint
        steps = iter(range(4))
        full_trainer(mirror.folder, updates=6, mirror=mirror).run(lambda _: next(steps))
    mirror.close()
    assert {"config.json", "metrics.jsonl", "checkpoints/4.complete"} <= names(url)
    assert not any(name.startswith("checkpoints/1") for name in names(url))  # two are kept
    mirror._store.write("checkpoints/4.complete", None).result()  # as if killed before it
    again = Mirror(url)
    assert not any(name.startswith("checkpoints/4") for name in names(url))
    run = full_trainer(again.folder, updates=6, resume="yes", mirror=again)
    assert int(run.state.update) == 3 and digest(run.run().train.params) == expected
    found = compare(tmp_path / "whole", local_copy(Path(url)))
    # Earlier tests of this process may have set the precision of products, as a command does.
    assert [x for x in found if not x.startswith("jax.default_matmul_precision")] == []
    again.close()
    cli.main(["report", url, "--out", str(tmp_path / "report.html")])
    assert "/a</" in (tmp_path / "report.html").read_text()  # the name of the run


def test_a_later_process_takes_over_a_folder(here, store, tmp_path, monkeypatch):
    url = store.url("taken")
    first = Mirror(url)
    run = full_trainer(first.folder, updates=2, mirror=first)
    run.step()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    Mirror(url).close()
    with pytest.raises(ValueError, match=f"{url} cannot be used: another process has"):
        run.save()


def test_what_cannot_be_in_a_store_is_refused_in_one_sentence(
    here, store, tmp_path, capsys, monkeypatch
):
    scheme = store.scheme
    data, text = tmp_path / "rows.jsonl", tmp_path / "prompts.txt"
    text.write_text("a\n")
    train = ["train", "--model", "none", "--prompts", text, "--reward", "none"]
    cases = {
        f"{scheme}://nothing/runs/a cannot be used": [
            *train,
            "--out",
            f"{scheme}://nothing/runs/a",
        ],
        f"bucket must be {scheme}://BUCKET/PATH": [*train, "--out", f"{scheme}://bucket"],
        "where only the folder of ppo-jax train can be": [
            *("sft", "--model", "none", "--data", data, "--out", f"{scheme}://bucket/model"),
        ],
        "models are read from local folders": ["info", f"{scheme}://bucket/model"],
        "choose a local place": ["plan", "--model", "x", "--out", f"{scheme}://bucket/x.json"],
        "rows are read from local files": [
            *train,
            "--out",
            "a",
            "--prompts",
            f"{scheme}://b/p.csv",
        ],
        "rewards are read from local": [*train, "--out", "a", "--reward", f"{scheme}://b/r.py:f"],
        f"config={scheme}://b/c.yaml is in an": [*train, "--config", f"{scheme}://b/c.yaml"],
    }
    for message, arguments in cases.items():
        with pytest.raises(SystemExit):
            cli.main([str(x) for x in arguments])
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(ValueError, match="to which one process writes; 2 processes need a folder"):
        Mirror(f"{scheme}://bucket/runs/a")
