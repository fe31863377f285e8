"""Test the steps and the runs of SFT and of reward models: parts, resume, the best model, files."""

import contextlib
import io
import json
import re
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from helpers import command_line, init_params, init_scorer, slow_but, tiny_config
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_jax import cli
from ppo_jax.data import pack_examples
from ppo_jax.hashing import digest
from ppo_jax.models import heads
from ppo_jax.models.transformer import language_model
from ppo_jax.ppo import reward_model, sft
from ppo_jax.ppo.batch_parts import epoch_rows, make_step, split_batch
from ppo_jax.ppo.supervised import evaluate_loss, fit, start_training, supervised_optimizer
from ppo_jax.run import trainer
from ppo_jax.run.assembly import load_model
from ppo_jax.run.compare import compare
from ppo_jax.run.files import read_json, read_lines
from ppo_jax.run.history import read_history
from ppo_jax.run.logging import BAR_FORMAT, progress_text
from ppo_jax.run.report import make_report
from ppo_jax.run.settings import LoopConfig
from ppo_jax.run.supervised import SupervisedTrainer, Task, row_lengths, supervised_config

CONFIG = tiny_config(positions=64, layers=1)


def padded_rows(seed, lengths, width=64):
    """Return tokens, their mask, and the mask of the tokens after the first three."""
    tokens = np.random.default_rng(seed).integers(1, 20, (len(lengths), width), np.int32)
    mask = np.arange(width) < np.array(lengths)[:, None]
    return np.where(mask, tokens, 0), mask, mask & (np.arange(width) > 2)


def sft_case():
    loss_fn, params = partial(sft.sft_loss, language_model(CONFIG)), init_params
    arrays = padded_rows(0, [60, 5, 9, 17, 30, 12, 22, 7])
    return loss_fn, params(CONFIG, jax.random.key(0)), arrays, sft.count_learned_tokens


def pairs_case():
    loss_fn = reward_model.training_loss(heads.reward_model(CONFIG), "pairs")
    lengths = [[60, 5, 9, 17, 30, 12, 22, 7], [6, 50, 8, 20, 3, 15, 25, 9]]
    chosen, rejected = (padded_rows(seed, x)[:2] for seed, x in enumerate(lengths))
    return loss_fn, init_scorer(CONFIG, jax.random.key(0)), (*chosen, *rejected), None


@pytest.mark.slow
@pytest.mark.parametrize("case", [sft_case, pairs_case])
def test_a_step_on_the_parts_of_a_batch_is_that_of_the_whole_batch(case):
    loss_fn, params, arrays, weight = case()
    (loss, accuracy), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, *arrays)
    parts = list(split_batch(arrays, np.arange(8), row_lengths(arrays)))
    assert sum(part[0].size for part in parts) < 0.7 * arrays[0].size
    state, metrics = make_step(loss_fn, weight=weight)(
        start_training(params, optax.sgd(1.0)), parts
    )
    largest = max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(grads))
    jax.tree.map(
        lambda new, old, grad: np.testing.assert_allclose(old - new, grad, atol=1e-5 * largest),
        state.params,
        params,
        grads,
    )
    assert metrics["train/loss"] == pytest.approx(float(loss), rel=1e-5)
    assert metrics["train/accuracy"] == pytest.approx(float(accuracy))
    found = evaluate_loss(
        loss_fn, params, arrays, batch_size=8, lengths=row_lengths(arrays), weight=weight
    )
    assert found == pytest.approx((float(loss), float(accuracy)), rel=1e-5)


def squared_error(params, tokens, mask, targets):
    """A loss that is fast to compile."""
    off = jnp.sum(params["w"][tokens] * mask, axis=1) - targets
    return jnp.mean(off**2), jnp.mean(jnp.abs(off) < 0.5)


def regression_rows(seed, targets):
    lengths = np.random.default_rng(seed).integers(1, 40, len(targets))
    return *padded_rows(seed, lengths, 40)[:2], np.asarray(targets, np.float32)


