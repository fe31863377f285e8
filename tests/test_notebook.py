"""Execute the notebook for a Kaggle TPU on this machine, with a tiny model and little to train."""

import json

import nbclient
import nbformat
import pytest
from helpers import ROOT, save_tiny_gpt2

from ppo_jax.run.files import read_json, read_lines

QUESTIONS = "".join(f"What is {i} + {i}?,The sum is #### {2 * i}\n" for i in range(8))


@pytest.mark.slow
def test_the_notebook_trains_and_continues_an_earlier_session(tmp_path, monkeypatch):
    """The second session finds the run of the first one among its inputs."""
    save_tiny_gpt2(tmp_path)
    (tmp_path / "questions.csv").write_text("question,answer\n" + QUESTIONS)
    settings = {
        "model": str(tmp_path / "gpt2"),
        "chat": False,
        "prompts": str(tmp_path / "questions.csv"),
        "held_out": 0.25,
        "earlier": str(tmp_path / "inputs"),
        "batch_size": 64,
        "micro_batch": 16,
        "prompt_tokens": 16,
        "max_new_tokens": 4,
        "rank": 2,
        "mesh": "",
    }
    notebook = nbformat.read(ROOT / "experiments/kaggle_tpu.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    for session, updates in (("first", 1), ("second", 2)):
        folder = tmp_path / session
        run = folder / "run"
        folder.mkdir()
        here = {"out": str(run), "updates": updates}
        monkeypatch.setenv("KAGGLE_TPU_SETTINGS", json.dumps(settings | here))
        again = ('ppo_jax("plan"', 'ppo_jax("report"') if session == "second" else ()
        cells = [cell for cell in notebook.cells if not any(x in cell.source for x in again)]
        book = nbformat.v4.new_notebook(cells=cells)
        nbclient.execute(book, cwd=folder, timeout=600)
        assert read_json(run / "summary.json")["updates"] == updates
        assert {row["update"] for row in read_lines(run / "metrics.jsonl")} == {-1, *range(updates)}
        printed = "".join(x.get("text", "") for cell in cells for x in cell.get("outputs", ()))
        assert ("Continues" in printed) == (session == "second")
        (tmp_path / "inputs").mkdir(exist_ok=True)
        run.rename(tmp_path / "inputs/run")
    assert (tmp_path / "first/report.html").is_file()
