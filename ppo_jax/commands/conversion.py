"""What `ppo-jax convert` does."""

import sys
from dataclasses import replace
from pathlib import Path

import jax

from ppo_jax import hashing
from ppo_jax.commands.convert import Convert
from ppo_jax.commands.learner import read_learner
from ppo_jax.commands.stored import stored_command
from ppo_jax.distributed import compilation, placement
from ppo_jax.models.io import adapter_files, families, pretrained, stored
from ppo_jax.run.assembly import Learner, load_model
from ppo_jax.run.export import export_models
from ppo_jax.run.files import check_links
from ppo_jax.run.parts import initial_reference
from ppo_jax.run.remote import local_copy
from ppo_jax.run.resume import read_config
from ppo_jax.run.stored import read_checkpoint


def convert(options: Convert) -> None:
    """Read the model or the run, and write the result to `out`."""
    if (options.run_folder is None) == (options.model is None):
        raise ValueError("convert takes either the folder of a run or --model, one of the two.")
    check_links(options.out)
    if options.out.exists():
        raise ValueError(f"{options.out} exists already; choose another folder.")
    if stored.file_format(options.out):
        raise ValueError(
            f"convert writes a folder in the Hugging Face format, no GGUF file; choose a name "
            f"without .gguf for out={options.out}."
        )
    if options.run_folder is None:
        _convert_model(options, str(options.model))
    else:
        _convert_run(options, local_copy(options.run_folder))


def _convert_model(options: Convert, model: str) -> None:
    if options.update != "last":
        raise ValueError(f"--update {options.update} is for the folder of a run, not for --model.")
    _check_language_model(model)
    policy, tokenizer = load_model(model, causal=False)
    if options.adapter is not None:
        kind = policy.hf_config["model_type"]
        params = adapter_files.merge_adapter(policy.params, options.adapter, policy.config, kind)
        policy = policy._replace(params=params)
    pretrained.save_policy(options.out, policy, tokenizer)
    print(f"The model is in {options.out}, in the format that transformers loads.")


def _convert_run(options: Convert, run: Path) -> None:
    if options.adapter is not None:
        raise ValueError("--adapter is for --model; a run has its own adapter.")
    command = replace(stored_command(run), mesh="data=1")
    learner = read_learner(command)
    if learner.lora is not None:
        _check_base(run, learner)
    state = compilation.start_state(
        learner.agent,
        learner.params,
        jax.random.key(command.loop.seed),
        updates=command.loop.updates,
        mesh=None,
    )
    state = read_checkpoint(run, state, options.update)
    params = placement.to_host(state.params)
    refused = export_models(options.out, learner, params, base_name=command.model)
    for part, reason in refused.items():
        print(f"The {part} is not written: {reason}", file=sys.stderr)
    print(
        f"The models after {int(state.update)} updates are in {options.out}, in the format that "
        f"transformers loads: {', '.join(sorted(path.name for path in options.out.iterdir()))}."
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
