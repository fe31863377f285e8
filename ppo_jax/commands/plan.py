"""The command `ppo-jax plan`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from ppo_jax.models.lora_settings import NO_LORA, LoRA
from ppo_jax.ppo.settings import PPOConfig


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Compile a PPO iteration for a TPU slice that this machine does not have.

    The output says how much memory each chip would hold, what it would compute and send, and
    whether the programs fit.
    """

    example: ClassVar[str] = """ppo-jax plan --model gpt2-xl --topology v5e:4x4 --mesh fsdp=16"""

    model: str
    """The policy: a folder, a Hugging Face id, a .gguf file, or a published size such as gpt2-xl.
    Its weights are not read."""
    topology: str = "v5e:4x4"
    """Kind of chip and shape of the slice, such as v5e:4x4, v6e:8x8, v5p:4x4x4 or v4:2x2x2, or an
    accelerator type of Google Cloud, such as v5e-8."""
    mesh: str = ""
    """Sizes of the mesh axes, such as data=2,fsdp=4,tensor=2. By default all chips are on data."""
    max_prompt_tokens: int | None = None
    """Number of tokens of the longest prompt. By default 64, or fewer if the model has no more room
    before the response."""
    critic: Literal["auto", "none", "shared", "separate"] = "auto"
    """auto: none if the advantage estimator reads no values, otherwise separate. none: no critic.
    shared: a value head on the policy's trunk. separate: a model of its own."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type to compute in. Parameters are always float32."""
    matmul_precision: Literal["default", "high", "highest"] = "default"
    """Precision of float32 matrix products.
    On a TPU, default takes one bfloat16 pass, high three, and highest six, which is float32."""
    remat: bool = False
    """Recompute activations in the backward pass to save memory."""
    phases: tuple[Literal["rollout", "scoring", "update"], ...] = ("rollout", "scoring", "update")
    """Compile only these phases of an iteration."""
    depths: tuple[int, int] | None = None
    """Compile the model with these two numbers of layers, and extrapolate to all its layers.
    Use this for a model that takes too long to compile."""
    out: Path | None = None
    """JSON file to write the figures to as well."""
    lora: LoRA = NO_LORA
    ppo: PPOConfig = field(default_factory=PPOConfig)

    def run(self) -> None:
        """Compile the programs, print their figures, and write them to `out`."""
        from functools import partial

        import jax

        from ppo_jax.distributed.meshes import make_mesh, parse_mesh
        from ppo_jax.plan import report
        from ppo_jax.plan.compile import compile_iteration
        from ppo_jax.plan.extrapolation import extrapolate
        from ppo_jax.plan.memory import choose_prompt_tokens, load_config
        from ppo_jax.plan.topology import CHIPS, make_topology, slice_shape
        from ppo_jax.run.files import write_json

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_default_matmul_precision", self.matmul_precision)
        # The cache cannot store a program that was compiled for another machine.
        jax.config.update("jax_enable_compilation_cache", False)
        family, config = load_config(self.model, self.dtype, self.remat)
        prompt_tokens = choose_prompt_tokens(self.max_prompt_tokens, self.ppo, config)
        topology = slice_shape(self.topology)
        devices, chip = make_topology(topology), CHIPS[topology.partition(":")[0]]
        mesh = make_mesh(parse_mesh(self.mesh), devices)
        compile_model = partial(
            compile_iteration,
            ppo=self.ppo,
            mesh=mesh,
            chip=chip,
            prompt_tokens=prompt_tokens,
            critic=self.critic,
            adapters=self.lora if self.lora.rank else None,
            phases=self.phases,
        )
        if self.depths is None:
            programs = compile_model(config)
        else:
            programs = extrapolate(compile_model, config, self.depths)
        axes = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        print(
            f"{self.model} ({family}) on {topology}, {mesh.size} of {len(devices)} devices as "
            f"{axes}, {prompt_tokens} prompt and {self.ppo.max_new_tokens} response tokens; per "
            f"device, of {chip.memory} GiB:"
        )
        print(report.summary(programs, config, mesh, chip))
        if self.out is not None:
            fits = not report.advice(programs, chip)
            write_json(self.out, {"fits": fits, **report.plan_figures(programs, chip)})
