"""The command `ppo-jax convert`, which writes models in the Hugging Face format."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import tyro

from ppo_jax.run.settings import Which


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write a language model, or a checkpoint of a run, in the Hugging Face format.

    The tensors are float32 safetensors. A model may be in any format that `ppo-jax train` reads. Of
    a run, the folder gets `model/` (the policy), `critic/` (a reward model with one label, which
    --critic takes) and, if the run trains one, `adapter/` in peft's format.
    """

    example: ClassVar[str] = """ppo-jax convert runs/a --update best --out models/best"""

    run_folder: tyro.conf.Positional[Path | None] = None
    """Folder of a run of `ppo-jax train`. Nothing in it changes. Relative paths in its settings are
    resolved against the current folder."""
    update: Which = "last"
    """Checkpoint of the run: best (by the evaluation on held-out prompts), last, or its number of
    updates."""
    model: str | None = None
    """Model to convert, if it is not a run: a folder, a Hugging Face id or a .gguf file."""
    out: Path
    """Folder to write to. It must not exist."""
    adapter: Path | None = None
    """Folder of an adapter in peft's format, to merge into the model."""

    def run(self) -> None:
        """Read the model or the run, and write the result to `out`."""
        from ppo_jax.commands.conversion import convert

        convert(self)
