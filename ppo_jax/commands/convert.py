"""The command `ppo-jax convert`, which writes models in the Hugging Face format."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import tyro

from ppo_jax import hashing
from ppo_jax.commands.runs import stored_command
from ppo_jax.distributed import compilation, placement
from ppo_jax.models.io import adapter_files, families, pretrained, stored
from ppo_jax.run.assembly import Learner, load_model
from ppo_jax.run.export import export_models
from ppo_jax.run.files import check_links
from ppo_jax.run.parts import initial_reference
from ppo_jax.run.remote import local_copy
from ppo_jax.run.resume import read_config
from ppo_jax.run.stored import Which, read_checkpoint


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write a language model, or a checkpoint of a run, in the Hugging Face format.

    The tensors are float32 safetensors. A model may be in any format that `ppo-jax train` reads. Of
    a run, the folder gets `model/` (the policy), `critic/` (a reward model with one label, which
    --critic takes) and, if the run trains one, `adapter/` in peft's format.
    """

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
        if (self.run_folder is None) == (self.model is None):
            raise ValueError("convert takes either the folder of a run or --model, one of the two.")
        check_links(self.out)
        if self.out.exists():
            raise ValueError(f"{self.out} exists already; choose another folder.")
        if stored.file_format(self.out):
            raise ValueError(
                f"convert writes a folder in the Hugging Face format, no GGUF file; choose a name "
                f"without .gguf for out={self.out}."
            )
        if self.run_folder is None:
            self._convert_model(str(self.model))
        else:
            self._convert_run(local_copy(self.run_folder))

    def _convert_model(self, model: str) -> None:
        if self.update != "last":
            raise ValueError(f"--update {self.update} is for the folder of a run, not for --model.")
        _check_language_model(model)
        policy, tokenizer = load_model(model, causal=False)
        if self.adapter is not None:
            kind = policy.hf_config["model_type"]
            params = adapter_files.merge_adapter(policy.params, self.adapter, policy.config, kind)
            policy = policy._replace(params=params)
        pretrained.save_policy(self.out, policy, tokenizer)
        print(f"The model is in {self.out}, in the format that transformers loads.")

    def _convert_run(self, run: Path) -> None:
        if self.adapter is not None:
            raise ValueError("--adapter is for --model; a run has its own adapter.")
        command = replace(stored_command(run), mesh="data=1")
        learner = command.learner()
        if learner.lora is not None:
            _check_base(run, learner)
        state = compilation.start_state(
            learner.agent,
            learner.params,
            jax.random.key(command.loop.seed),
            updates=command.loop.updates,
            mesh=None,
        )
        state = read_checkpoint(run, state, self.update)
        params = placement.to_host(state.params)
        refused = export_models(self.out, learner, params, base_name=command.model)
        for part, reason in refused.items():
            print(f"The {part} is not written: {reason}", file=sys.stderr)
        print(
            f"The models after {int(state.update)} updates are in {self.out}, in the format that "
            f"transformers loads: {', '.join(sorted(path.name for path in self.out.iterdir()))}."
        )


def _check_base(run: Path, learner: Learner) -> None:
    """Warn if the model below the adapters may not be the one that they were trained over."""
    params, frozen = learner.params, learner.frozen
    now = hashing.digest((params, frozen, initial_reference(params, frozen, learner.ref_params)))
    before = read_config(run)["hashes"].get("model")
    if now != before:
        print(
            f"The model of the run had the hash {before} and has {now} here: unless only the "
            "devices differ, the adapters were trained over another model.",
            file=sys.stderr,
        )


def _check_language_model(model: str) -> None:
    """Raise ValueError if the config is that of a classifier, or of an encoder without a head."""
    hf = stored.read_config(model)
    name = str((hf.get("architectures") or [""])[0])
    bare = (
        name.endswith("Model")
        and not name.endswith("HeadModel")
        and families.config_of(hf).lm_transform
    )
    if bare or name.endswith("ForSequenceClassification"):
        raise ValueError(
            f"convert takes language models; {model} is a {name}, which has no language-model "
            "head. Encoders and reward models in safetensors need no conversion."
        )
