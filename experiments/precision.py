"""What a TPU's matrix precision does to log-probs: its bfloat16 passes, imitated on any machine, on the real SmolLM2-135M.

    python -m experiments.precision --out DIR

A TPU multiplies float32 operands as bfloat16 parts: one pass rounds both (`default`), three take high x high, high x low and low x
high (`high`), six all products of three parts down to 2^-16 (`highest`). Sums are float32. Here each matrix product of the traced
program is replaced by those passes.
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
from ppo_jax import data
from ppo_jax.models.io import pretrained
from ppo_jax.models.transformer import language_model
from ppo_jax.ops.logprobs import token_logprobs

PASSES = {
    "default": [(0, 0)],
    "high": [(0, 0), (0, 1), (1, 0)],
    "highest": [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0)],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """Log-probs under a TPU's matrix precisions."""

    out: Path
    """Folder for summary.json."""
    texts: int = 16
    """Movie reviews scored."""


def parts(x: jax.Array) -> list[jax.Array]:
    """Three bfloat16 numbers whose sum is `x` to float32, as float32."""
    found = []
    for _ in range(3):
        found.append(jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))
        x = x - found[-1]
    return found


def with_passes(function: Callable, passes: list[tuple[int, int]]) -> Callable:
    """`function` with each float32 matrix product done in bfloat16 passes."""

    def run(jaxpr: Any, consts: Any, args: Any) -> list[Any]:
        known = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(
            zip(jaxpr.invars, args, strict=True)
        )
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
    file = assets.smollm2_gguf()
    tokenizer, policy = pretrained.load_tokenizer(file), pretrained.load_policy(file)
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
            f"{name:8} log-probs differ by {gap.mean():.2e} on average, {gap.max():.2e} at most, of {real.sum()} tokens"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "summary.json").write_text(json.dumps(found, indent=2) + "\n")
    return found


if __name__ == "__main__":
    main(tyro.cli(Precision))
