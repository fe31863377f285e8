"""Test evaluation before and after training, comparisons of scores, and the report of runs."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import html5lib
import numpy as np
import pytest
from helpers import options, tiny_policy, word_tokenizer
from rich.console import Console
from scipy import stats

from ppo_jax import cli
from ppo_jax.commands.stored import stored_command
from ppo_jax.commands.training import read_prompts
from ppo_jax.models.io import pretrained
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.run import advice, curves
from ppo_jax.run.evaluation import distinct_2
from ppo_jax.run.files import append_lines, read_json, read_lines, write_json
from ppo_jax.run.history import History, by_settings, difference, over_seeds, read_history
from ppo_jax.run.report import make_report
from ppo_jax.run.serialize import to_json
from ppo_jax.run.summary import figures_table

UPDATES = 3
HOSTILE = "</td><script>alert(1)</script><img src=https://example.com/a.png> \x00\x1b \ud800 &amp;"


def train(folder, out, **changes):
    given = {
        "model": folder / "model",
        "prompts": folder / "prompts.txt",
        "eval-prompts": folder / "held.txt",
        "reward": f"{folder / 'reward.py'}:score",
        "out": folder / out,
        "loop.updates": UPDATES,
        "loop.eval-every": 2,
        "ppo.batch-size": 16,
        "ppo.max-new-tokens": 5,
        "ppo.learning-rate": 0.02,
        "ppo.missing-eos": "replace",
        "mesh": "data=1",
    } | changes
    given = {name: x for name, x in given.items() if x is not None}
    cli.main(["train", "--loop.no-progress", "--loop.no-tensorboard", *options(given)])
    return folder / out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with three runs, which differ in their seeds."""
    folder = tmp_path_factory.mktemp("runs")
    pretrained.save_policy(folder / "model", tiny_policy(), word_tokenizer())
    (folder / "prompts.txt").write_text("a b\nc\nd e f\ng\n")
    (folder / "held.txt").write_text("a\nb c\nd\ne\n")
    (folder / "reward.py").write_text(
        "def score(prompts, responses):\n"
        "    return [float(r.split().count('b')) for r in responses]\n"
    )
    for seed in range(3):
        train(folder, f"run{seed}", **{"loop.seed": seed})
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    return [folder / f"run{seed}" for seed in range(3)]


def test_a_run_shows_its_policy_before_and_after_and_trains_as_without(folder, runs, capsys):
    again = train(folder, "again")
    out = capsys.readouterr().out
    summary = read_json(again / "summary.json")
    assert re.search(r"^on held-out prompts +before +after$", out, re.MULTILINE)
    assert f"before ({summary['responses'][0]['score_before']:.3g}):" in out
    assert summary == {**read_json(runs[0] / "summary.json"), **times(summary)}
    rows = [row for row in read_lines(again / "metrics.jsonl") if "eval/kl" in row]
    assert [row["update"] for row in rows] == [-1, 1, 2] and rows[0]["eval/kl"] == 0
    for when, row in (("before", rows[0]), ("after", rows[-1])):
        assert summary[when] == {k: x for k, x in row.items() if k != "update"}
    texts = read_lines(again / "evaluations.jsonl")
    assert [row["prompt"] for row in texts] == ["a", "b c", "d", "e"] * 3
    pairs = summary["responses"]
    assert [pair["after"] for pair in pairs] == [row["response"] for row in texts[8:11]]
    scores = [row["score"] for row in texts[:4]]
    assert rows[0]["eval/scores"] == pytest.approx(np.mean(scores))
    assert rows[0]["eval/scores_error"] == pytest.approx(np.std(scores, ddof=1) / 2)
    alone = train(folder, "alone", **{"eval-prompts": None})
    assert read_json(alone / "summary.json")["digest"] == summary["digest"]
    assert "before" not in read_json(alone / "summary.json")


def times(summary):
    return {name: x for name, x in summary.items() if name.startswith(("time/", "perf/"))}


