"""Execute the notebook for a Kaggle TPU on this machine, with a tiny model and little to train."""

import json
import os
import re

import nbclient
import nbformat
import pytest
from helpers import ROOT, tiny_policy, word_tokenizer

from ppo_jax.models.io import pretrained
from ppo_jax.run.files import read_json, read_lines

QUESTIONS = "".join(f"What is {i} + {i}?,The sum is #### {2 * i}\n" for i in range(8))


def execute(cells, settings, folder):
    """Execute cells in a folder, and return the folder of their run."""
    folder.mkdir()
    environment = os.environ | {
        "KAGGLE_TPU_SETTINGS": json.dumps(settings | {"out": str(folder / "run")})
    }
    client = nbclient.NotebookClient(
        nbformat.v4.new_notebook(cells=cells), resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=environment)
    return folder / "run"


@pytest.mark.slow
def test_the_notebook_trains_and_finds_the_run_of_an_earlier_session(tmp_path):
    policy = tiny_policy(positions=64, layers=1)
    pretrained.save_policy(tmp_path / "gpt2", policy, word_tokenizer())
    (tmp_path / "questions.csv").write_text("question,answer\n" + QUESTIONS)
    settings = {
        "model": str(tmp_path / "gpt2"),
        "chat": False,
        "prompts": str(tmp_path / "questions.csv"),
        "held_out": 0.25,
        "earlier": str(tmp_path / "first"),
        "updates": 1,
        "batch_size": 64,
        "micro_batch": 16,
        "prompt_tokens": 16,
        "max_new_tokens": 4,
        "rank": 2,
        "mesh": "",
    }
    notebook = nbformat.read(ROOT / "experiments/kaggle_tpu.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    first = execute(notebook.cells, settings, tmp_path / "first")
    assert read_json(first / "summary.json")["updates"] == 1
    assert {row["update"] for row in read_lines(first / "metrics.jsonl")} == {-1, 0}
    assert (first.parent / "report.html").is_file()
    # The second session, without the commands of ppo_jax, whose resuming has tests of its own.
    quick = [
        cell for cell in notebook.cells if not re.search("= ppo_jax|assert ppo_jax", cell.source)
    ]
    second = execute(quick, settings, tmp_path / "second")
    assert (second / "checkpoints").is_dir()
    assert read_json(second / "config.json") == read_json(first / "config.json")
    assert len(quick) == len(notebook.cells) - 3
