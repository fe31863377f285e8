"""Write the result of a run: the fine-tuned model, its adapter and the summary."""

from pathlib import Path

from ppo_jax.distributed import placement, processes
from ppo_jax.models.io import adapter_files, pretrained, stored
from ppo_jax.models.lora import merge
from ppo_jax.ppo.state import PPOState, overlay
from ppo_jax.run.files import read_lines, write_json
from ppo_jax.run.trainer import Trainer
from ppo_jax.types import Params


def export_result(out: Path, trainer: Trainer, state: PPOState, *, base_name: str) -> None:
    """Write the fine-tuned model, and its adapter if one was trained.

    Args:
      out: the run's folder. The model is written to `model/` in it and the adapter to `adapter/`.
      trainer: the trainer of the run, whose learner was made by `assemble`.
      state: the final state.
      base_name: the model that the run started from, which the adapter names as its base.

    Raises:
      ValueError: if a file cannot be written.
    """
    learner = trainer.learner
    policy, lora = learner.policy, learner.lora
    if policy is None:
        raise ValueError("Only the result of a learner that assemble made can be exported.")
    tuned = placement.to_host(state.policy, everywhere=False)
    base = policy.params
    if lora is not None:
        base = placement.to_host(base, everywhere=False)
        if Path(base_name).is_dir():  # For the folder of a run, that of the model in it.
            base_name = str(stored.resolve(base_name))

    def write() -> None:
        params: Params = tuned
        try:
            if lora is not None:
                kind = policy.hf_config["model_type"]
                adapter = out / "adapter"
                adapter_files.save_adapter(adapter, tuned, lora, policy.config, kind, base_name)
                params = merge(overlay(base, tuned), lora.scale)
            result = policy._replace(params=params)
            pretrained.save_policy(out / "model", result, learner.tokenizer)
        except ValueError as error:
            raise ValueError(
                f"{error} The last checkpoint holds the result; free some space, then use "
                "--resume yes to write it."
            ) from error

    processes.on_first_process(write)


def write_summary(out: Path, updates: int, digest: str) -> None:
    """Write `summary.json`.

    Args:
      out: the run's folder, whose last metrics are copied to the summary.
      updates: the number of updates of the run.
      digest: the digest of the final parameters.
    """
    lines = read_lines(out / "metrics.jsonl")
    # The last update may have two lines, because an evaluation has its own.
    last = [row for row in lines if row["update"] == lines[-1]["update"]]
    metrics = {name: x for row in last for name, x in row.items() if name != "update"}
    write_json(out / "summary.json", {"updates": updates, "digest": digest, **metrics})