def test_evaluate_takes_models_and_runs_with_the_settings_of_the_run(folder, runs, capsys):
    base, run, out = str(folder / "model"), str(runs[0]), folder / "evaluation"
    given = ["--model", base, "--model", run, "--responses", "3", "--batch-size", "5"]
    cli.main(["evaluate", *given, "--out", str(out)])
    assert "12 responses" in capsys.readouterr().out
    figures = read_json(out / "evaluation.json")
    assert figures["reference"] == base and list(figures["models"]) == [base, run]
    assert figures["models"][base]["eval/kl"] == 0 < figures["models"][run]["eval/kl"]
    rows = [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]
    for model in (base, run):
        own = [row for row in rows if row["model"] == model]
        assert [row["prompt"] for row in own] == ["a", "b c", "d", "e"] * 3
        scores = [row["score"] for row in own]
        assert figures["models"][model]["eval/scores"] == pytest.approx(np.mean(scores))
        # The run's rule for responses without an end token holds for both.
        assert -1 in scores and all(
            s in (-1, row["response"].split().count("b"))
            for s, row in zip(scores, own, strict=True)
        )
    # Each of several rewards has its mean over all responses.
    scores = f"{folder / 'reward.py'}:score"
    both = ["--reward", scores, "--reward", f"{scores}=-1", "--out", str(folder / "two")]
    cli.main(["evaluate", *given, *both])
    assert "reward score#2" in capsys.readouterr().out
    for name, two in read_json(folder / "two/evaluation.json")["models"].items():
        texts = [row["response"] for row in rows if row["model"] == name]
        mean = np.mean([text.split().count("b") for text in texts])
        for part in ("score", "score#2"):
            assert two[f"eval/reward/{part}"] == pytest.approx(mean)
    (folder / "same.txt").write_text("a\na\na\n")
    given = ["--greedy", "--max-new-tokens", "2", "--prompts", str(folder / "same.txt")]
    cli.main(["evaluate", "--model", run, *given, "--out", str(folder / "greedy")])
    lines = (folder / "greedy/responses.jsonl").read_text().splitlines()
    assert len(lines) == 3 and len(set(lines)) == 1
    assert read_json(folder / "greedy/evaluation.json")["models"][run]["eval/length_mean"] <= 2


@pytest.mark.parametrize(
    "given, message",
    [
        (["--model", "model"], "evaluate needs --prompts"),
        (["--model", "model", "--prompts", "held.txt"], "evaluate needs --reward"),
        (["--model", "run0", "--greedy", "--responses", "2"], "use responses=1, not 2"),
        (["--model", "run0", "--out", "run1"], "is not empty"),
        (["--model", "run0", "--model", "run0"], "has --model run0 more than once"),
        (["--model", "runs/nope"], "'runs/nope', which is not a local folder"),
    ],
)
def test_evaluate_refuses_what_it_cannot_do(folder, monkeypatch, capsys, given, message):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit):
        cli.main(["evaluate", *given])
    assert message in " ".join(capsys.readouterr().err.split())


def changed_copy(folder, name, **command):
    """Copy the first run, with other options of its command in its `config.json`."""
    run = shutil.copytree(folder / "run0", folder / name)
    config = read_json(run / "config.json")
    config["settings"]["command"] |= command
    write_json(run / "config.json", config)
    return run


