"""Time the rollout of responses of very different lengths, for several numbers of slots.

    python -m experiments.benchmarks.slots --out DIR

The lengths are lognormal, with median 64 and sigma 1, and at most `new_tokens`. The policy is a
random model whose probability of the stop token depends on the length of the response alone.
"""

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import Array

from experiments.benchmarks.work import WORKS
from ppo_jax import KVCache, LanguageModel, Params, generate, init_params, language_model

_STOP = 0
_MEDIAN, _SIGMA = 64, 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
    """Time rollouts that differ in the number of slots, in turn."""

    out: Path
    """Folder for summary.json."""
    work: str = "small"
    """Name of a shape in work.py, whose model is used."""
    rows: int = 64
    """Number of prompts."""
    prompt_tokens: int = 64
    """Length of a prompt."""
    new_tokens: int = 512
    """Greatest length of a response."""
    slots: tuple[int, ...] = (64, 32, 16, 8)
    """Numbers of slots."""
    runs: int = 3
    """Timed rollouts of each, after one that is not timed."""


def main(options: Slots) -> dict[str, Any]:
    """Measure, write a summary to `options.out`, print and return it."""
    positions = options.prompt_tokens + options.new_tokens
    config = dataclasses.replace(WORKS[options.work].config, positions=positions)
    model = with_lengths(language_model(config), options.prompt_tokens)
    params = init_params(config, jax.random.key(0))
    shape = (options.rows, options.prompt_tokens)
    prompts = jax.random.randint(jax.random.key(1), shape, 1, config.vocab_size)
    arguments = params, jax.random.key(2), prompts, jnp.ones(shape, bool)
    programs = {slots: _compiled(model, options, slots, arguments) for slots in options.slots}
    times: dict[int, list[float]] = {slots: [] for slots in programs}
    for run in range(options.runs + 1):
        for slots, program in programs.items():
            start = time.perf_counter()
            rollout = jax.block_until_ready(program(*arguments))
            if run:
                times[slots].append(time.perf_counter() - start)
    lengths = np.asarray(rollout.response_mask.sum(axis=1))
    found = {
        "device": jax.devices()[0].device_kind,
        "lengths": [int(np.median(lengths)), int(lengths.mean()), int(lengths.max())],
        "real_share_of_steps": float(lengths.mean() / lengths.max()),
        **{f"rollout_s/slots={slots}": statistics.median(x) for slots, x in times.items()},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "summary.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    return found


def with_lengths(model: LanguageModel, prompt_tokens: int) -> LanguageModel:
    """Return the model with lognormal lengths of responses to prompts without padding.

    Hidden states have two more numbers, the log-probability of the stop token and of all others.
    """

    def hidden(
        params: Params,
        tokens: Array,
        mask: Array,
        cache: KVCache | None = None,
        last: int | None = None,
    ) -> tuple[Array, KVCache | None]:
        states, after = model.hidden(params, tokens, mask, cache, last)
        assert after is not None
        longer = jnp.sum(after.mask, axis=1) - prompt_tokens  # The next token has this number.
        stop = _log_hazard(longer.astype(jnp.float32))
        more = jnp.stack([stop, jnp.log1p(-jnp.exp(stop))], axis=-1)[:, None]
        more = jnp.broadcast_to(more, (*states.shape[:2], 2))
        return jnp.concatenate([states, more.astype(states.dtype)], axis=-1), after

    def logits(params: Params, states: Array) -> Array:
        others = model.logits(params, states[..., :-2]).at[..., _STOP].set(-jnp.inf)
        others = jax.nn.log_softmax(others) + states[..., -1:]
        return others.at[..., _STOP].set(states[..., -2])

    return model._replace(hidden=hidden, logits=logits)


def _log_hazard(t: Array) -> Array:
    """Return the log-probability that a response with `t` tokens has just one more."""
    survival = lambda t: jax.scipy.stats.norm.cdf((np.log(_MEDIAN) - jnp.log(t)) / _SIGMA)
    return jnp.log1p(-survival(t + 1) / survival(t))


def _compiled(
    model: LanguageModel, options: Slots, slots: int, arguments: tuple[Any, ...]
) -> Callable[..., Any]:
    """Compile the rollout."""
    # The number of prompts is the default, which is left out so that older code runs too.
    more = {} if slots == options.rows else {"slots": slots}
    sample = functools.partial(
        generate, model, max_new_tokens=options.new_tokens, stop_ids=(_STOP,), **more
    )
    return jax.jit(sample).lower(*arguments).compile()


if __name__ == "__main__":
    main(tyro.cli(Slots))
