"""Write the result of a run: the fine-tuned model, its adapter, its critic and the summary."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppo_jax.distributed import placement, processes
from ppo_jax.models.io import adapter_files, critics, pretrained, stored
from ppo_jax.models.io.pretrained import Pretrained
from ppo_jax.models.lora import merge
from ppo_jax.ppo.state import PPOState, overlay
from ppo_jax.run.assembly import Learner
from ppo_jax.run.trainer import Trainer
from ppo_jax.types import Params


def export_result(out: Path, trainer: Trainer, state: PPOState, *, base_name: str) -> None:
    """Write the fine-tuned model, its adapter if one was trained, and a critic with its own trunk.

    Args:
      out: the run's folder. The model is written to `model/` in it, the adapter to `adapter/` and
        the critic to `critic/`.
      trainer: the trainer of the run, whose learner was made by `assemble`.
      state: the final state.
      base_name: the model that the run started from, which the adapter names as its base.

    Raises:
      ValueError: if a file cannot be written.
    """
    own_trunk = trainer.learner.critic is not None
    params = state.params if own_trunk else {"policy": state.policy}
    try:
        export_models(
            out,
            trainer.learner,
            placement.to_host(params, everywhere=False),
            base_name=base_name,
        )
    except ValueError as error:
        raise ValueError(
            f"{error} The last checkpoint holds the result; free some space, then use "
            "--resume yes to write it."
        ) from error


def export_models(
    out: Path, learner: Learner, params: Mapping[str, Any], *, base_name: str
) -> dict[str, str]:
    """Write trained parameters as folders that `transformers` and `peft` read.

    Args:
      out: the folder to write to: `model/` for the policy, `adapter/` for its adapter if it has
        one, and `critic/` for the critic.
      learner: the learner of the run, which `assemble` made.
      params: the trained parameters on the host, `{"policy": ..., "critic": ...}`; without
        "critic", no critic is written. All processes but the first may pass None for each array.
      base_name: the model that the run started from, which the adapter names as its base.

    Returns:
      For each part that cannot be written in a format of `transformers`, a sentence that says why,
      such as `{"critic": ...}`.

    Raises:
      ValueError: if the learner was not made by `assemble`, or a file cannot be written.
    """
    policy, lora = learner.policy, learner.lora
    if policy is None:
        raise ValueError("Only the result of a learner that assemble made can be exported.")
    scale = None if lora is None else lora.scale
    frozen = placement.to_host(learner.frozen or {}, everywhere=False)
    if lora is not None and Path(base_name).is_dir():  # For the folder of a run, its model.
        base_name = str(stored.resolve(base_name))
    refused = {}

    def write() -> None:
        if lora is not None:
            kind = policy.hf_config["model_type"]
            adapter_files.save_adapter(
                out / "adapter", params["policy"], lora, policy.config, kind, base_name
            )
        whole = _merged(frozen.get("policy"), params["policy"], scale)
        tuned = policy._replace(params=whole)
        pretrained.save_policy(out / "model", tuned, learner.tokenizer)
        if "critic" in params:
            critic = _merged(frozen.get("critic"), params["critic"], scale)
            try:
                critics.save_critic(
                    out / "critic", _critic(learner, whole, critic), learner.tokenizer
                )
            except ValueError as error:
                refused["critic"] = str(error)

    processes.on_first_process(write)
    return refused


def _merged(frozen: Params | None, params: Params, scale: float | None) -> Params:
    """Return the parameters of a model without adapters."""
    return params if scale is None else merge(overlay(frozen, params), scale)


def _critic(learner: Learner, policy: Params, critic: Params) -> Pretrained:
    """Return the critic as a scorer; one that shares the policy's trunk gets a copy of it."""
    trunk = learner.critic or learner.policy
    assert trunk is not None, "export_models has checked that there is a policy"
    return trunk._replace(params={"trunk": policy, **critic})