def test_evaluate_takes_columns_and_limits_of_the_run_and_counts_what_it_drops(folder, capsys):
    rows = [{"prompt": "h", "text_": "a"}, {"prompt": "h", "text_": "b c"}]
    (folder / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = read_json(folder / "run0/config.json")["settings"]["command"]["data_options"]
    options |= {"prompt_column": "text_", "long_prompts": "drop", "max_prompt_tokens": 1}
    run = changed_copy(folder, "limited", data_options=options)
    given = ["evaluate", "--model", str(run), "--prompts", str(folder / "held.jsonl")]
    cli.main([*given, "--out", str(folder / "dropped")])
    out = " ".join(capsys.readouterr().out.split())
    assert f"{run}: 1 of 2 prompts of {folder / 'held.jsonl'} are too long and are left out." in out
    assert "1 responses" in out
    lines = (folder / "dropped/responses.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["a"]
    cli.main([*given, "--prompt-column", "prompt", "--max-prompt-tokens", "9"])
    assert "2 responses" in capsys.readouterr().out


def test_evaluate_says_which_prompts_another_run_was_trained_on(folder, capsys):
    split = {"eval_prompts": None, "eval_fraction": 0.5}
    runs = [changed_copy(folder, f"seed{i}", **split, eval_seed=i) for i in (0, 3)]
    held, other = (read_prompts(stored_command(run)) for run in runs)
    count = sum(row in other[0] for row in held[1])
    assert count > 0
    given = [x for run in runs for x in ("--model", str(run))]
    cli.main(["evaluate", *given])
    out = capsys.readouterr().out
    assert f"{runs[1]} was trained on {count} of the 2 held-out prompts of {runs[0]};" in out


def test_numbers_are_shown_without_minus_zero_and_without_nan():
    output = io.StringIO()
    figures = {"KL": [-1e-9, 0.5], "distinct-2": [distinct_2(["a", "b"]), distinct_2(["a b"])]}
    Console(file=output).print(figures_table("figures", ["a", "b"], figures))
    cells = [line.split() for line in output.getvalue().splitlines()]
    assert cells[1:] == [["KL", "0.000", "0.500"], ["distinct-2", "–", "1.000"]]
    assert str(over_seeds([-1e-9])) == "0.000"


def test_compare_gives_intervals_over_seeds_and_differences_of_settings(folder, runs, capsys):
    other = [folder / "other0", folder / "other1"]
    for old, new in zip(runs, other, strict=False):
        shutil.copytree(old, new)
        config = read_json(new / "config.json")
        config["settings"]["ppo"]["clip_low"] = 0.1
        write_json(new / "config.json", config)
    cli.main(["compare", *map(str, [*runs, *other])])
    out = capsys.readouterr().out
    scores = [read_json(run / "summary.json")["eval/scores"] for run in runs]
    t = 4.302652729911275  # of Student's distribution with 2 degrees of freedom
    half = t * np.std(scores, ddof=1) / 3**0.5
    mean = np.mean(scores)
    assert f"{mean:.3f} [{mean - half:.3f}, {mean + half:.3f}]" in out
    assert "B minus A: " in out and "ppo.clip_low is 0.2 and 0.1" in out
    with pytest.raises(SystemExit):
        cli.main(["compare", str(runs[0])])
    assert "two runs or more" in capsys.readouterr().err


@pytest.mark.slow
def test_seeds_hold_out_the_same_prompts_and_an_older_run_keeps_its_own(folder, capsys):
    """Runs with three seeds form a group; the seed of an older run also chose its prompts."""
    (folder / "numbered.jsonl").write_text(
        "".join(f'{{"prompt": "{"abcdefgh"[i]}", "number": {i}}}\n' for i in range(8))
    )
    given = {
        "prompts": folder / "numbered.jsonl",
        "eval-prompts": None,
        "eval-fraction": 0.5,
        "loop.updates": 1,
    }
    runs = [train(folder, f"split{i}", **given, **{"loop.seed": i}) for i in range(3)]
    cli.main(["compare", *map(str, runs)])
    assert "B minus A" not in capsys.readouterr().out
    assert len(by_settings([read_history(run) for run in runs])) == 1
    assert 'class="band c0"' in make_report(runs)
    own = {**given, "loop.seed": 1, "eval-seed": 1}
    old = train(folder, "old", **own)
    held_out = {row["prompt"] for row in read_lines(old / "evaluations.jsonl")}
    assert held_out != {row["prompt"] for row in read_lines(runs[0] / "evaluations.jsonl")}
    config = read_json(old / "config.json")
    del config["settings"]["command"]["eval_seed"], own["eval-seed"]
    write_json(old / "config.json", config)
    train(folder, "old", **own | {"resume": "yes", "loop.updates": 2})
    fork = {"resume": "fork", "fork-from": old, "loop.seed": 2, "loop.updates": 3}
    fork = train(folder, "fork", **own | fork)
    texts = read_lines(fork / "evaluations.jsonl")
    assert {row["prompt"] for row in texts} == held_out
    assert [row["update"] for row in texts] == [1] * 4 + [2] * 4
    summary = read_json(fork / "summary.json")
    before, after = ({"update": u, **summary[when]} for u, when in ((1, "before"), (2, "after")))
    rows = read_lines(fork / "metrics.jsonl")
    assert (rows[0], rows[-1]) == (before, after) and len(summary["responses"]) == 3
    again = cli.parse(["train", "--config", str(old), "--seed", "5", "--out", "x"])
    assert again.eval_seed == 1
    with pytest.raises(SystemExit):
        train(folder, "old", **own | {"resume": "yes", "eval-seed": 3})
    assert "eval_seed was 1 in the run" in capsys.readouterr().err


def test_intervals_of_differences_are_those_of_welch():
    a, b = np.array([1.0, 2.0, 4.0]), np.array([5.0, 9.0])
    parts = [x.var(ddof=1) / len(x) for x in (a, b)]
    freedom = sum(parts) ** 2 / sum(v**2 / (len(x) - 1) for v, x in zip(parts, (a, b), strict=True))
    half = stats.t.ppf(0.975, freedom) * sum(parts) ** 0.5
    np.testing.assert_allclose(difference(a, b), b.mean() - a.mean() + np.array([0, -half, half]))
    assert over_seeds([2.0, 2.0]) == (2.0, 2.0, 2.0) and np.isnan(over_seeds([2.0]).low)


@pytest.fixture(scope="module")
def page(folder, runs):
    """The report of three runs, one of which has hostile texts and a fault."""
    hostile = folder / "run2 <b>"
    shutil.copytree(runs[2], hostile)
    row = {"update": 1, "prompt": HOSTILE, "response": HOSTILE, "score": 7.5}
    append_lines(hostile / "samples.jsonl", [row])
    append_lines(hostile / "faults.jsonl", [{**row, "kind": "reward", "message": HOSTILE}] * 2)
    path = folder / "page.html"
    cli.main(["report", *map(str, [runs[0], runs[1], hostile]), "--out", str(path)])
    return path


def test_the_report_is_valid_html_that_loads_nothing(page):
    text = page.read_text(encoding="utf-8")
    assert len(text.encode()) < 2_000_000
    parser = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False)
    tree = parser.parse(text)
    tags = {
        element.tag.rpartition("}")[2] for element in tree.iter() if isinstance(element.tag, str)
    }
    assert not tags & {"img", "link", "iframe", "object", "embed", "base", "image", "use"}
    assert len(list(tree.iter("script"))) == 1
    names = {name for element in tree.iter() for name in element.attrib}
    assert not {n for n in names if n in ("src", "href", "style") or str(n).startswith("on")}
    content = "\n".join(tree.itertext())
    assert "</td><script>alert(1)</script>" in content and "run2 <b>" in content
    assert "url(" not in text and "@import" not in text
    polygons = [e for e in tree.iter() if str(e.tag).endswith("polygon")]
    assert len(polygons) > 10  # bands over the seeds


def find_chromium() -> str | None:
    """Return the path of a Chromium, or None for the one that playwright installs."""
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        install = [sys.executable, "-m", "playwright", "install", "--only-shell", "chromium"]
        try:
            subprocess.run(install, check=True, timeout=300)
        except (subprocess.SubprocessError, OSError) as error:
            pytest.skip(f"There is no browser, and none can be downloaded: {error}")
    return found


def test_the_report_opens_in_chromium(page, runs):
    from playwright.sync_api import sync_playwright

    problems, requests = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_chromium(),
            args=["--no-sandbox", "--disable-background-networking"],
        )
        tab = browser.new_page()
        tab.set_default_timeout(300_000)
        tab.on("console", lambda message: problems.append(message.text))
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("dialog", lambda dialog: problems.append(dialog.message))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(page.as_uri())
        shown = lambda: tab.locator("#samples tbody tr:visible").count()
        every = shown()
        assert every == len(tab.query_selector_all("#samples tbody tr")) > 30
        assert tab.locator("svg").first.bounding_box()["width"] > 200
        colour = "e => getComputedStyle(e).stroke"  # The style sheet is allowed by its hash.
        assert tab.locator("polyline").first.evaluate(colour) == "rgb(37, 99, 201)"
        tab.fill("#text", "ALERT(1)")
        assert shown() == 1 and tab.inner_text("#count") == f"1 of {every} samples"
        tab.fill("#text", "")
        tab.select_option("#run", str(runs[0]))
        tab.select_option("#kind", "held-out")
        tab.fill("#last", "-1")
        assert shown() == 4
        browser.close()
    assert problems == [] and requests == [page.as_uri()]


