"""Read the models that the options of `ppo-jax train` name."""

from functools import partial
from typing import TYPE_CHECKING

import jax
from jax.sharding import Mesh

from ppo_jax.distributed import meshes
from ppo_jax.run.assembly import Learner, assemble, load_model
from ppo_jax.run.parts import check_vocabulary, starting_adapters

if TYPE_CHECKING:
    from ppo_jax.commands.train import Train


def make_devices(options: "Train") -> tuple[Mesh | None, Mesh | None]:
    """Arrange the devices, set the precision of their products, and check the batch against them.

    Args:
      options: the options of the command.

    Returns:
      The devices that learn, or None for one device or `pmap`; and those that sample, or None.

    Raises:
      SettingError: if the settings do not fit the devices.
    """
    jax.config.update("jax_default_matmul_precision", options.matmul_precision)
    pmap = options.mesh == "pmap"
    sizes = {} if pmap else meshes.parse_mesh(options.mesh, meshes.GROUPS)
    mesh, sampling = (None, None) if pmap else meshes.make_meshes(sizes)
    mesh = None if mesh is None or mesh.size == 1 else mesh
    meshes.check_rows(options.ppo, jax.local_device_count() if pmap else meshes.batch_shards(mesh))
    if sampling is not None:
        meshes.check_sampled_rows(options.ppo, sampling)
    return mesh, sampling


def read_learner(options: "Train") -> Learner:
    """Read the policy, the reference, the adapters and the critic, and assemble what is trained.

    Args:
      options: the options of the command, whose critic is not "auto".

    Returns:
      The learner.

    Raises:
      SettingError: if the settings do not fit one another or the devices.
      ValueError: if a model cannot be read, or the models do not fit each other.
    """
    pmap = options.mesh == "pmap"
    mesh, sampling = make_devices(options)
    load = partial(load_model, dtype=options.dtype, remat=options.remat, mesh=mesh)
    policy, tokenizer = load(options.model)
    reference, adapters, lora = None, None, options.lora if options.lora.rank else None
    if options.reference is not None:
        reference, other = load(options.reference)
        check_vocabulary(tokenizer, other, options.reference)
    if options.adapter is not None:
        adapters, lora = starting_adapters(options.adapter, policy)
    return assemble(
        policy,
        tokenizer,
        options.ppo,
        critic=options.critic,
        own_advantage=True,  # The critic was checked when it was chosen.
        lora=lora,
        adapters=adapters,
        reference=reference,
        mesh=mesh,
        pmap=pmap,
        seed=options.loop.seed,
        stop_tokens=options.stop_tokens,
    )._replace(sampling=sampling)
