"""Assemble a `Learner` from a model, a critic, adapters, settings and a mesh."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ppo_jax import data
from ppo_jax.data.prompts import LongPrompts
from ppo_jax.data.text import pad_id
from ppo_jax.distributed import meshes
from ppo_jax.models.io import pretrained
from ppo_jax.models.io.pretrained import Pretrained
from ppo_jax.models.lora import adapt
from ppo_jax.models.lora_settings import LoRA
from ppo_jax.models.transformer import language_model
from ppo_jax.ppo.critic_settings import choose_critic
from ppo_jax.ppo.packing import check_packing
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.ppo.state import Agent, init_key, overlay
from ppo_jax.run.encoding import check_top_k, encode_for, stop_ids
from ppo_jax.run.parts import check_reference, make_critic, reference_model
from ppo_jax.types import Params

_CRITIC, _ADAPTERS = 0, 1  # each part of the new parameters has a key of its own


class Learner(NamedTuple):
    """An agent with its parameters, its tokenizer and the devices that it runs on.

    `assemble` makes one from a pretrained model. For a model of your own, the first three fields
    are enough: `Learner(agent, params, tokenizer)`.

    Attributes:
      agent: the policy and critic as pure functions, and their settings.
      params: `{"policy": ..., "critic": ...}`, the parameters that are trained.
      tokenizer: a `transformers` tokenizer.
      frozen: parameters of the same structure that are not trained; `params` take precedence.
      ref_params: the reference policy's parameters; None uses the frozen policy if there is one
        (the model below the adapters), and the initial policy otherwise. It must be None if the
        settings move the reference, which then starts as the initial policy.
      mesh: the devices, or None for a single device.
      pmap: run a replica on each local device with `jax.pmap` instead of using a mesh.
      sampling: the devices that sample, as `make_meshes` returns them; None for those of `mesh`.
      policy: the pretrained policy as it was read, from which a result is exported.
      lora: the adapters' settings, or None.
      ref_positions: the longest sequence that another reference model can read, or None.
      critic: the trunk of a critic that has its own, as it was read, without parameters; or None.

    Example:
      >>> from ppo_jax import Agent, Learner, PPOConfig, TransformerConfig, init_params
      >>> from ppo_jax import language_model, shared_critic, zero_head
      >>> config = TransformerConfig(
      ...     vocab_size=7, positions=8, width=4, layers=1, heads=2, mlp_width=16)
      >>> agent = Agent(language_model(config), shared_critic(), PPOConfig(), (0,), 0)
      >>> policy = init_params(config, jax.random.key(0))
      >>> params = {"policy": policy, "critic": {"head": zero_head(config.width)}}
      >>> Learner(agent, params, tokenizer=None).frozen is None
      True
    """

    agent: Agent
    params: Params
    tokenizer: Any
    frozen: Params | None = None
    ref_params: Params | None = None
    mesh: Mesh | None = None
    pmap: bool = False
    policy: Pretrained | None = None
    lora: LoRA | None = None
    ref_positions: int | None = None
    critic: Pretrained | None = None
    sampling: Mesh | None = None

    @property
    def row_devices(self) -> int:
        """Number of devices over which the rows of a batch are sharded."""
        return jax.local_device_count() if self.pmap else meshes.batch_shards(self.mesh)

    def check(self, prompts: data.Prompts) -> None:
        """Raise SettingError if the settings do not fit devices, reference or packed prompts."""
        agent, longest = self.agent, prompts.tokens.shape[1] + self.agent.config.max_new_tokens
        check_reference(self.ref_params is not None, agent.config)
        meshes.check_rows(agent.config, self.row_devices)
        if self.sampling is not None:
            meshes.check_sampled_rows(agent.config, self.sampling)
        check_packing(agent.model, agent.critic, agent.config.bins, longest)

    def without_params(self) -> "Learner":
        """Return the learner without the parameters that train, so that their memory is freed."""
        policy = self.policy and self.policy._replace(params={})
        return self._replace(params={}, policy=policy)

    def encode(
        self,
        rows: Sequence[dict[str, Any]],
        *,
        long_prompts: LongPrompts = "error",
        max_prompt_tokens: int | None = None,
    ) -> data.Prompts:
        """Tokenize prompts for this learner's policy.

        Args:
          rows: rows with a column `prompt`, as `read_rows` returns them.
          long_prompts: what happens to prompts that are too long: "error", "drop" or "truncate", as
            in `encode_prompts`.
          max_prompt_tokens: greatest number of tokens of a prompt; by default what the policy and
            the critic can read besides a response.

        Returns:
          The left-padded prompts.

        Raises:
          ValueError: if the learner was not made by `assemble`, if a prompt is empty or holds a
            token that the policy does not have, or if a prompt and its response together are longer
            than the policy or the critic can read.
        """
        if self.policy is None:
            raise ValueError(
                "Learner.encode needs a learner made by assemble; use encode_prompts otherwise."
            )
        return encode_for(
            rows,
            self.tokenizer,
            self.policy.config,
            self.agent.config.max_new_tokens,
            long_prompts=long_prompts,
            max_prompt_tokens=max_prompt_tokens,
            critic_positions=None if self.critic is None else self.critic.config.positions,
            ref_positions=self.ref_positions,
        )


def assemble(
    policy: Pretrained,
    tokenizer: Any,
    ppo: PPOConfig,
    *,
    critic: str | Path = "auto",
    own_advantage: bool = False,
    lora: LoRA | None = None,
    adapters: Params | None = None,
    reference: Pretrained | None = None,
    mesh: Mesh | None = None,
    pmap: bool = False,
    seed: int = 0,
    stop_tokens: Sequence[str] = (),
) -> Learner:
    """Assemble a learner from a pretrained policy.

    Args:
      policy: the policy, as `load_model` returns it.
      tokenizer: its tokenizer.
      ppo: the settings of the PPO iteration.
      critic: "auto" for no critic if `ppo.advantage` reads no values and a separate one otherwise,
        "none" for no critic, "shared" for a value head on the policy's trunk, "separate" for a
        critic with its own trunk that starts from the policy, or the folder or Hugging Face id of a
        reward model with one label that the critic starts from.
      own_advantage: `Trainer` or `learn` will get an `advantage_fn` in place of `ppo.advantage`.
        Every critic goes with it, and "auto" is a separate one.
      lora: low-rank adapters to train instead of the whole model; the model itself is then frozen
        and serves as the reference policy.
      adapters: trained adapters of the policy to start from, of the settings `lora`. The reference
        policy is then the model with these adapters.
      reference: another reference policy, which may be of another architecture but must have the
        policy's vocabulary. None if the settings move the reference, which then starts as the
        policy.
      mesh: the devices, as `make_mesh` returns them; None for a single device.
      pmap: run a replica on each local device with `jax.pmap` instead.
      seed: seed of the new parameters, those of the value head and the adapters.
      stop_tokens: texts that end a response besides the tokenizer's own end token; each must be a
        single token.

    Returns:
      The learner.

    Raises:
      SettingError: if a number of rows in `ppo` does not divide evenly over the devices, or the
        settings do not go with the critic.
      ValueError: if the critic or the reference cannot read the policy's tokens, if a stop token is
        not a single token, or if `top_k` exceeds the vocabulary.

    Example:
      >>> from ppo_jax import Pretrained, TransformerConfig, init_params
      >>> config = TransformerConfig(
      ...     vocab_size=7, positions=8, width=4, layers=1, heads=2, mlp_width=16)
      >>> policy = Pretrained(config, init_params(config, jax.random.key(0)), {"eos_token_id": 2})
      >>> class Tokenizer:
      ...     eos_token_id, sep_token_id, pad_token_id = 0, None, None
      >>> learner = assemble(policy, Tokenizer(), PPOConfig(), critic="shared")
      >>> learner.agent.stop_ids
      (0, 2)
    """
    check_top_k(ppo.top_k, policy.config)
    critic = choose_critic(critic, ppo, own_advantage=own_advantage)
    check_reference(reference is not None, ppo)
    ref_model, ref_positions = reference_model(reference, policy.config)
    stops = stop_ids(tokenizer, policy, stop_tokens)
    if lora is not None:
        policy = policy._replace(config=replace(policy.config, lora_scale=lora.scale))
    critic_fn, critic_params, trunk = make_critic(critic, policy, init_key(seed, _CRITIC), mesh)
    padding = pad_id(tokenizer, policy.config.vocab_size)
    agent = Agent(language_model(policy.config), critic_fn, ppo, stops, padding, ref_model)
    params, frozen = {"policy": policy.params, "critic": critic_params}, None
    ref_params = None if reference is None else reference.params
    if lora is not None:
        params, frozen = adapt(params, init_key(seed, _ADAPTERS), lora)
        if adapters is not None:
            params["policy"] = adapters
            if not ppo.moves_reference:
                ref_params = ref_params or overlay(policy.params, adapters)
    learner = Learner(
        agent,
        params,
        tokenizer,
        frozen,
        ref_params,
        mesh=mesh,
        pmap=pmap,
        policy=policy,
        lora=lora,
        ref_positions=ref_positions,
        critic=trunk,
    )
    meshes.check_rows(ppo, learner.row_devices)
    return learner


def load_model(
    model: str | Path,
    *,
    dtype: str = "float32",
    remat: bool = False,
    mesh: Mesh | None = None,
    causal: bool = True,
) -> tuple[Pretrained, Any]:
    """Read a language model and its tokenizer, and check that they fit each other.

    Args:
      model: a folder, a Hugging Face id or a .gguf file.
      dtype: the compute type, "float32" or "bfloat16"; parameters are float32 either way.
      remat: recompute activations in the backward pass to save memory.
      mesh: the devices on which the parameters are placed; None for the default device.
      causal: refuse an encoder, which cannot be a policy.

    Returns:
      The model and its tokenizer.

    Raises:
      ValueError: if the model or its tokenizer cannot be read, or if they do not fit each other.

    Example::

        policy, tokenizer = load_model("gpt2")
    """
    policy = pretrained.load_policy(model, dtype=jnp.dtype(dtype), remat=remat, mesh=mesh)
    if causal and not policy.config.causal:
        raise ValueError(
            f"{model} is an encoder, which sees later tokens; a policy must be a decoder "
            "(is_decoder in its config.json)."
        )
    tokenizer = pretrained.load_tokenizer(model)
    pretrained.check_tokenizer(tokenizer, policy.config)
    return policy, tokenizer
