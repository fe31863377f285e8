"""How a TPU's matrix precision changes the log-probs of SmolLM2-135M, emulated on any machine.

    python -m experiments.precision --out DIR

A TPU multiplies float32 operands as sums of bfloat16 parts. One pass rounds both operands
(`default`), three passes take high x high, high x low and low x high (`high`), and six passes take
all products of three parts down to 2^-16 (`highest`). Sums are in float32. This experiment replaces
each matrix product of the traced program by those passes.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.extend.core import ClosedJaxpr, Literal

from experiments import assets
from ppo_jax import data, language_model, load_model, token_logprobs

PASSES = {
    "default": [(0, 0)],
    "high": [(0, 0), (0, 1), (1, 0)],
    "highest": [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0)],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """Settings of the experiment."""

    out: Path
    """Folder for summary.json."""
    texts: int = 16
    """Number of movie reviews."""


def parts(x: jax.Array) -> list[jax.Array]:
    """Return three bfloat16 arrays, stored as float32, whose sum is `x` to float32 precision."""
    rounded = []
    for _ in range(3):
        rounded.append(jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))
        x = x - rounded[-1]
    return rounded


def with_passes(function: Callable, passes: list[tuple[int, int]]) -> Callable:
    """Return `function` with each float32 matrix product computed in bfloat16 passes."""

    def run(jaxpr: Any, consts: Any, args: Any) -> list[Any]:
        variables = [*jaxpr.constvars, *jaxpr.invars]
        known = dict(zip(variables, [*consts, *args], strict=True))
        read = lambda v: v.val if isinstance(v, Literal) else known[v]
        for eqn in jaxpr.eqns:
            values = [read(v) for v in eqn.invars]
            inner = next((p for p in eqn.params.values() if isinstance(p, ClosedJaxpr)), None)
            if eqn.primitive.name == "dot_general":
                a, b = parts(values[0]), parts(values[1])
                out = [
                    sum(eqn.primitive.bind(a[i], b[j], **eqn.params) for i, j in reversed(passes))
                ]
            elif eqn.primitive.name in ("jit", "pjit", "closed_call", "custom_jvp_call"):
                out = run(inner.jaxpr, inner.consts, values)
            else:
                out = eqn.primitive.bind(*values, **eqn.params)
                out = out if eqn.primitive.multiple_results else [out]
            known.update(zip(eqn.outvars, out, strict=True))
        return [read(v) for v in jaxpr.outvars]

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        traced, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        out = run(traced.jaxpr, traced.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return wrapped


def main(options: Precision) -> dict[str, dict[str, float]]:
    """Compare log-probs under each precision with float32, and write the differences."""
    file = assets.smollm2_gguf()
    policy, tokenizer = load_model(file)
    texts = [sentence.sentence for sentence in assets.movie_reviews()[: options.texts]]
    tokens, mask = data.pad([tokenizer(text).input_ids for text in texts], pad_id=0, left=False)
    model = language_model(policy.config)

    def logprobs(params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        hidden, _ = model.hidden(params, tokens[:, :-1], mask[:, :-1])
        return token_logprobs(model.logits(params, hidden), tokens[:, 1:])

    args = (policy.params, jnp.asarray(tokens), jnp.asarray(mask))
    real, exact = mask[:, 1:], np.asarray(jax.jit(logprobs)(*args))
    found = {}
    for name, passes in PASSES.items():
        gap = np.abs(np.asarray(jax.jit(with_passes(logprobs, passes))(*args)) - exact)[real]
        found[name] = {"mean": float(gap.mean()), "max": float(gap.max())}
        print(
            f"{name:8} log-probs of {real.sum()} tokens differ by {gap.mean():.2e} on average and "
            f"by {gap.max():.2e} at most"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "summary.json").write_text(json.dumps(found, indent=2) + "\n")
    return found


if __name__ == "__main__":
    main(tyro.cli(Precision))
