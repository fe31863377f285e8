"""Run a PPO iteration on many devices and in several processes.

* `meshes`: build a mesh from a text such as `data=2,fsdp=4`, and check the batch against it.
* `placement`: move parameters and batches to the mesh, and results back to the host.
* `compilation`: the steps of an iteration, compiled with `jax.jit` for one device or a mesh.
* `replicas`: the same steps under `jax.pmap`.
* `joining`: the options of several processes, and how each joins the others.
* `processes`: let several processes exchange short texts, and stop them together.

The sharding rules themselves are in `ppo_jax.sharding`, since models need them too.
"""
