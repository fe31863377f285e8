"""Set up JAX for all tests: 8 virtual CPU devices, no broadcasting between ranks, no model hub.

Most settings are environment variables, so that processes that tests start have them too. All
processes of a session share a cache of compiled programs.
"""

import os
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

os.environ["PYTHONPATH"] = os.pathsep.join(str(folder) for folder in Path(__file__).parents[:2])
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="ppo_jax_tests_"))
# Each core has a test process of its own; more threads of PyTorch would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Runs in tests are short: their programs should compile quickly rather than run fast. XLA's older
# emitters, which later versions lack, compile in half the time.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    + " --xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10.")
)

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

pytest.register_assert_rewrite("helpers")


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Drop the programs of a module of tests, as a process may hold only so many in memory."""
    yield
    jax.clear_caches()