def test_few_programs_are_compiled_for_all_lengths(caplog):
    arrays = regression_rows(0, np.ones(64))
    step, state = make_step(squared_error), start_training({"w": jnp.zeros(20)}, optax.sgd(0.01))
    lengths = row_lengths(arrays)
    with jax.log_compiles():
        for rows in np.concatenate([epoch_rows(64, batch_size=8, seed=0, epoch=e) for e in (0, 1)]):
            state, _ = step(state, list(split_batch(arrays, rows, lengths)))
    assert 2 <= caplog.text.count("Compiling jit(add)") <= 8


def test_fit_takes_the_steps_of_all_epochs():
    arrays = regression_rows(0, np.ones(20))
    options = {"learning_rate": 0.05, "weight_decay": 0.1, "warmup": 0.2}
    losses, params = [], {"w": jnp.zeros(20)}
    ours = fit(
        squared_error,
        params,
        arrays,
        seed=3,
        epochs=2,
        batch_size=8,
        on_epoch=lambda _, loss, __: losses.append(loss),
        **options,
    )
    step, tx = make_step(squared_error), supervised_optimizer(4, **options)[0]
    state, expected = start_training(params, tx), []
    for epoch in (0, 1):
        for rows in epoch_rows(20, batch_size=8, seed=3, epoch=epoch):
            state, metrics = step(state, [tuple(x[rows] for x in arrays)])
            expected.append(float(metrics["train/loss"]))
    np.testing.assert_allclose(ours["w"], state.params["w"], atol=1e-6)
    np.testing.assert_allclose(losses, np.reshape(expected, (2, 2)).mean(axis=1), rtol=1e-5)


def test_packed_rows_give_the_loss_and_the_gradient_of_padded_ones():
    loss_fn, params, (tokens, mask, _), _ = sft_case()
    learn = mask & (tokens > 3)  # The first token of a row as well, which nothing predicts.
    assert learn[:, 0].any()
    packed, segments, (packed_tokens, packed_learn) = pack_examples(mask, tokens, learn, length=64)
    assert packed.shape == (3, 64)
    gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (loss, accuracy), grads = gradient(params, packed_tokens, packed, packed_learn, segments)
    (expected, hits), padded = gradient(params, tokens, mask, learn)
    assert sft.count_learned_tokens(
        packed_tokens, packed, packed_learn, segments
    ) == sft.count_learned_tokens(tokens, mask, learn)
    assert (float(loss), float(accuracy)) == pytest.approx((float(expected), float(hits)), rel=1e-5)
    largest = max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(padded))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5 * largest), grads, padded)


EPOCHS, STEPS = 4, 20