def history(seed=0, **metrics):
    """Return a run with the given metrics, one value for each update."""
    config = {"settings": {"ppo": to_json(PPOConfig()), "loop": {"seed": seed}}, "hashes": {}}
    count = len(next(iter(metrics.values())))
    rows = [{n.replace("__", "/"): x[i] for n, x in metrics.items()} for i in range(count)]
    return History(Path("run"), config, [{"update": i, **row} for i, row in enumerate(rows)])


HEALTHY = {
    "objective__scores": np.linspace(0, 1, 20).tolist(),
    "objective__kl": [3.0] * 20,
    "objective__kl_per_token": [0.1] * 20,
    "objective__entropy": np.linspace(3, 2, 20).tolist(),
    "response__ended": [0.9] * 20,
    "value__explained_variance": [0.5] * 20,
    "value__mean": np.linspace(0, 1, 20).tolist(),
}


@pytest.mark.parametrize(
    "changes, title",
    [
        ({}, None),
        ({"objective__kl_per_token": np.linspace(0, 0.9, 20).tolist()}, "KL runs away"),
        ({"objective__entropy": np.linspace(3, 0.3, 20).tolist()}, "Entropy collapses"),
        ({"response__ended": np.linspace(1, 0.2, 20).tolist()}, "Responses hit the limit"),
        ({"response__ended": [0.0] * 20}, "Nothing ever ends"),
        ({"value__explained_variance": [0.01] * 20}, "The critic explains nothing"),
        ({"value__explained_variance": [0.0] * 20, "value__mean": [0.0] * 20}, None),  # no critic
        ({"objective__scores": [0.5] * 20}, "The score does not rise"),
        ({"faults__skipped": [1.0] * 20}, "Updates were skipped"),
        ({"eval__distinct_2": [0.9] * 19 + [0.3]}, None),  # not evaluated before the first update
    ],
)
def test_advice(changes, title):
    found = advice.find_problems(history(**{**HEALTHY, **changes}))
    assert [problem.title for problem in found] == ([] if title is None else [title])


