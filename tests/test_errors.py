"""`ppo_jax.errors`: what a fault carries, and that the module is cheap to import."""

import subprocess
import sys
from pathlib import Path

import pytest

from ppo_jax import errors

FAULTS = [
    errors.RewardError,
    errors.NonFiniteError,
    errors.GradientError,
    errors.NonFiniteParametersError,
]


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_with_other_rows(kind):
    """A copy of the same class with the same cause; the first fault stays as it was."""
    cause = KeyError("answer")
    try:
        raise kind("It fails.", rows=[1, 2]) from cause
    except errors.Fault as fault:
        first = fault
    moved = first.with_rows([8, 9], dump=[{"prompt": "a"}])
    again = moved.with_rows(moved.rows, "In process 1: It fails.")
    assert type(first) is type(moved) is type(again) is kind
    assert [str(x) for x in (first, moved, again)] == [
        "It fails.",
        "It fails.",
        "In process 1: It fails.",
    ]
    assert (first.rows, moved.rows, again.rows) == ((1, 2), (8, 9), (8, 9))
    assert (first.dump, moved.dump, again.dump) == ([], [{"prompt": "a"}], [{"prompt": "a"}])
    assert again.__cause__ is cause and again.__traceback__ is first.__traceback__
    assert again.kind == first.kind


def test_policies_of_faults():
    assert [kind.kind for kind in FAULTS] == ["reward", "logprobs", "gradient", "gradient"]


def test_importing_errors_does_not_import_jax():
    """The package's `__init__` is left out: it imports everything."""
    program = f"""
import sys, types
package = types.ModuleType("ppo_jax")
package.__path__ = [{str(Path(errors.__file__).parent)!r}]
sys.modules["ppo_jax"] = package
import ppo_jax.errors
print(sorted({{"jax", "flax", "optax", "numpy"}} & set(sys.modules)))
"""
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert out.stdout == "[]\n"