def regression(out, resume="no", learning_rate=0.05, select_by="loss", progress=False):
    """Return a run that learns what is wrong for its held-out rows."""
    task = Task(
        loss_fn=squared_error,
        train=regression_rows(0, np.ones(23)),
        held_out=regression_rows(1, np.full(8, -0.1)),
        epochs=EPOCHS,
        batch_size=4,
        learning_rate=learning_rate,
        weight_decay=0.0,
        select_by=select_by,
    )
    loop = LoopConfig(
        updates=STEPS, eval_every=5, save_every=1, keep=99, tensorboard=False, progress=progress
    )
    params = {"w": jnp.zeros(20)}
    config = supervised_config(
        loop=loop,
        training={"learning_rate": learning_rate},
        command=None,
        params=params,
        model=None,
        tokenizer=None,
        rows=[],
    )
    return SupervisedTrainer(task, params, out=out, loop=loop, config=config, resume=resume)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of a finished run, the digest of its result and the steps before it."""
    folder = tmp_path_factory.mktemp("supervised") / "run"
    params, kept = regression(folder).run()
    return folder, digest(params), kept


@pytest.mark.parametrize("step", slow_but((3, 5, 14), range(1, STEPS)))
def test_a_run_resumes_from_every_checkpoint_to_the_same_bits(finished, tmp_path, step):
    folder, before, kept = finished
    out = shutil.copytree(folder, tmp_path / "run")
    for checkpoint in (out / "checkpoints").iterdir():
        if int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)
    params, again = regression(out, resume="auto").run()
    assert (digest(params), again) == (before, kept) and compare(folder, out) == []
    assert len(read_lines(out / "metrics.jsonl")) == STEPS + EPOCHS + 1


def test_the_model_with_the_best_evaluation_is_kept(finished, tmp_path):
    folder, found, kept = finished
    losses = {x["update"] + 1: x["eval/loss"] for x in read_lines(folder / "metrics.jsonl")
              if "eval/loss" in x}  # fmt: skip
    assert list(losses) == [0, 5, 10, 15, 20]
    assert kept == min(list(losses)[1:], key=losses.__getitem__) < STEPS
    run = regression(tmp_path / "last", select_by="last")
    params, last = run.run()
    assert last == STEPS and digest(params) == digest(run.state.params) != found


def test_a_changed_setting_or_a_loss_that_is_not_finite_is_refused(finished, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "run")
    with pytest.raises(ValueError, match=r"training.learning_rate was 0.05 in the run"):
        regression(out, resume="yes", learning_rate=0.1)
    with pytest.raises(ValueError, match="step 3 is not finite; lower learning_rate=1e"):
        regression(tmp_path / "new", learning_rate=1e30).run()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_progress_bar_fits_80_columns(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with contextlib.redirect_stderr(Terminal()) as terminal:
        regression(tmp_path / "run", progress=True).run()
    shown = re.split(r"[\r\n]+", terminal.getvalue())
    # A line that follows a longer one ends with spaces.
    lines = [x.rstrip() for x in shown if x.startswith("fit")]
    assert max(map(len, lines)) <= 80
    assert re.fullmatch(r"fit 20/20 \|.*\| 00:00 left, loss=\S+, held-out loss=\S+@20", lines[-1])
    worst = {"objective/scores": -1.234e-5, "objective/kl": -1.23e-7, "eval/scores": -1.234e-5}
    text = progress_text(worst, trainer._DISPLAY.shown)
    bar = {"prefix": "PPO", "bar_format": BAR_FORMAT, "postfix": text, "ncols": 80}
    line = tqdm.format_meter(12345, 99999, 36000, **bar)
    assert re.search(r"\| \d\d:\d\d:\d\d left, score=\S+, kl=\S+, eval=-1.23e-05$", line)
    assert len(line) <= 80
    usual = {"objective/scores": -12.34, "objective/kl": 123.4, "eval/scores": -12.34}
    bar["postfix"] = progress_text(usual, trainer._DISPLAY.shown, evaluated=12345)
    assert tqdm.format_meter(12345, 99999, 36000, **bar).endswith("kl=123, eval=-12.3@12345")


@pytest.mark.slow
def test_a_model_from_scratch_learns_is_reported_and_loads_in_transformers(tmp_path, capsys):
    rows = [{"prompt": f"{i} and {i} is", "response": f" {2 * i}, as you know"} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"data": tmp_path / "rows.jsonl", "epochs": 2, "batch-size": 4, "length": 32}
    given |= {"learning-rate": 3e-3, "from-scratch": "tiny", "out": tmp_path / "new"}
    cli.main([*command_line("sft", **given), "--no-tensorboard"])
    summary = read_json(tmp_path / "new/summary.json")
    assert summary["after"]["eval/loss"] < summary["before"]["eval/loss"] - 0.5
    assert summary["kept"] == summary["updates"] == 4
    page = make_report([tmp_path / "new"])
    assert "Loss on held-out rows" in page and "training.learning_rate" in page
    assert len(read_history(tmp_path / "new").series("train/loss")[0]) == 4
    ours, tokenizer = load_model(tmp_path / "new")
    ids = tokenizer("3 and 3 is").input_ids
    assert ids == AutoTokenizer.from_pretrained(tmp_path / "new")("3 and 3 is").input_ids
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    with torch.no_grad():
        expected = peer(torch.tensor([ids])).logits.numpy()
    model, tokens = language_model(ours.config), jnp.array([ids])
    hidden, _ = model.hidden(ours.params, tokens, tokens >= 0)
    np.testing.assert_allclose(model.logits(ours.params, hidden), expected, atol=1e-4)
    for wrong, message in {
        ("--from-scratch", "huge"): "from_scratch=huge is not a size; choose one of tiny, small",
        ("--model", "x", "--from-scratch", "tiny"): "Give either model or from_scratch",
    }.items():
        with pytest.raises(SystemExit):
            cli.main(["sft", *wrong, "--data", "rows.jsonl", "--out", str(tmp_path / "other")])
        assert message in " ".join(capsys.readouterr().err.split())