def test_a_chart_shows_mean_and_range_over_the_seeds():
    a, b = np.random.default_rng(0).normal(size=(2, 1000))
    pair = [history(0, objective__scores=a.tolist()), history(1, objective__scores=b.tolist())]
    chart = curves.make_chart("objective/scores", "score", [pair])
    (curve,) = chart.curves
    points = lambda text: np.array([p.split(",") for p in text.split()], float)
    line, band = points(curve.line), points(curve.band)
    means = np.array([[part.mean() for part in np.array_split(x, 120)] for x in (a, b)])
    unit = (
        np.diff([tick.at for tick in chart.y_ticks])[0]
        / np.diff([float(tick.label) for tick in chart.y_ticks])[0]
    )
    to_value = lambda y: float(chart.y_ticks[0].label) + (y - chart.y_ticks[0].at) / unit
    np.testing.assert_allclose(to_value(line[:, 1]), means.mean(axis=0), atol=2e-3)
    np.testing.assert_allclose(to_value(band[:120, 1]), means.min(axis=0), atol=2e-3)
    np.testing.assert_allclose(to_value(band[120:, 1][::-1]), means.max(axis=0), atol=2e-3)
    assert curves.make_chart("no/such", "none", [pair]) is None


def test_a_report_of_a_long_run_with_long_texts_is_small(folder, runs):
    long = folder / "long"
    shutil.copytree(runs[0], long)
    row = {"prompt": "<&>" * 2000, "response": "é<" * 2000, "score": None}
    append_lines(long / "samples.jsonl", [{"update": 3 + i, **row} for i in range(3000)])
    metrics = read_lines(long / "metrics.jsonl")[1]
    append_lines(long / "metrics.jsonl", [metrics | {"update": 3 + i} for i in range(3000)])
    assert len(make_report([long]).encode()) < 2_000_000
    assert [len(group) for group in by_settings([read_history(x) for x in (long, *runs)])] == [4]
