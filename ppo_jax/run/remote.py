"""Keep the folder of a run in an object store, `gs://` or `s3://`.

A store has no appending, renaming or locks. The run therefore writes to a local folder, as always,
and what it wrote is copied to the store after each checkpoint and at the end. A checkpoint in the
store counts once an object `checkpoints/N.complete`, which is written after all others, names its
files; so a run that is killed while it copies is resumed from the checkpoint before.
"""

import atexit
import contextlib
import json
import logging
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import tensorstore

from ppo_jax.errors import first_line
from ppo_jax.hashing import text_hash
from ppo_jax.run.files import lock_folder
from ppo_jax.stores import split_url, store_url

_LOG = logging.getLogger(__name__)
_WRITER = ".writer"  # names the process that writes to the folder
_COMPLETE = re.compile(r"checkpoints/(\d+)\.complete")
_LOCAL_ONLY = re.compile(r"\.lock|.*\.tmp|checkpoints/.*")


class Mirror:
    """A local folder whose content is kept in an object store.

    Attributes:
      url: the folder in the store.
      folder: the local folder, which is overwritten with what the store holds.

    Example::

        mirror = Mirror("s3://bucket/runs/a")
        trainer = Trainer(learner, prompts, reward, out=mirror.folder, mirror=mirror, loop=loop)
    """

    def __init__(self, url: str, *, read_only: bool = False, only: str | None = None):
        """Claim a folder in a store, and copy what it holds to a local folder.

        Args:
          url: the folder, `gs://BUCKET/PATH` or `s3://BUCKET/PATH`. Credentials come from where the
            tools of the store look for them. AWS_ENDPOINT_URL names another store that speaks S3.
          read_only: whether to change nothing in the store.
          only: the name of the only file to copy, or None to copy all.

        Raises:
          ValueError: if `url` has another form, there are several processes, or the folder cannot
            be reached or written.
        """
        split_url(url)
        if jax.process_count() > 1:
            raise ValueError(
                f"{url} is in an object store, to which one process writes; "
                f"{jax.process_count()} processes need a folder that each of them sees."
            )
        self.url = url
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.folder = cache / "ppo_jax" / "runs" / text_hash(url) / url.rpartition("/")[2]
        if read_only:
            above = Path(tempfile.mkdtemp(prefix="ppo_jax-"))
            atexit.register(shutil.rmtree, above, ignore_errors=True)
            self.folder = above / self.folder.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self.folder)
        self._id = secrets.token_hex(8).encode()
        self._sent: dict[str, tuple[int, int]] = {}
        self._complete: set[str] = set()
        with self._naming_errors():
            self._store = tensorstore.KvStore.open(_spec(url)).result()
            if not read_only:
                self._store.write(_WRITER, self._id).result()
            self._pull(read_only, only)

    def _pull(self, read_only: bool, only: str | None) -> None:
        """Copy the store's content, without unfinished checkpoints, to the emptied local folder."""
        for path in self.folder.iterdir():
            if path.name != ".lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        names = [key.decode() for key in self._store.list().result()]
        names = [name for name in names if only in (None, name)]
        self._complete = {match[1] for name in names if (match := _COMPLETE.fullmatch(name))}
        unfinished = set()
        for name in names:
            part, _, rest = name.partition("/")
            step = rest.partition("/")[0]
            if part == "checkpoints" and "/" in rest and step not in self._complete:
                unfinished.add(step)
            elif name != _WRITER and not _COMPLETE.fullmatch(name):
                path = self.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self._store.read(name).result().value)
                self._sent[name] = _version(path)
        for step in unfinished if not read_only else ():
            self._delete(step)
        for step in self._complete:
            sizes = json.loads(self._store.read(f"checkpoints/{step}.complete").result().value)
            lost = [name for name, size in sizes.items() if _size(self.folder / name) != size]
            if lost:
                _LOG.warning("Checkpoint %s in %s lacks %s.", step, self.url, ", ".join(lost))

    def push(self) -> None:
        """Copy to the store what has changed in the local folder.

        Raises:
          ValueError: if another process has claimed the folder in the store meanwhile, or if the
            store cannot be written to.
        """
        with self._naming_errors():
            if self._store.read(_WRITER).result().value != self._id:
                raise ValueError("another process has started to write there.")
            folder = self.folder / "checkpoints"
            steps = {path.name for path in folder.glob("*") if path.name.isdigit()}
            new = {step: self._files(folder / step) for step in sorted(steps - self._complete)}
            for names in new.values():
                self._send(names)
            self._send([x for x in self._files(self.folder) if not _LOCAL_ONLY.fullmatch(x)])
            for step, names in new.items():
                sizes = {name: _size(self.folder / name) for name in names}
                self._store.write(f"checkpoints/{step}.complete", json.dumps(sizes)).result()
                self._complete.add(step)
            for step in self._complete - steps:
                self._delete(step)
            for name in [name for name in self._sent if not (self.folder / name).exists()]:
                if not name.startswith("checkpoints/"):
                    self._store.write(name, None).result()  # None deletes.
                del self._sent[name]

    def _files(self, folder: Path) -> list[str]:
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return [path.relative_to(self.folder).as_posix() for path in paths]

    def _send(self, names: list[str]) -> None:
        """Copy the files that have changed since they were copied last."""
        for name in names:
            version = _version(self.folder / name)
            if self._sent.get(name) != version:
                self._store.write(name, (self.folder / name).read_bytes()).result()
                self._sent[name] = version

    def _delete(self, step: str) -> None:
        """Delete a checkpoint; first the object that completes it."""
        self._store.write(f"checkpoints/{step}.complete", None).result()
        for key in self._store.list().result():
            if key.startswith(f"checkpoints/{step}/".encode()):
                self._store.write(key, None).result()
        self._complete.discard(step)

    @contextlib.contextmanager
    def _naming_errors(self) -> Iterator[None]:
        """Give the errors of the store a sentence that names the folder."""
        try:
            yield
        except Exception as error:  # TensorStore raises many kinds.
            raise ValueError(f"{self.url} cannot be used: {first_line(error)}") from error

    def close(self) -> None:
        """Release the local folder."""
        self._lock.release()


def local_copy(path: Path, *, only: str | None = None) -> Path:
    """Return a folder itself, or a local copy of it if it is in an object store.

    Args:
      path: the folder.
      only: the name of the only file to copy, or None to copy all.

    Raises:
      ValueError: if the store cannot be read.
    """
    url = store_url(path)
    if url is None:
        return path
    mirror = Mirror(url, read_only=True, only=only)
    mirror.close()
    return mirror.folder


def _version(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def _spec(url: str) -> dict[str, Any]:
    """Return TensorStore's description of a folder in a store."""
    scheme, bucket, path = split_url(url)
    driver = {"gs": "gcs"}.get(scheme, scheme)
    spec: dict[str, Any] = {"driver": driver, "bucket": bucket, "path": f"{path}/"}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if scheme == "s3" and os.environ.get("AWS_ACCESS_KEY_ID"):
        spec["aws_credentials"] = {"type": "environment"}  # No other places are then looked at.
    if scheme == "s3" and endpoint:
        spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    return spec
